"""Ranks as threads of one process, over a key-value store in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from functional_ckpt.distributed.coordinator import (
    Board,
    Bytes,
    Channel,
    Combine,
    Coordinator,
    Link,
    Turns,
)
from functional_ckpt.distributed.key_values import KeyValueStore, StoreBoard
from functional_ckpt.distributed.peer_link import MemoryLinks
from functional_ckpt.distributed.rounds import Rounds
from functional_ckpt.distributed.turns import Member, StoreTurns


class MemoryStore:
    """A key-value store that counts its requests."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self.values: dict[str, bytes] = {}
        self.num_writes = 0
        self._links: dict[str, MemoryLinks] = {}

    def links(self, name: str, timeout_seconds: float) -> MemoryLinks:
        """Returns the links of this name."""
        with self._mutex:
            return self._links.setdefault(name, MemoryLinks(timeout_seconds))

    def lose(self, rank: int) -> None:
        """Lets everyone fail who waits for data of a rank, as it is counted in each link."""
        with self._mutex:
            every = list(self._links.values())
        for links in every:
            links.lose(rank)

    def set(self, key: str, value: bytes, seconds: float) -> None:
        with self._mutex:
            self.num_writes += 1
            self.values[key] = value

    def set_unless(self, key: str, value: bytes, other: str, seconds: float) -> bool:
        with self._mutex:
            if other in self.values:
                return False
            self.num_writes += 1
            self.values[key] = value
            return True

    def set_if_absent(self, key: str, value: bytes, seconds: float) -> bytes:
        with self._mutex:
            self.num_writes += 1
            return self.values.setdefault(key, value)

    def set_soon(self, key: str, value: bytes) -> None:
        self.set(key, value, 1.0)

    def get(self, keys: Sequence[str], seconds: float) -> list[bytes]:
        with self._mutex:
            return [self.values[key] for key in keys]

    def has(self, keys: Sequence[str], seconds: float) -> bool:
        with self._mutex:
            return all(key in self.values for key in keys)

    def delete_soon(self, keys: Sequence[str]) -> None:
        with self._mutex:
            self.num_writes += len(keys)
            for key in keys:
                self.values.pop(key, None)


class _Under:
    """A store whose keys are below a prefix."""

    def __init__(self, store: KeyValueStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def set(self, key: str, value: bytes, seconds: float) -> None:
        self._store.set(self._key(key), value, seconds)

    def set_unless(self, key: str, value: bytes, other: str, seconds: float) -> bool:
        return self._store.set_unless(self._key(key), value, self._key(other), seconds)

    def set_if_absent(self, key: str, value: bytes, seconds: float) -> bytes:
        return self._store.set_if_absent(self._key(key), value, seconds)

    def set_soon(self, key: str, value: bytes) -> None:
        self._store.set_soon(self._key(key), value)

    def get(self, keys: Sequence[str], seconds: float) -> list[bytes]:
        return self._store.get([self._key(key) for key in keys], seconds)

    def has(self, keys: Sequence[str], seconds: float) -> bool:
        return self._store.has([self._key(key) for key in keys], seconds)

    def delete_soon(self, keys: Sequence[str]) -> None:
        self._store.delete_soon([self._key(key) for key in keys])


class ThreadCoordinator:
    """One rank among threads that share a `MemoryStore`; made by `run_ranks`."""

    def __init__(
        self,
        store: MemoryStore,
        rank: int,
        num_ranks: int,
        *,
        timeout_seconds: float = 30.0,
        prefix: str = "group",
        global_ranks: Sequence[int] | None = None,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.global_ranks = tuple(range(num_ranks) if global_ranks is None else global_ranks)
        self._store = store
        self._prefix = prefix
        self._timeout_seconds = timeout_seconds
        self._num_others = 0
        self._num_named: dict[str, int] = {}
        self._turns: list[StoreTurns] = []
        self._rounds = Rounds(
            _Under(store, prefix), rank=rank, num_ranks=num_ranks, timeout_seconds=timeout_seconds
        )

    def _name(self, what: str) -> str:
        self._num_others += 1
        return f"{self._prefix}/{what}{self._num_others}"

    def gather_broadcast(self, what: str, value: bytes | BaseException, combine: Combine) -> bytes:
        return self._rounds.gather_broadcast(what, value, combine)

    def background(self) -> Coordinator:
        return self._other(self.global_ranks, self._name("background"))

    def among(self, ranks: Sequence[int], name: str) -> Coordinator:
        number = self._num_named[name] = self._num_named.get(name, 0) + 1
        chosen = tuple(self.global_ranks[rank] for rank in ranks)
        return self._other(chosen, f"{self._prefix}/among/{name}/{number}")

    def _other(self, ranks: tuple[int, ...], prefix: str) -> Coordinator:
        return ThreadCoordinator(
            self._store,
            ranks.index(self.global_ranks[self.rank]),
            len(ranks),
            timeout_seconds=self._timeout_seconds,
            prefix=prefix,
            global_ranks=ranks,
        )

    def link(self) -> Link:
        return self._store.links(self._name("link"), self._timeout_seconds).link(self.rank)

    def channel(self) -> Channel:
        return _Exchange(self.background())

    def board(self, name: str) -> Board:
        return StoreBoard(_Under(self._store, f"{self._prefix}/board/{name}"), 30.0)

    def turns(self, period_seconds: float, is_wanted: Callable[[], bool]) -> Turns:
        rounds = self._rounds
        member = Member(
            _Under(self._store, self._prefix),
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
        self._rounds.shorten_timeout(seconds)

    def close(self) -> None:
        self._rounds.close()


class _Exchange:
    """A channel over rounds."""

    def __init__(self, group: Coordinator) -> None:
        self._group = group

    def all_to_all(self, outgoing: Sequence[Bytes], incoming_bytes: Sequence[int]) -> list[Bytes]:
        num_ranks, rank = self._group.num_ranks, self._group.rank
        mine = b"".join(len(each).to_bytes(8, "little") + each.tobytes() for each in outgoing)
        joined = self._group.gather_broadcast(
            "all to all",
            mine,
            lambda values: b"".join(len(v).to_bytes(8, "little") + v for v in values),
        )
        found: list[Bytes] = []
        for part in _split(joined, num_ranks):
            found.append(np.frombuffer(_split(part, num_ranks)[rank], np.uint8).copy())
        assert [len(each) for each in found] == list(incoming_bytes)
        return found

    def close(self) -> None:
        pass


def _split(data: bytes, count: int) -> list[bytes]:
    parts: list[bytes] = []
    for _ in range(count):
        size = int.from_bytes(data[:8], "little")
        parts.append(data[8 : 8 + size])
        data = data[8 + size :]
    return parts


def run_ranks(
    num_ranks: int, job: Callable[[ThreadCoordinator], Any], *, timeout_seconds: float = 30.0
) -> list[Any]:
    """Runs a job on each of several ranks; returns its results, or its exceptions."""
    store = MemoryStore()
    groups = [
        ThreadCoordinator(store, rank, num_ranks, timeout_seconds=timeout_seconds)
        for rank in range(num_ranks)
    ]
    with futures.ThreadPoolExecutor(num_ranks) as pool:
        jobs = [pool.submit(job, group) for group in groups]
    return [each.exception() or each.result() for each in jobs]


def results(found: Sequence[Any]) -> list[Any]:
    """Returns the results of `run_ranks`; raises the first exception."""
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return list(found)
