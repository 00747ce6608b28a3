"""Saves steps that share a file, until it is killed; see `test_shared_steps`.

Run as a script it forks a process for each line it is given, and says when that one has ended.
Nothing in it may use this package before the fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.format import shared_files

SIZE = 520  # a square of float32 is larger than a megabyte
STEPS_OF_BASE = 7


def items_of(step: int, version: int = 0) -> dict[str, Any]:
    """Every bit of a step: a base that changes sometimes, and an adapter that always does."""
    base = torch.nn.Linear(SIZE, SIZE).requires_grad_(False)
    adapter = torch.nn.Linear(SIZE, 2)
    with torch.no_grad():
        for module, seed in ((base, step // STEPS_OF_BASE), (adapter, step + 10**6 * version)):
            generator = torch.Generator().manual_seed(seed)
            for parameter in module.parameters():
                parameter.normal_(generator=generator)
    model = torch.nn.ModuleDict({"base": base, "adapter": adapter})
    return {"model": model, "n": {"step": step, "version": version}}


class Killer(testing.FaultyStorage):
    """Kills its process before an operation that changes something; 0 for none."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def operation(self, kind: str, path: str) -> None:
        if kind not in ("read", "list"):
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)
        super().operation(kind, path)


def save(task: dict[str, Any], report: Callable[[str], object]) -> None:
    """Resumes from the newest step that is intact, or goes back to one, and saves the next ones.

    Args:
        task: `root`; `saves`, steps with their versions; `kill_at`, the operation to die at;
            `errno` of every link, or 0; `refresh`, how many steps share a file; `far`, the path of
            a tier, or ""; `back_to`, a step whose later ones are discarded, or None.
        report: Called after each event.
    """
    shared_files.REFRESH_STEPS = task["refresh"]
    if task["errno"]:

        def refuse(*paths: object, **options: object) -> None:
            raise OSError(task["errno"], os.strerror(task["errno"]))

        os.link = refuse  # type: ignore[assignment]
    tiers = [fc.Tier(path=task["far"])] if task["far"] else []
    storage = Killer(task["kill_at"])
    with contextlib.ExitStack() as stack:
        manager = fc.CheckpointManager(task["root"], storage=storage, overwrite=True, tiers=tiers)
        stack.callback(without_refusals, manager.close)
        try:
            if task["back_to"] is None:
                manager.restore_or(items_of(0), on_corrupt="older")
            else:
                manager.restore(task["back_to"], items_of(0), discard_later=True)
                report("back")
        except errors.CorruptCheckpointError:  # none is intact
            if task["back_to"] is not None:
                return
        for step, version in task["saves"]:
            without_refusals(manager.save, step, items_of(step, version))
            without_refusals(manager.wait_until_finished)
            without_refusals(manager.wait_until_finished)
            report(f"saved {step}")


def without_refusals(call: Callable[..., object], *arguments: object) -> None:
    """Calls until no more steps are reported that no tier gets, since they are damaged."""
    for _ in range(100):
        try:
            call(*arguments)
        except errors.SaveError as error:
            if "cannot be copied" not in str(error):
                raise
        else:
            return


def main() -> None:
    """Reads the tasks, one a line."""
    torch.set_num_threads(1)
    import functional_ckpt.manager  # noqa: F401 - for every child

    def report(text: str) -> None:
        os.write(1, f"{text}\n".encode())

    report("ready")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 1
            try:
                save(json.loads(line), report)
                code = 0
            except errors.LockedError:
                report("locked")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        report(f"ended {status}")


if __name__ == "__main__":
    main()
