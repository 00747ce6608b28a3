"""`fckpt rm`: removes steps, as the manager does: under the writer's lock, the latest never."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from functional_ckpt import errors
from functional_ckpt.cli import output, targets


def run(arguments: argparse.Namespace) -> int:
    """Removes the steps that are named."""
    root = root_of(arguments.directory, arguments.prefix)
    steps = sorted({root.number(word) for word in arguments.steps})
    for step in steps:
        root.checkpoint(step)  # raises where there is none
    if root.latest in steps and not arguments.latest_too:
        raise errors.UsageError(
            f"Step {root.latest} is the latest, which a run resumes from. Add --latest-too to "
            "remove it.",
            path=root.path,
        )
    if not arguments.dry_run:
        remove(root, steps)
    if arguments.json:
        record = {"schema": "fckpt.rm/1", "path": root.path, "steps": steps}
        output.as_json({**record, "dry_run": arguments.dry_run})
    else:
        verb = "would remove" if arguments.dry_run else "removed"
        print(output.printable(f"{root.path}: {verb} {', '.join(f'step {s}' for s in steps)}"))
    return 0


def root_of(text: str, prefix: str | None) -> targets.Root:
    """Returns a directory of steps.

    Raises:
        UsageError: It is one checkpoint.
    """
    target = targets.find(text, prefix)
    if isinstance(target, targets.Checkpoint):
        raise errors.UsageError(
            f"{text} is one checkpoint; name its directory of steps, then the step.",
            path=target.path,
        )
    return target


def remove(root: targets.Root, steps: Sequence[int]) -> None:
    """Removes steps.

    Raises:
        LockedError: A manager is open for writing in the directory.
    """
    from functional_ckpt.manager import CheckpointManager  # late: torch

    with CheckpointManager(root.path, step_name=root.names) as manager:
        for step in steps:
            manager.delete(step)
