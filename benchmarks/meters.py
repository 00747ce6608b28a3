"""Clocks: seconds, CPU seconds and the peak of memory, child processes included."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psutil

__all__ = ["PeakMemory", "cpu_seconds", "seconds"]

_INTERVAL_SECONDS = 0.004
_CHILDREN_EVERY = 50  # listing them costs milliseconds


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def cpu_seconds() -> float:
    """CPU time of this process and of its children, running ones included."""
    times = psutil.Process().cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def held_bytes(pid: int | str = "self", *, with_shared: bool = True) -> int:
    """Memory without a file behind it: anonymous, and shared (mmap(-1), /dev/shm) as well."""
    fields: dict[str, str] = {}
    try:
        with open(f"/proc/{pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    names = ("RssAnon", "RssShmem") if with_shared else ("RssAnon",)
    return sum(int(fields[name].split()[0]) * 1024 for name in names if name in fields)


class PeakMemory:
    """The most memory held above that at the start; a thread looks every few milliseconds.

    Attributes:
        start: Bytes held at the beginning.
        peak: Bytes held above that, at most.
        end: Bytes held above that when it was left.
    """

    def __init__(self) -> None:
        self.start = self.peak = self.end = 0
        self._children = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._look_at_children()
        self.start = held_bytes() + self._children
        self._thread.start()
        return self

    def _look_at_children(self) -> None:
        # What they share with us is counted here already.
        children = psutil.Process().children(recursive=True)
        self._children = sum(held_bytes(child.pid, with_shared=False) for child in children)

    def _watch(self) -> None:
        count = 0
        while not self._done.wait(_INTERVAL_SECONDS):
            count += 1
            if count % _CHILDREN_EVERY == 0:
                self._look_at_children()
            self.peak = max(self.peak, held_bytes() + self._children - self.start)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look_at_children()
        self.end = held_bytes() + self._children - self.start
        self.peak = max(self.peak, self.end)
