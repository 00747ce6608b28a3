"""Jobs of `scripts/mutants`, each in a fork of a process that has done the slow imports."""

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
from typing import TypeAlias

__all__ = ["Job", "Limits", "preload", "run_jobs", "seconds_used"]


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A function to run in a copy.

    Attributes:
        name: Of its log.
        work: Runs in the child, in the copy; its result is the child's exit status.
        prepare: Changes the copy, and returns a function that undoes the change.
    """

    name: str
    work: Callable[[], int]
    prepare: Callable[[Path], Callable[[], None]] = lambda copy: lambda: None


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """When a job hangs, on a machine that may be busy with something else.

    Attributes:
        asleep_seconds: How long its processes may sleep within one test.
        running_seconds: How long they may run within one test. The time that they wait for a
            processor counts for neither.
    """

    asleep_seconds: float
    running_seconds: float


_Times: TypeAlias = tuple[float, float]
"""Seconds of running, and of waiting for a processor."""


class _Watch:
    """Detects a job that hangs. Its log grows at the start of each test."""

    def __init__(self, session: int, log: Path, limits: Limits) -> None:
        self._session, self._log, self._limits = session, log, limits
        self._size, self._began, self._looked = -1, 0.0, time.monotonic()
        self._times: dict[Path, _Times] = {}

    def is_hung(self) -> bool:
        """Returns whether the current test has slept, or has run, for longer than a test may."""
        now = time.monotonic()
        if now - self._looked < 1.0:
            return False
        self._looked = now
        found = _times_of(self._session)
        if (size := self._log.stat().st_size) != self._size:
            self._size, self._began = size, now
            self._times, self._before = found, found
        self._times = self._times | found
        ran, waited = (
            sum(each[place] for each in self._times.values())
            - sum(each[place] for each in self._before.values())
            for place in range(2)
        )
        asleep = now - self._began - ran - waited
        return asleep > self._limits.asleep_seconds or ran > self._limits.running_seconds


def _times_of(session: int) -> dict[Path, _Times]:
    """Returns for each thread of a session how long it has run, and waited for a processor."""
    found: dict[Path, _Times] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            for thread in (process / "task").iterdir():
                ran, waited, _ = (thread / "schedstat").read_text().split()
                found[thread] = int(ran) / 1e9, int(waited) / 1e9
    return found


def preload() -> None:
    """Imports the libraries that every child needs."""
    torch = ("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint")
    other = ("orbax.checkpoint", "hypothesis.extra.numpy", "moto.server", "obstore.store")
    for name in (*torch, *other, "pytest", "rich.table", "tensorstore", "xxhash"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def run_jobs(
    jobs: Sequence[Job],
    copies: Sequence[Path],
    logs: Path,
    limits: Limits,
    done: Callable[[Job, int | None], None],
) -> None:
    """Runs each job in a child of its own, one at a time in each copy.

    Args:
        jobs: The jobs.
        copies: The copies of the repository.
        logs: The directory of the children's output.
        limits: When a child hangs; it is killed with its processes.
        done: Called with each job and its exit status; None for one that hung.
    """
    waiting, free = list(reversed(jobs)), list(copies)
    running: dict[int, tuple[Job, Path, _Watch, Callable[[], None]]] = {}
    while waiting or running:
        while waiting and free:
            job, copy = waiting.pop(), free.pop()
            undo = job.prepare(copy)
            pid = _fork(job, copy, logs)
            running[pid] = (job, copy, _Watch(pid, logs / f"{job.name}.log", limits), undo)
        time.sleep(0.05)
        for pid, (job, copy, watch, undo) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and not watch.is_hung():
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # and its own children
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
        sys.dont_write_bytecode = False  # in the copy, for the next child
        code = job.work()
    except BaseException:  # noqa: BLE001 - only the log shows it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def seconds_used() -> float:
    """Returns the processor time of this process and of its children, live ones included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    live = sum(ran for ran, _ in _times_of(os.getsid(0)).values())
    return live + used.ru_utime + used.ru_stime
