"""Treats SIGTERM as a request to save once more. No other module installs signal handlers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from functional_ckpt import errors
from functional_ckpt.policies.save import Preemption
from functional_ckpt.policies.save_rules import SaveRule


class Watch:
    """Whether the process has received SIGTERM.

    Args:
        on_reached: Called by the signal handler, at every SIGTERM.

    Attributes:
        is_reached: Whether it has.
        pipe: Receives the signal where the handler cannot run; if `start` was asked for it.
    """

    def __init__(self, on_reached: Callable[[], None] = lambda: None) -> None:
        self.is_reached = False
        self._on_reached = on_reached
        self._previous: Any = None
        self._installed = False
        self.pipe: SignalPipe | None = None

    @property
    def is_on(self) -> bool:
        """Whether the handler is installed."""
        return self._installed

    def start(self, *, has_pipe: bool = False) -> None:
        """Installs the handler, which also calls the previous one."""
        if threading.current_thread() is not threading.main_thread():
            raise errors.UsageError(
                "policies.Preemption() needs the main thread: signal handlers can be installed "
                "only there."
            )
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        self._installed = True
        if has_pipe:
            self.pipe = SignalPipe()
            self.pipe.install()

    def stop(self) -> None:
        """Restores the previous handler, unless another one was installed since."""
        if not self._installed:
            return
        self._installed = False
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
        if self.pipe is not None:
            self.pipe.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._installed and signal.getsignal(number) == self._on_signal:
            # A trainer that saves and restores handlers has put this one back after `stop`.
            signal.signal(number, self._previous or signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self.is_reached = True
        if self.pipe is not None and not self.pipe.install():
            self.pipe.write(bytes([number]))  # another owner of the descriptor had replaced it
        self._on_reached()
        previous: Callable[[int, FrameType | None], Any] | Any = self._previous
        if callable(previous):
            previous(number, frame)


class SignalPipe:
    """A pipe that gets the number of each signal, also while the main thread runs no Python.

    The process has one descriptor for that: another owner of it, such as asyncio, gets the numbers
    too. A forked child gives it up: its signals are not the parent's.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._other = -1
        self._other_id: object = None
        self._is_open = True
        self._users = {"signals", "reader"}
        self._mutex = threading.Lock()
        _pipes.add(self)

    def install(self) -> bool:
        """On the main thread: makes signals write into the pipe; returns whether they did."""
        if not self._is_open or threading.current_thread() is not threading.main_thread():
            return True
        found = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        if found not in (-1, self._writer):
            self._other, self._other_id = found, _file_id(found)
        return found == self._writer

    def write(self, data: bytes) -> None:
        """Writes numbers of signals, or zeros, which wake the reader."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, data)

    def wait(self, seconds: float) -> bool:
        """Waits for a signal; returns whether SIGTERM came."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        data = os.read(self._reader, 4096).strip(b"\0") if poll.poll(1000 * seconds) else b""
        if data and self._is_other_open():
            with contextlib.suppress(OSError):
                os.write(self._other, data)
        return signal.SIGTERM in data

    def close(self) -> None:
        """Gives the descriptor back to its other owner; wakes the reader.

        Off the main thread that is impossible, and the pipe stays open: a signal would be written
        into another file that gets its number.
        """
        if not self._is_open:
            return
        self._is_open = False
        self.write(b"\0")
        if threading.current_thread() is threading.main_thread():
            found = signal.set_wakeup_fd(-1)
            other = self._other if found == self._writer and self._is_other_open() else found
            if other not in (-1, self._writer):
                signal.set_wakeup_fd(other)
            self._leave("signals")

    def end(self) -> None:
        """Notes that nothing waits any more."""
        self._leave("reader")

    def _leave(self, user: str) -> None:
        """Closes the pipe after its last user."""
        with self._mutex:
            self._users.discard(user)
            if not self._users:
                os.close(self._reader)
                os.close(self._writer)

    def _is_other_open(self) -> bool:
        return self._other != -1 and _file_id(self._other) == self._other_id


def _file_id(descriptor: int) -> object:
    """Returns the identity of an open file; None if it was closed."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


_pipes: weakref.WeakSet[SignalPipe] = weakref.WeakSet()


def _forget_in_child() -> None:
    for each in _pipes:
        if each._is_open:
            each._is_open = False
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)


def snapshot_policy(rule: SaveRule | None) -> Preemption | None:
    """Returns the policy of a rule that asks for copies in memory."""
    policies = () if rule is None else rule.policies
    found = (each for each in policies if isinstance(each, Preemption))
    return next((each for each in found if each.snapshot_every is not None), None)


def is_preemption(policy: object) -> bool:
    """Returns whether a policy (native or Orbax's) waits for SIGTERM."""
    return (
        isinstance(policy, Preemption)
        or "Preemption" in type(getattr(policy, "theirs", policy)).__name__
    )
