"""A coordinator that counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from functional_ckpt.distributed.coordinator import (
    Board,
    Channel,
    Combine,
    Coordinator,
    Link,
    Turns,
)


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

    def link(self) -> Link:
        return self._inner.link()

    def among(self, ranks: Sequence[int], name: str) -> Coordinator:
        return Counting(self._inner.among(ranks, name), self._rounds)

    def board(self, name: str) -> Board:
        return self._inner.board(name)

    def turns(self, period_seconds: float, is_wanted: Callable[[], bool]) -> Turns:
        return self._inner.turns(period_seconds, is_wanted)

    def shorten_timeout(self, seconds: float) -> None:
        self._inner.shorten_timeout(seconds)

    def close(self) -> None:
        self._inner.close()
