"""Processes that stay: importing torch takes seconds, so one set of workers serves every test.

A job is a function of a module that workers can import, called on ranks 0 to n-1 of a fresh gloo
group of n processes. Groups of any size follow each other in the same processes.
"""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

HOST = "127.0.0.1"
JOB_SECONDS = 120.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The error of a job: exceptions themselves need not survive pickling."""

    kinds: tuple[str, ...]
    text: str
    ranks: tuple[int, ...]
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        return cls(
            kinds=tuple(kind.__name__ for kind in type(error).__mro__),
            text=str(error),
            ranks=tuple(getattr(error, "ranks", ())),
            traceback="".join(traceback.format_exception(error)),
        )


class Workers:
    """Processes, started when a job first needs them.

    Args:
        preload: Modules that the processes' server imports, besides torch's: once for all of them.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        # Forked from a server that has imported torch, and used nothing of it: one import for all.
        # (TensorStore must be imported by each: it does not survive a fork.)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed.tensor", *preload])
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._num_jobs = 0

    def outcomes(
        self,
        num_ranks: int,
        job: Callable[..., Any],
        *args: object,
        seconds: float = JOB_SECONDS,
        may_die: bool = False,
    ) -> list[Any]:
        """The job's result, or its `Failure`, for each rank; None for a killed one that may die."""
        self._start(num_ranks)
        self._num_jobs += 1
        for rank, pipe in enumerate(self._pipes[:num_ranks]):
            pipe.send((self._num_jobs, rank, num_ranks, seconds, job, args))
        deadline = time.monotonic() + seconds + 30
        outcomes: list[Any] = []
        for rank, pipe in enumerate(self._pipes[:num_ranks]):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise TimeoutError(f"rank {rank} of {num_ranks} has not finished {job.__name__}")
            try:
                outcomes.append(pipe.recv())
            except EOFError:  # it was killed by its own watchdog, which says where it hung
                if not may_die:
                    self.close()
                    raise
                outcomes.append(None)
        if None in outcomes and may_die:
            self.close()
        return outcomes

    def run(self, num_ranks: int, job: Callable[..., Any], *args: object) -> list[Any]:
        """The job's result on each rank, if it failed on none."""
        outcomes = self.outcomes(num_ranks, job, *args)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, Failure):
                raise AssertionError(f"rank {rank} of {num_ranks}:\n{outcome.traceback}")
        return outcomes

    def failures(self, num_ranks: int, job: Callable[..., Any], *args: object) -> list[Failure]:
        """The job's error on each rank, if it failed on all."""
        outcomes = self.outcomes(num_ranks, job, *args)
        for rank, outcome in enumerate(outcomes):
            if not isinstance(outcome, Failure):
                raise AssertionError(f"rank {rank} of {num_ranks} returned {outcome!r}")
        return outcomes

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()  # a worker that waits for a job leaves
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _start(self, num_ranks: int) -> None:
        while len(self._processes) < num_ranks:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs, self._store.port))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _work(pipe: multiprocessing.connection.Connection, port: int) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            number, rank, num_ranks, seconds, job, args = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
        try:
            pipe.send(_run(port, number, rank, num_ranks, job, args))
        finally:
            faulthandler.cancel_dump_traceback_later()


def _run(
    port: int, number: int, rank: int, num_ranks: int, job: Callable[..., Any], args: Any
) -> Any:
    timeout = datetime.timedelta(seconds=60)
    store = dist.TCPStore(HOST, port, is_master=False, timeout=timeout)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"job/{number}", store),
        rank=rank,
        world_size=num_ranks,
        timeout=timeout,
    )
    try:
        return job(*args)
    except BaseException as error:
        return Failure.of(error)
    finally:
        dist.destroy_process_group()
