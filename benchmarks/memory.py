"""Watches from outside how much memory a process holds: `python -m benchmarks.memory PID`.

Reads one byte per command: `b` starts sampling, `p` requests the result, three numbers, and `e` the
result and the end of sampling. A thread of the process itself would take the interpreter from the
measured code, which became a tenth to a third slower.
"""

from __future__ import annotations

import os
import select
import sys

import psutil

__all__ = ["Watch", "main"]

_INTERVAL_SECONDS = 0.004
_CHILDREN_EVERY = 50  # listing them costs milliseconds


def _held_bytes(pid: int, *, with_shared: bool) -> int:
    """Memory without a file behind it: anonymous, and shared (mmap(-1), /dev/shm) as well."""
    fields: dict[str, str] = {}
    try:
        with open(f"/proc/{pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    names = ("RssAnon", "RssShmem") if with_shared else ("RssAnon",)
    return sum(int(fields[name].split()[0]) * 1024 for name in names if name in fields)


class Watch:
    """Memory of a process and its children since this was made, without this process.

    Attributes:
        start: Bytes at the start.
        peak: Bytes above that, at most.
        now: Bytes above that, at the last look.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._count = self._children = 0
        self.start = self.peak = self.now = 0
        self.look(at_children=True)
        self.start, self.peak, self.now = self.now, 0, 0

    def look(self, *, at_children: bool = False) -> None:
        """Looks once more."""
        self._count += 1
        if at_children or self._count % _CHILDREN_EVERY == 0:
            # Memory shared with their parent is counted there already.
            self._children = sum(
                _held_bytes(child.pid, with_shared=False)
                for child in psutil.Process(self._pid).children(recursive=True)
                if child.pid != os.getpid()
            )
        held = _held_bytes(self._pid, with_shared=True) + self._children
        self.now = held - self.start
        self.peak = max(self.peak, self.now)


def main(pid: int) -> None:
    """Samples until the pipe is closed."""
    watch = Watch(pid)
    is_watching = False
    while True:
        asked, _, _ = select.select([0], [], [], _INTERVAL_SECONDS if is_watching else None)
        if not asked:
            watch.look()
            continue
        byte = os.read(0, 1)
        if byte == b"b":
            watch, is_watching = Watch(pid), True
        elif byte in (b"p", b"e"):
            watch.look(at_children=True)
            is_watching = is_watching and byte == b"p"
        else:
            return
        os.write(1, f"{watch.start} {watch.peak} {watch.now}\n".encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
