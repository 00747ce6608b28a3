"""A store in memory, and a coordinator that counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from functional_ckpt.distributed.coordinator import Board, Channel, Combine, Coordinator, Turns


class MemoryStore:
    """A key-value store that counts its requests."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self.values: dict[str, bytes] = {}
        self.num_writes = 0

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


class Counting:
    """A coordinator that records the names of its rounds."""

    def __init__(self, inner: Coordinator, rounds: list[tuple[str, int]]) -> None:
        self._inner = inner
        self._rounds = rounds
        self.rank = inner.rank
        self.num_ranks = inner.num_ranks
        self.global_ranks = inner.global_ranks

    def gather_broadcast(self, what: str, value: bytes | BaseException, combine: Combine) -> bytes:
        self._rounds.append((what, len(value) if isinstance(value, bytes) else 0))
        return self._inner.gather_broadcast(what, value, combine)

    def background(self) -> Coordinator:
        return Counting(self._inner.background(), self._rounds)

    def channel(self) -> Channel:
        return self._inner.channel()

    def board(self, name: str) -> Board:
        return self._inner.board(name)

    def turns(self, period_seconds: float, is_wanted: Callable[[], bool]) -> Turns:
        return self._inner.turns(period_seconds, is_wanted)

    def shorten_timeout(self, seconds: float) -> None:
        self._inner.shorten_timeout(seconds)

    def close(self) -> None:
        self._inner.close()
