"""`fckpt merge`: writes the mean of checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from functional_ckpt import errors
from functional_ckpt.cli import output, step_words, targets


def run(arguments: argparse.Namespace) -> int:
    """Merges, and prints a summary."""
    from functional_ckpt import transform  # late: torch

    paths = [each.path for each in _chosen(arguments)]
    with output.progress_bar("merging") as progress:
        transform.merge(
            paths,
            arguments.output,
            weights=arguments.weights,
            items=arguments.item,
            report=progress,
        )
    facts = {"path": arguments.output, "checkpoints": paths, "weights": arguments.weights}
    if arguments.json:
        output.as_json({"schema": "fckpt.merge/1", **facts})
    else:
        text = f"the mean of {', '.join(paths)} -> {arguments.output}"
        print(output.printable(text))
    return 0


def _chosen(arguments: argparse.Namespace) -> list[targets.Checkpoint]:
    """Returns the checkpoints in the order of the arguments; steps that are searched for ascend."""
    found: list[targets.Checkpoint] = []
    root: targets.Root | None = None
    texts: Sequence[str] = arguments.checkpoint
    is_search = arguments.last is not None or arguments.best is not None
    if is_search and len(texts) > 1:
        raise errors.UsageError("--last and --best choose among the steps of one directory.")
    for text, following in zip(texts, (*texts[1:], ""), strict=True):
        word = step_words.step_of(text)
        if root is not None and word is not None:
            found.append(root.checkpoint(word))
            continue
        target = targets.find(text, arguments.prefix, opens_foreign=True)
        root = target if isinstance(target, targets.Root) else None
        if isinstance(target, targets.Checkpoint):
            found.append(target)
        elif is_search:
            return [target.checkpoint(step) for step in _searched(target, arguments)]
        elif step_words.step_of(following) is None:
            found.append(target.checkpoint("latest"))
    if is_search:
        raise errors.UsageError(f"{texts[0]} is one checkpoint, not a directory of steps.")
    return found


def _searched(root: targets.Root, arguments: argparse.Namespace) -> list[int]:
    """Returns the last steps, or the best, that a resumed run has behind it."""
    infos = [info for info in root.history() if not info.is_abandoned]
    if arguments.last is not None:
        return _all_of(root, sorted(info.step for info in infos)[-arguments.last :], arguments.last)
    count, text = arguments.best
    if not (count.isascii() and count.isdigit()) or int(count) < 1:
        raise errors.UsageError(f"--best N METRIC: expected a number above zero, got {count!r}.")
    metrics = targets.metrics_of(infos)
    name, mode = step_words.find_metric(text, {name for each in metrics.values() for name in each})
    sign = -1 if (mode or step_words.mode_in(root.ranked(), name)) == "max" else 1
    ranked = sorted((sign * each[name], -step) for step, each in metrics.items() if name in each)
    return _all_of(root, sorted(-step for _, step in ranked[: int(count)]), int(count))


def _all_of(root: targets.Root, steps: list[int], count: int) -> list[int]:
    if len(steps) < count:
        raise errors.UsageError(
            f"{root.path} has {len(steps)} such steps, not {count}: {', '.join(map(str, steps))}.",
            path=root.path,
        )
    return steps
