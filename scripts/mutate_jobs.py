"""Tests of `scripts/mutants`, each in a fork of a process that has imported what is slow."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["Job", "preload", "run_jobs", "seconds_used"]


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """Tests to run in a copy.

    Attributes:
        name: Of its log.
        tests: What pytest is given.
        work: Runs in the child, in the copy; its result is the child's exit status.
        prepare: Changes the copy, and returns what undoes that.
    """

    name: str
    work: Callable[[], int]
    prepare: Callable[[Path], Callable[[], None]] = lambda copy: lambda: None


def preload() -> None:
    """Imports what every child needs and no change concerns."""
    names = ("torch", "torch.distributed", "torch.distributed.tensor", "numpy", "tensorstore")
    for name in (*names, "xxhash", "pytest"):
        importlib.import_module(name)


def run_jobs(
    jobs: Sequence[Job],
    copies: Sequence[Path],
    logs: Path,
    wall_seconds: float,
    done: Callable[[Job, int | None], None],
) -> None:
    """Runs each job in a child of its own, one at a time in each copy.

    Args:
        jobs: What to run.
        copies: Copies of the repository.
        logs: Where the children's output goes.
        wall_seconds: When a child hangs, and is killed with its processes.
        done: Called with each job and its exit status; None for one that hung.
    """
    waiting, free = list(reversed(jobs)), list(copies)
    running: dict[int, tuple[Job, Path, float, Callable[[], None]]] = {}
    while waiting or running:
        while waiting and free:
            job, copy = waiting.pop(), free.pop()
            undo = job.prepare(copy)
            running[_fork(job, copy, logs)] = (job, copy, time.monotonic(), undo)
        time.sleep(0.05)
        for pid, (job, copy, began, undo) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            is_late = time.monotonic() - began > wall_seconds
            if not ended and not is_late:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # with what it has started
            if not ended:
                os.waitpid(pid, 0)
            undo()
            del running[pid]
            free.append(copy)
            done(job, os.waitstatus_to_exitcode(status) if ended else None)


def _fork(job: Job, copy: Path, logs: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        os.setsid()
        descriptor = os.open(logs / f"{job.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(copy)
        sys.path[0:0] = [str(copy)]
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        code = job.work()
    except BaseException:  # noqa: BLE001 - there is nobody else to see it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def seconds_used() -> float:
    """Processor time of this process and of those it waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime
