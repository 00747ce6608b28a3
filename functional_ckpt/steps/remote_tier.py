"""A remote tier, whose store may be unreachable, now or when the manager is made."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Sequence

from functional_ckpt import errors
from functional_ckpt.policies import save_rules
from functional_ckpt.policies.base import KeepPolicy
from functional_ckpt.steps.tier_steps import TierSteps

_REACH_SECONDS = 3.0
# Errors of a file system or store that is unreachable; all others are answers.
_OUTAGES = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNREFUSED),
        *(errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN),
        *(errno.ENETUNREACH, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO),
    }
)
_log = logging.getLogger("functional_ckpt")


class RemoteTier:
    """A tier, opened as soon as it can be reached. Safe to use from any thread.

    Args:
        root: Its path.
        connect: Connects to its store, with one request; raises without an answer.
        rule: The policies that select the steps to upload; None for all.
        keep: The policies that select the steps to keep; empty for all.
        max_delay_seconds: Maximum delay of a step without an error; None for no limit.

    Attributes:
        steps: Its steps; None until it is reached.
        acquire: Called with its steps when it is opened: reads them, or becomes their writer.
        on_open: Called once it is open.
        reached: Set when its store has answered or is known to be unreachable.
    """

    def __init__(
        self,
        root: str,
        connect: Callable[[], TierSteps],
        *,
        rule: save_rules.SaveRule | None,
        keep: tuple[KeepPolicy, ...],
        max_delay_seconds: float | None,
    ) -> None:
        self.root = root
        self.rule = rule
        self.keep = keep
        self.max_delay_seconds = max_delay_seconds
        self.steps: TierSteps | None = None
        self.reached = threading.Event()
        self.acquire: Callable[[RemoteTier, TierSteps], None] = lambda _, steps: (
            steps.reload_local()
        )
        self.on_open: Callable[[], None] = lambda: None
        self._connect = connect
        self._is_released = False
        self._mutex = threading.Lock()

    def open(self) -> TierSteps:
        """Returns the tier's steps; it is opened if it was not yet.

        Raises:
            StorageError: It is unreachable, or refuses.
            LockedError: Another live writer holds it.
        """
        with self._mutex:
            if self.steps is None:
                steps = self._connect()
                self.reached.set()
                self.acquire(self, steps)
                if self._is_released:
                    steps.unlock()
                    raise errors.ClosedError(
                        f"The manager was closed before {self.root} was opened.", path=self.root
                    )
                self.steps = steps
                self.on_open()
            return self.steps

    def check_lock(self) -> None:
        """Raises `LockedError` if the tier is open, and its lock was lost."""
        if self.steps is not None:
            self.steps.check_lock()

    def release(self) -> None:
        """Releases the tier's lock."""
        self._is_released = True
        if self.steps is not None:
            self.steps.unlock()


def open_reachable(tiers: Sequence[RemoteTier]) -> None:
    """Opens the reachable tiers in parallel, and does not wait for the others.

    Raises:
        StorageError: A tier's store refuses: a permission, a bucket.
        LockedError: Another live writer holds a tier.
    """
    for attempt in [_Attempt(tier) for tier in tiers]:
        attempt.wait()


def is_outage(error: BaseException) -> bool:
    """Returns whether an error means that a store is unreachable now."""
    return isinstance(error, errors.StorageError) and error.errno in _OUTAGES


class _Attempt:
    """An attempt to open a tier, on a thread of its own, since its store may not answer."""

    def __init__(self, tier: RemoteTier) -> None:
        self._tier = tier
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, name="open-tier", daemon=True).start()

    def _run(self) -> None:
        try:
            self._tier.open()
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            self._error = error
        self._done.set()
        self._tier.reached.set()

    def wait(self) -> None:
        if self._tier.reached.wait(_REACH_SECONDS):
            self._done.wait()
            if self._error is not None and not is_outage(self._error):
                raise self._error
        if self._tier.steps is None:
            _log.warning(
                "%s cannot be reached; uploads will start when it can: %s",
                self._tier.root,
                self._error or f"no answer within {_REACH_SECONDS:g} s",
            )
