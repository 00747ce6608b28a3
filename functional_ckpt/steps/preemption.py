"""Treats SIGTERM as a request to save once more. No other module installs signal handlers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from functional_ckpt import errors
from functional_ckpt.policies.save import Preemption


class Watch:
    """Whether the process has received SIGTERM.

    Args:
        on_reached: Called by the signal handler, at every SIGTERM.
    """

    def __init__(self, on_reached: Callable[[], None] = lambda: None) -> None:
        self.is_reached = False
        self._on_reached = on_reached
        self._previous: Any = None
        self._installed = False

    @property
    def is_on(self) -> bool:
        """Whether the handler is installed."""
        return self._installed

    def start(self) -> None:
        """Installs the handler, which also calls the previous one."""
        if threading.current_thread() is not threading.main_thread():
            raise errors.UsageError(
                "policies.Preemption() needs the main thread: signal handlers can be installed "
                "only there."
            )
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        self._installed = True

    def stop(self) -> None:
        """Restores the previous handler, unless another one was installed since."""
        if not self._installed:
            return
        self._installed = False
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._installed and signal.getsignal(number) == self._on_signal:
            # A trainer that saves and restores handlers has put this one back after `stop`.
            signal.signal(number, self._previous or signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self.is_reached = True
        self._on_reached()
        previous: Callable[[int, FrameType | None], Any] | Any = self._previous
        if callable(previous):
            previous(number, frame)


def is_preemption(policy: object) -> bool:
    """Returns whether a policy (native or Orbax's) waits for SIGTERM."""
    return (
        isinstance(policy, Preemption)
        or "Preemption" in type(getattr(policy, "theirs", policy)).__name__
    )
