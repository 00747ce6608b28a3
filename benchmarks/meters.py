"""Clocks: seconds, CPU seconds and the peak of memory, child processes included."""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

__all__ = ["PeakMemory", "cpu_seconds", "seconds"]


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
        if child.pid == _watcher().pid:
            continue
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


@functools.cache
def _watcher() -> subprocess.Popen[bytes]:
    """It lives as long as this process, so that its CPU time can be distinguished from others."""
    watcher = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.memory", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        cwd=Path(__file__).parents[1],
    )
    atexit.register(watcher.communicate)  # closes its pipes, upon which it ends
    return watcher


def _ask_watcher(byte: bytes) -> list[int]:
    """The initial level, the peak above it, and the current amount above it; in bytes."""
    watcher = _watcher()
    if watcher.stdin is None or watcher.stdout is None:
        raise RuntimeError("a process without pipes cannot be asked")
    watcher.stdin.write(byte)
    answer = watcher.stdout.readline()
    if not answer:
        raise RuntimeError(f"the process that watches memory ended: {watcher.wait()}")
    return [int(word) for word in answer.split()]


class PeakMemory:
    """The most memory held above that at the start, seen every few milliseconds; one at a time.

    Attributes:
        start: Bytes held at the start.
        end: Bytes held above that when it was left.
    """

    def __init__(self) -> None:
        self.start = self.end = self._peak = 0
        self._is_watching = False

    def __enter__(self) -> PeakMemory:
        self.start, _, _ = _ask_watcher(b"b")
        self._is_watching = True
        return self

    @property
    def peak(self) -> int:
        """Bytes held above those at the start, at most, until now."""
        if self._is_watching:
            _, self._peak, self.end = _ask_watcher(b"p")
        return self._peak

    def __exit__(self, *_: object) -> None:
        _, self._peak, self.end = _ask_watcher(b"e")
        self._is_watching = False
