"""The coordinator over torch.distributed, and its only importer.

Everything goes over clones of the process group's key-value store, under a prefix of our own; the training
group's collectives are never used. One clone per thread: calls on one store object block each other.
"""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import Combine, Coordinator, SingleProcess

__all__ = ["DEFAULT_TIMEOUT_SECONDS", "StoreCoordinator", "default_coordinator"]

DEFAULT_TIMEOUT_SECONDS = 600.0
# How much longer the others wait than the primary, so that its verdict reaches them first.
_GRACE_SECONDS = 2.0
_FIRST_PAUSE_SECONDS = 0.0002
_LONGEST_PAUSE_SECONDS = 0.05
_OK, _ERROR = b"+", b"-"
_serial = itertools.count()


def default_coordinator(
    process_group: Any = None, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
) -> Coordinator:
    """The coordinator of the process group, if there is one with more than one rank; else a single process's.

    Args:
        process_group: The group that saves and restores together; None for the default group. A sub-group is
            for replicas that checkpoint alone.
        timeout_seconds: How long to wait for another rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise errors.UsageError(
                "process_group was given, but torch.distributed is not initialised."
            )
        return SingleProcess()
    group = process_group or dist.group.WORLD
    if dist.get_world_size(group) == 1:
        return SingleProcess()
    return StoreCoordinator(group, timeout_seconds=timeout_seconds)


class StoreCoordinator:
    """Ranks that meet in a key-value store.

    Args:
        group: The process group.
        timeout_seconds: How long to wait for another rank.
    """

    def __init__(self, group: Any, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        # Every rank makes its coordinators in the same order, so the serial numbers agree.
        prefix = f"functional_ckpt/{next(_serial)}"
        self._setup(group, prefix, timeout_seconds)

    def _setup(self, group: Any, prefix: str, timeout_seconds: float) -> None:
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.global_ranks = tuple(dist.get_process_group_ranks(group))
        self._group = group
        self._prefix = prefix
        self._timeout_seconds = timeout_seconds
        self._store = dist.PrefixStore(prefix, _clone(group.get_group_store()))
        self._round = 0
        self._spent: list[str] = []

    def background(self) -> Coordinator:
        """A coordinator over a store connection of its own."""
        other = StoreCoordinator.__new__(StoreCoordinator)
        other._setup(self._group, f"{self._prefix}/background", self._timeout_seconds)
        return other

    def hurry(self, seconds: float) -> None:
        """Shortens the timeout."""
        self._timeout_seconds = min(self._timeout_seconds, seconds)

    def exchange(self, what: str, value: bytes | BaseException, combine: Combine) -> bytes:
        """See `Coordinator.exchange`."""
        key = str(self._round)
        self._round += 1
        try:
            if self.rank == 0:
                return self._lead(key, what, value, combine)
            return self._follow(key, what, value)
        except (RuntimeError, ConnectionError, OSError) as error:
            if isinstance(error, errors.CheckpointError) or error is value:
                raise
            if isinstance(error, dist.DistError):
                raise errors.CoordinationError(
                    f"The store of the process group failed while the ranks were about {what}: {error}. The "
                    "process that hosts it (rank 0, as a rule) may be dead.",
                    ranks=(0,),
                ) from error
            raise

    # ------------------------------------------------------------------------------ primary

    def _lead(self, key: str, what: str, value: bytes | BaseException, combine: Combine) -> bytes:
        try:
            outcome = self._combine(key, what, value, combine)
        except BaseException as error:
            self._store.set(f"{key}/gathered", b"")
            self._store.set(f"{key}/outcome", _ERROR + f"0:{_text(error)}".encode())
            raise
        self._store.set(f"{key}/outcome", _OK + outcome)
        self._forget(key)
        return outcome

    def _combine(
        self, key: str, what: str, value: bytes | BaseException, combine: Combine
    ) -> bytes:
        deadline = time.monotonic() + self._timeout_seconds
        values: list[bytes] = []
        failed: dict[int, str] = {}
        absent: list[int] = []
        if isinstance(value, BaseException):
            raise value
        for rank in range(1, self.num_ranks):
            found = self._get(f"{key}/{rank}", deadline)
            if found is None:
                absent.append(rank)
            elif found[:1] == _ERROR:
                failed[rank] = found[1:].decode()
            else:
                values.append(found[1:])
        if failed:
            raise errors.CoordinationError(
                "; ".join(f"rank {rank} failed in {what}: {text}" for rank, text in failed.items()),
                ranks=failed,
            )
        if absent:
            raise errors.CoordinationTimeoutError(
                f"Rank {', '.join(map(str, absent))} did not come to {what} within "
                f"{self._timeout_seconds:g} seconds; it may be dead or stuck.",
                ranks=absent,
            )
        self._store.set(f"{key}/gathered", b"")
        return combine([value, *values])

    def _forget(self, key: str) -> None:
        """Deletes the keys of the round before: every rank has read them, since it came to this one."""
        for spent in self._spent:
            self._store.delete_key(spent)
        names = (*map(str, range(1, self.num_ranks)), "gathered", "outcome")
        self._spent = [f"{key}/{name}" for name in names]

    # ------------------------------------------------------------------------------ others

    def _follow(self, key: str, what: str, value: bytes | BaseException) -> bytes:
        if isinstance(value, BaseException):
            self._store.set(f"{key}/{self.rank}", _ERROR + _text(value).encode())
            raise value
        self._store.set(f"{key}/{self.rank}", _OK + value)
        wait = self._timeout_seconds + _GRACE_SECONDS
        # The primary gathers within its timeout, and then has as long again to do its part.
        gathered = self._get(f"{key}/gathered", time.monotonic() + wait)
        found = None
        if gathered is not None:
            found = self._get(f"{key}/outcome", time.monotonic() + wait)
        if found is None:
            raise errors.CoordinationTimeoutError(
                f"Rank 0 did not finish {what} within {wait:g} seconds; it may be dead or stuck.",
                ranks=(0,),
            )
        if found[:1] == _ERROR:
            rank, _, text = found[1:].decode().partition(":")
            raise errors.CoordinationError(text, ranks=(int(rank),))
        return found[1:]

    # ------------------------------------------------------------------------------ waiting

    def _get(self, key: str, deadline: float) -> bytes | None:
        """The value of a key once it is there; None when the time is up.

        Polls, because a blocking wait on a store cannot be given up before its own timeout.
        """
        pause = _FIRST_PAUSE_SECONDS
        while not self._store.check([key]):
            if time.monotonic() >= deadline:
                return None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return bytes(self._store.get(key))


def _clone(store: Any) -> Any:
    clone: Callable[[], Any] | None = getattr(store, "clone", None)
    if clone is None:
        return store
    cloned = clone()
    cloned.set_timeout(datetime.timedelta(seconds=60))
    return cloned


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
