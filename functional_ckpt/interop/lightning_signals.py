"""SIGTERM and SLURM's requeue signal in a Lightning training. Free of Lightning.

Lightning's handlers save and communicate at whatever point a signal comes: within an update, or
where one process receives it and the others do not. Here a signal is noted; the step is saved once
it is over, and the job is requeued then.
"""

from __future__ import annotations

import functools
import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("functional_ckpt")


class Signals:
    """The signals of a training.

    Args:
        waits_for_signal: Whether the manager has a handler of SIGTERM. It is the present one.

    Attributes:
        is_requeue_asked: Whether SLURM's requeue signal has come to this process.
    """

    def __init__(self, *, waits_for_signal: bool = False) -> None:
        self._handler: Any = signal.getsignal(signal.SIGTERM) if waits_for_signal else None
        self._requeue: Callable[[], None] | None = None
        self.is_requeue_asked = False

    def take(self, trainer: Any) -> None:
        """Replaces the handlers of Lightning."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        number = _requeue_signal(trainer)
        if number is None:
            return
        if trainer.world_size > 1 and self._handler is None:
            _log.warning(
                "SLURM's requeue signal saves no step of several processes: put "
                "policies.Preemption() among the save policies."
            )
            return
        theirs: Any = signal.signal(number, self._on_requeue_signal)
        self._requeue = functools.partial(theirs, number, None)

    def is_requeue_wanted(self, trainer: Any) -> bool:
        """Returns whether the signal has come to any process; called by all of them."""
        return self._requeue is not None and trainer.strategy.reduce_boolean_decision(
            self.is_requeue_asked, all=False
        )

    def requeue(self) -> None:
        """Requeues the job, as Lightning does."""
        if self._requeue is not None:
            self._requeue()

    def _on_requeue_signal(self, number: int, frame: Any) -> None:
        self.is_requeue_asked = True
        if self._handler is not None:
            self._handler(signal.SIGTERM, frame)


def _requeue_signal(trainer: Any) -> int | None:
    """Returns the signal on which Lightning requeues a SLURM job; None without its handler."""
    environment = trainer._accelerator_connector.cluster_environment
    number = getattr(environment, "requeue_signal", None)
    if number is None or not getattr(environment, "auto_requeue", False):
        return None
    handler = signal.getsignal(number)  # the user's own, if there was one before
    return number if hasattr(handler, "signal_handlers") else None
