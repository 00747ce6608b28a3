"""Saves steps that share a file, until it is killed; see `test_shared_steps`.

Run as a script it forks a process for each line it is given, and says when that one has ended.
Nothing in it may use this package before the fork.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from typing import Any

import torch

import functional_ckpt as fc
from functional_ckpt import errors, testing

SIZE = 520  # a square of float32 is larger than a megabyte
STEPS_OF_BASE = 7


def items_of(step: int) -> dict[str, Any]:
    """Every bit of a step: a base that changes sometimes, and an adapter that always does."""
    base = torch.nn.Linear(SIZE, SIZE).requires_grad_(False)
    adapter = torch.nn.Linear(SIZE, 2)
    with torch.no_grad():
        for module, seed in ((base, step // STEPS_OF_BASE), (adapter, step)):
            generator = torch.Generator().manual_seed(seed)
            for parameter in module.parameters():
                parameter.normal_(generator=generator)
    return {"model": torch.nn.ModuleDict({"base": base, "adapter": adapter}), "n": {"step": step}}


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


def save(root: str, first: int, count: int, kill_at: int, out: int) -> None:
    """Resumes from the newest step that is intact, and saves the next ones."""
    with fc.CheckpointManager(root, storage=Killer(kill_at)) as manager:
        with contextlib.suppress(errors.CorruptCheckpointError):  # none is
            manager.restore_or(items_of(0), on_corrupt="older")
        for step in range(first, first + count):
            manager.save(step, items_of(step))
            manager.wait_until_finished()
            os.write(out, f"saved {step}\n".encode())


def main() -> None:
    """Reads lines of: directory, first step, number of steps, operation to die at."""
    torch.set_num_threads(1)
    import functional_ckpt.manager  # noqa: F401 - for every child

    os.write(1, b"ready\n")
    for line in sys.stdin:
        root, *numbers = line.split()
        child = os.fork()
        if not child:
            code = 1
            try:
                save(root, *map(int, numbers), out=1)  # type: ignore[misc]
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, f"ended {status}\n".encode())


if __name__ == "__main__":
    main()
