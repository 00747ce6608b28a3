"""The coordinator over torch.distributed.

Everything goes over clones of the process group's key-value store, under a prefix of our own; the
training group's collectives are never used. One clone per thread: calls on one store object block
each other.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, TypeAlias

import torch.distributed as dist

from functional_ckpt import errors
from functional_ckpt.distributed import gloo
from functional_ckpt.distributed.coordinator import (
    Board,
    Channel,
    Combine,
    Coordinator,
    Link,
    SingleProcess,
    Turns,
)
from functional_ckpt.distributed.key_values import StoreBoard
from functional_ckpt.distributed.meeting import Meeting
from functional_ckpt.distributed.rounds import Rounds
from functional_ckpt.distributed.turns import Member, StoreTurns

# Where the process group does not say how long its ranks wait.
_TIMEOUT_SECONDS = 600.0
_CONNECT_SECONDS = 60.0
# A process that was stopped itself finds its time over and the answer waiting.
_SECOND_LOOK_SECONDS = 0.5
# How long leaving the interpreter waits for a store that may not answer any more.
_LAST_SECONDS = 1.0


def default_coordinator(
    process_group: Any = None, timeout_seconds: float | None = None
) -> Coordinator:
    """Returns the coordinator of a process group of several ranks; else a single process's.

    Args:
        process_group: The group that saves and restores together; None for the default group. A
            sub-group is for replicas that checkpoint alone.
        timeout_seconds: How long to wait for another rank; None for the group's own timeout.
    """
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise errors.UsageError(
                "process_group was given, but torch.distributed is not initialised."
            )
        return SingleProcess()
    group = process_group or dist.group.WORLD
    if dist.get_rank(group) < 0:
        raise errors.UsageError(
            f"Rank {dist.get_rank()} is not in the process_group that was given; only the ranks of "
            "a group save and restore with it."
        )
    if dist.get_world_size(group) == 1:
        return SingleProcess(dist.get_rank())
    return StoreCoordinator(group, timeout_seconds=timeout_seconds)


def _timeout_of(group: Any) -> float:
    """Returns how long the collectives of a process group wait, in seconds."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if isinstance(timeout := getattr(options, "_timeout", None), datetime.timedelta):
            return timeout.total_seconds()
    return _TIMEOUT_SECONDS


def num_unjoined() -> int:
    """Returns the number of processes that a launcher started and no process group joins; or 1."""
    text = os.environ.get("WORLD_SIZE", "")
    if (dist.is_available() and dist.is_initialized()) or not (text.isascii() and text.isdigit()):
        return 1
    return int(text)


_meetings: weakref.WeakKeyDictionary[Any, Meeting] = weakref.WeakKeyDictionary()


class StoreCoordinator:
    """Ranks that meet in a key-value store; see `rounds` for how.

    Ranks are counted within the group, as `torch.distributed.get_rank(group)` does.

    Args:
        group: The process group.
        timeout_seconds: How long to wait for another rank; None for the group's own timeout.
    """

    def __init__(self, group: Any, *, timeout_seconds: float | None = None) -> None:
        self._setup(group, None, timeout_seconds or _timeout_of(group))

    def _setup(
        self,
        group: Any,
        prefix: str | None,
        timeout_seconds: float,
        ranks: tuple[int, ...] | None = None,
    ) -> None:
        ranks = tuple(range(dist.get_world_size(group))) if ranks is None else ranks
        self.rank = ranks.index(dist.get_rank(group))
        self.num_ranks = len(ranks)
        self.global_ranks = tuple(dist.get_global_rank(group, rank) for rank in ranks)
        self._ranks = ranks
        # The group keeps the store's server alive where this process hosts it.
        self._group = group
        self._timeout_seconds = timeout_seconds
        self._num_groups = 0
        self._num_named: dict[str, int] = {}
        self._turns: list[StoreTurns] = []
        store = _Store(group.get_group_store(), self.rank)
        if prefix is None:
            # Every rank makes its coordinators of a group in the same order.
            meeting = _meetings.setdefault(group, Meeting())
            name = meeting.next_name(store, self.rank, self.num_ranks, timeout_seconds)
            prefix = f"functional_ckpt/{name}"
        self._prefix = prefix
        store.enter(prefix)
        self._store = store
        self._rounds = Rounds(
            store, rank=self.rank, num_ranks=self.num_ranks, timeout_seconds=timeout_seconds
        )

    def gather_broadcast(self, what: str, value: bytes | BaseException, combine: Combine) -> bytes:
        """See `Coordinator.gather_broadcast`."""
        return self._rounds.gather_broadcast(what, value, combine)

    def background(self) -> Coordinator:
        """Returns a coordinator over a store connection of its own."""
        return self._other(f"{self._prefix}/background", self._ranks)

    def among(self, ranks: Sequence[int], name: str) -> Coordinator:
        """See `Coordinator.among`."""
        number = self._num_named[name] = self._num_named.get(name, 0) + 1
        chosen = tuple(self._ranks[rank] for rank in ranks)
        return self._other(f"{self._prefix}/among/{name}/{number}", chosen)

    def _other(self, prefix: str, ranks: tuple[int, ...]) -> Coordinator:
        other = StoreCoordinator.__new__(StoreCoordinator)
        other._setup(self._group, prefix, self._timeout_seconds, ranks)
        return other

    def channel(self) -> Channel:
        """See `Coordinator.channel`."""
        return gloo.GlooChannel(self._gloo_group())

    def link(self) -> Link:
        """See `Coordinator.link`."""
        return gloo.GlooLink(self._gloo_group(), self._ranks)

    def _gloo_group(self) -> Any:
        self._num_groups += 1
        prefix = f"{self._prefix}/channel/{self._num_groups}"
        store = dist.PrefixStore(prefix, _clone(self._group.get_group_store()))  # pyright: ignore[reportPrivateImportUsage]
        return gloo.connect(store, self.rank, self.num_ranks, self._timeout_seconds)

    def board(self, name: str) -> Board:
        """Returns a board over a store connection of its own."""
        store = _Store(self._group.get_group_store(), self.rank)
        store.enter(f"{self._prefix}/board/{name}")
        return StoreBoard(store, self._timeout_seconds)

    def turns(self, period_seconds: float, is_wanted: Callable[[], bool]) -> Turns:
        """See `Coordinator.turns`."""
        rounds = self._rounds  # and not self, which a dropped manager drops
        member = Member(
            self._store,
            f"turns/{len(self._turns)}",
            rank=self.rank,
            num_ranks=self.num_ranks,
            timeout_seconds=lambda: rounds.timeout_seconds,
            period_seconds=period_seconds,
            is_wanted=is_wanted,
        )
        turns = StoreTurns(member)
        self._turns.append(turns)
        return turns

    def shorten_timeout(self, seconds: float) -> None:
        """Shortens the timeout."""
        self._timeout_seconds = min(self._timeout_seconds, seconds)
        self._rounds.shorten_timeout(seconds)

    def close(self) -> None:
        """See `Coordinator.close`."""
        if self._rounds.close():
            self._store.delete_soon([key for turns in self._turns for key in turns.last_keys()])


class _Store:
    """A clone of a torch store whose every call returns or raises in time.

    A TCPStore's client waits for an answer as long as it takes, whatever its timeout says: if the
    host is stopped or unreachable, it would hang forever.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self._calls = _Calls()
        self._rank = rank
        self._store = self._call(_clone, store, seconds=_CONNECT_SECONDS)
        # Not every kind of store can get several keys at once.
        self._is_extended: bool = getattr(self._store, "has_extended_api", bool)()

    def enter(self, prefix: str) -> None:
        """From now on all keys are below `prefix`."""
        self._store = dist.PrefixStore(prefix, self._store)  # pyright: ignore[reportPrivateImportUsage]

    def set(self, key: str, value: bytes, seconds: float) -> None:
        """Sets a key."""
        self._call(self._store.set, key, value, seconds=seconds)

    def set_unless(self, key: str, value: bytes, other: str, seconds: float) -> bool:
        """Sets a key if it does not exist; returns whether it did."""
        store: Any = self._store

        def attempt() -> bool:
            if store.check([other]):
                return False
            store.set(key, value)
            return True

        return bool(self._call(attempt, seconds=seconds))

    def set_if_absent(self, key: str, value: bytes, seconds: float) -> bytes:
        """Sets a key if it does not exist; returns its value. An empty one counts as none."""
        return bytes(self._call(self._store.compare_set, key, "", value, seconds=seconds))

    def set_soon(self, key: str, value: bytes) -> None:
        """Sets a key before the next request; if that fails, so will the next request."""
        self._calls.start(self._store.set, (key, value))

    def get(self, keys: Sequence[str], seconds: float) -> list[bytes]:
        """Returns the values of existing keys, in one round trip if the store supports it."""
        if self._is_extended:
            found = self._call(self._store.multi_get, list(keys), seconds=seconds)
            return [bytes(value) for value in found]
        return [bytes(self._call(self._store.get, key, seconds=seconds)) for key in keys]

    def has(self, keys: Sequence[str], seconds: float) -> bool:
        """Returns whether all the keys exist."""
        return bool(self._call(self._store.check, list(keys), seconds=seconds))

    def delete_soon(self, keys: Sequence[str]) -> None:
        """Deletes keys, where the kind of store can; elsewhere they stay: a few bytes."""
        store = self._store

        def attempt() -> None:
            for key in keys:
                store.delete_key(key)

        self._calls.start(attempt, ())

    def _call(self, function: Callable[..., Any], *args: Any, seconds: float) -> Any:
        try:
            return self._calls.call(function, args, seconds)
        except futures.CancelledError:
            raise errors.CoordinationTimeoutError(
                f"The store of the process group did not answer within {seconds:.3g} seconds: "
                f"{self._host}",
                ranks=self._suspects,
            ) from None
        except (dist.DistError, ConnectionError) as error:
            summary = str(error).partition("\n")[0].removesuffix(".")
            raise errors.CoordinationError(
                f"The store of the process group failed: {summary}. {self._host}",
                ranks=self._suspects,
            ) from error

    @property
    def _host(self) -> str:
        return (
            "The process that hosts it (rank 0, unless the launcher does) may have crashed or hung."
        )

    @property
    def _suspects(self) -> tuple[int, ...]:
        return (0,) if self._rank else ()


_Request: TypeAlias = "tuple[futures.Future[Any], Callable[..., Any], tuple[Any, ...]]"


class _Calls:
    """A thread that makes calls for others, who need not wait for them to end."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        # A daemon, since one that is stuck in a call could never be joined.
        thread = threading.Thread(
            target=_serve, args=(self._requests,), name="store-calls", daemon=True
        )
        thread.start()
        _servers[thread] = self._requests
        weakref.finalize(self, self._requests.put, None)

    def start(self, function: Callable[..., Any], args: tuple[Any, ...]) -> futures.Future[Any]:
        """Makes a call after those before."""
        future: futures.Future[Any] = futures.Future()
        self._requests.put((future, function, args))
        return future

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> Any:
        """Returns the result; `CancelledError` when there is none in time."""
        future = self.start(function, args)
        for patience in (seconds, _SECOND_LOOK_SECONDS):
            with contextlib.suppress(TimeoutError):
                return future.result(patience)
            if future.done():
                return future.result()
        future.cancel()  # a call queued behind a hanging one never starts
        raise futures.CancelledError


_servers: weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue[_Request | None]] = (
    weakref.WeakKeyDictionary()
)


@atexit.register
def _finish() -> None:
    """A thread that came back from a store into a dead interpreter would abort the process."""
    servers = list(_servers.items())
    for _, requests in servers:
        requests.put(None)
    for thread, _ in servers:
        thread.join(_LAST_SECONDS)


def _serve(requests: queue.SimpleQueue[_Request | None]) -> None:
    while (request := requests.get()) is not None:
        future, function, args = request
        if future.set_running_or_notify_cancel():
            try:
                result = function(*args)
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)
            else:
                future.set_result(result)
        del request, future, function, args


def _clone(store: Any) -> Any:
    """Returns a store object with a connection of its own, where the kind of store has such."""
    clone: Callable[[], Any] | None = getattr(store, "clone", None)
    if clone is None:
        return store
    try:
        cloned = clone()
    except dist.DistError:
        raise
    except RuntimeError:  # this kind of store has no connections
        return store
    cloned.set_timeout(datetime.timedelta(seconds=_CONNECT_SECONDS))
    return cloned
