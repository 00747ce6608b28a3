"""A device that computes immediately and copies late, to detect missing waits for copies.

It has the parts of `torch.cuda` that the library uses: a stream that runs its work later, on a
separate thread, and events between that stream and the host, whose own work is immediate. Copies
start when the test's thread waits for them, or after a while. Memory and arithmetic are the host's:
the order of waits is tested.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Event:
    """Something that a stream has come to."""

    def __init__(self, *, blocking: bool = False) -> None:
        self._reached = threading.Event()
        self._stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self._stream = stream
        stream.run(self._reached.set)

    def synchronize(self) -> None:
        if self._stream is not None and threading.current_thread() is threading.main_thread():
            self._stream.is_awaited.set()
        self._reached.wait()

    def is_reached(self) -> bool:
        return self._reached.is_set()


class Stream:
    """Runs its work in order, and copies late.

    Attributes:
        is_awaited: Whether the test's thread waits for the last work.
    """

    def __init__(self, seconds: float) -> None:
        self.is_awaited = threading.Event()
        self._seconds = seconds
        self._asked: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def run(self, task: Callable[[], object]) -> None:
        self._asked.put(task)

    def wait_event(self, event: Event) -> None:
        self.run(event.synchronize)

    def end(self) -> None:
        self._asked.put(None)
        self._thread.join()

    def _work(self) -> None:
        was_copy = False
        while (task := self._asked.get()) is not None:
            is_copy = getattr(task, "__name__", "") == "copy"
            if is_copy and not was_copy:
                self.is_awaited.wait(self._seconds)
                self.is_awaited.clear()
            was_copy = is_copy
            task()


class Host:
    """The stream of computations, which are immediate."""

    def __init__(self) -> None:
        self.num_held_back = 0

    def record_event(self) -> Event:
        event = Event()
        event._reached.set()
        return event

    def wait_event(self, event: Event) -> None:
        self.num_held_back += not event.is_reached()
        event.synchronize()


class _Later(TorchDispatchMode):
    """Copies asked of torch become a stream's work."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in (aten.copy_.default, aten.clone.default):
            return func(*args, **(kwargs or {}))
        is_clone = func is aten.clone.default
        source = args[0] if is_clone else args[1]
        to = torch.empty(source.shape, dtype=source.dtype) if is_clone else args[0]

        def copy() -> None:
            to.copy_(source)

        self._stream.run(copy)
        return to


class LaggingDevice:
    """Replaces `torch.cuda`.

    Attributes:
        seconds: Delay of copies without a waiting thread.
    """

    Event = Event

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.host = Host()
        self.streams: list[Stream] = []

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802 - as torch.cuda has it
        self.streams.append(Stream(self.seconds))
        return self.streams[-1]

    def current_stream(self, device: torch.device) -> Host:
        return self.host

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Generator[None]:
        with _Later(stream):
            yield

    def end(self) -> None:
        for stream in self.streams:
            stream.end()
