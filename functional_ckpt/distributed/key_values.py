"""The key-value store of the ranks, and how to wait for its keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

# How much longer the others wait than the primary, so that its verdict reaches them first.
GRACE_SECONDS = 2.0
# One server answers every rank: thousands of them must poll less often.
_FIRST_PAUSE_SECONDS, _FIRST_POLLS_PER_SECOND = 0.0002, 50_000
_LONGEST_PAUSE_SECONDS, _POLLS_PER_SECOND = 0.05, 20_000


class KeyValueStore(Protocol):
    """The interface of a store; every call returns or raises within `seconds`."""

    def set(self, key: str, value: bytes, seconds: float) -> None:
        """Sets a key."""
        ...

    def set_unless(self, key: str, value: bytes, other: str, seconds: float) -> bool:
        """Sets a key if it does not exist; returns whether it did."""
        ...

    def set_if_absent(self, key: str, value: bytes, seconds: float) -> bytes:
        """Sets a key if it does not exist, in one indivisible step; returns its value then."""
        ...

    def set_soon(self, key: str, value: bytes) -> None:
        """Sets a key before the next request, without waiting for it."""
        ...

    def get(self, keys: Sequence[str], seconds: float) -> list[bytes]:
        """Returns the values of existing keys."""
        ...

    def has(self, keys: Sequence[str], seconds: float) -> bool:
        """Returns whether all the keys exist."""
        ...

    def delete_soon(self, keys: Sequence[str]) -> None:
        """Deletes keys before the next request, without waiting for it."""
        ...


def pauses(num_ranks: int) -> Iterator[float]:
    """Yields the seconds between polls of each of the ranks: short ones first."""
    pause = max(_FIRST_PAUSE_SECONDS, num_ranks / _FIRST_POLLS_PER_SECOND)
    longest = max(_LONGEST_PAUSE_SECONDS, num_ranks / _POLLS_PER_SECOND)
    while True:
        yield pause
        pause = min(2 * pause, longest)


def wait_for(
    store: KeyValueStore, keys: Sequence[str], seconds: Callable[[], float], num_ranks: int
) -> bool:
    """Returns whether the keys existed in time; polls, since a store's wait cannot be cancelled.

    `seconds` returns how long to wait from the start; it is asked after each poll.
    """
    start = time.monotonic()
    for pause in pauses(num_ranks):
        rest = start + seconds() - time.monotonic()
        if store.has(keys, max(rest, GRACE_SECONDS)):
            return True
        if rest <= 0:
            return False
        time.sleep(min(pause, rest))
    return False


class StoreBoard:
    """A `Board` over a store of the ranks.

    A `get` would wait for a value that is dropped at that moment.
    """

    def __init__(self, store: KeyValueStore, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._store = store

    def put(self, key: str, value: bytes) -> None:
        """See `Board.put`."""
        self._store.set(key, value, self.timeout_seconds)

    def get(self, key: str) -> bytes | None:
        """See `Board.get`."""
        if not self._store.has([key], self.timeout_seconds):
            return None
        return self._store.get([key], self.timeout_seconds)[0]

    def put_if_absent(self, key: str, value: bytes) -> bytes:
        """See `Board.put_if_absent`."""
        return self._store.set_if_absent(key, value, self.timeout_seconds)

    def drop(self, key: str) -> None:
        """See `Board.drop`."""
        self._store.delete_soon([key])
