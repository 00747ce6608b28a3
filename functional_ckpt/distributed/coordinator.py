"""Coordination between ranks: the protocol, and the coordinator of a single process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from functional_ckpt import errors

Combine: TypeAlias = Callable[[Sequence[bytes]], bytes]
Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"


class Channel(Protocol):
    """Exchanges large data between ranks; made when it is needed."""

    def all_to_all(self, outgoing: Sequence[Bytes], incoming_bytes: Sequence[int]) -> list[Bytes]:
        """Sends data from every rank to every rank; all ranks make the same calls.

        Args:
            outgoing: One-dimensional arrays, one for each rank, this one included.
            incoming_bytes: The size of the data from each rank.

        Returns:
            The data from each rank.

        Raises:
            CoordinationError: Another rank has ended, or did not arrive in time.
        """
        ...

    def close(self) -> None:
        """Closes the channel; a pending `all_to_all` raises."""
        ...


class Transfer(Protocol):
    """Data on its way between two ranks."""

    def wait(self) -> None:
        """Returns once the data has arrived, or has been read from the sender's memory.

        Raises:
            CoordinationError: The other rank has ended, or did not take part in time. Then no other
                data can be exchanged with it.
        """
        ...


class Link(Protocol):
    """Sends data from one rank to another; other ranks take no part. Safe to use from any thread.

    Data of one sender, receiver and tag arrives in the order in which it was sent. Streams that are
    under way at the same time have different tags. Memory is in use until `Transfer.wait` returns.
    """

    def send(self, rank: int, data: Bytes, tag: int = 0) -> Transfer:
        """Starts to send one-dimensional data, of at most 2 GiB, to a rank."""
        ...

    def receive(self, rank: int, into: Bytes, tag: int = 0) -> Transfer:
        """Starts to receive data of exactly this size from a rank."""
        ...

    def close(self) -> None:
        """Ends it; other ranks whose data was not exchanged get a `CoordinationError`."""
        ...


class Turns(Protocol):
    """The steps that the ranks ask about: all the same ones in the same order, not in lockstep."""

    def enter(self, step: int) -> bool:
        """Enters a step, a new turn unless it is the last one; returns whether a round is due.

        Then the caller makes one with all ranks, which are at the same step, and calls `finish`.

        Raises:
            CoordinationError: The ranks cannot agree on rounds any more.
        """
        ...

    def finish(self) -> None:
        """Ends the round, also one that failed."""
        ...

    def wake(self) -> None:
        """Looks at once whether this rank asks for a round; signal handlers may call it."""
        ...

    def close(self) -> None:
        """Enters no other turn."""
        ...


class Board(Protocol):
    """Small values that ranks leave for each other, by key. Safe to use from any thread.

    Its methods raise `CoordinationError` once the ranks cannot reach each other.
    """

    @property
    def timeout_seconds(self) -> float:
        """How long to wait for a sign of another rank."""
        ...

    def put(self, key: str, value: bytes) -> None:
        """Writes a value, instead of an earlier one."""
        ...

    def get(self, key: str) -> bytes | None:
        """Returns a value; None if none was written."""
        ...

    def put_if_absent(self, key: str, value: bytes) -> bytes:
        """Writes a value unless there is one; returns the value that all ranks then find."""
        ...

    def drop(self, key: str) -> None:
        """Removes a value for which no rank asks any more, without waiting for it."""
        ...


@runtime_checkable
class Coordinator(Protocol):
    """The collectives of a group of processes: one kind of round trip.

    A save takes the same few rounds, however many leaves it has.
    """

    @property
    def rank(self) -> int:
        """The rank of this process; the primary is rank 0."""
        ...

    @property
    def num_ranks(self) -> int:
        """The number of processes that save and restore together."""
        ...

    @property
    def global_ranks(self) -> tuple[int, ...]:
        """The global ranks of these processes, in order."""
        ...

    def gather_broadcast(self, what: str, value: bytes | BaseException, combine: Combine) -> bytes:
        """Combines a value of every rank on the primary and returns the result on every rank.

        All ranks make the same calls in the same order. `collective` is the usual way to call it.

        Args:
            what: Name of the operation, for messages.
            value: This rank's value; or the error that it failed with.
            combine: Called on the primary with the values in order of rank, before any rank
                continues.

        Raises:
            CoordinationError: Another rank gave an error, or `combine` failed on the primary; of
                the class of that error as well, if it is one of `errors`.
            CoordinationTimeoutError: A rank did not arrive in time.
            BaseException: The error that this rank itself gave.
        """
        ...

    def background(self) -> Coordinator:
        """Returns a coordinator of the same group for another thread."""
        ...

    def channel(self) -> Channel:
        """Returns a channel between the ranks; every rank makes one."""
        ...

    def link(self) -> Link:
        """Returns a link between the ranks; every rank makes one."""
        ...

    def among(self, ranks: Sequence[int], name: str) -> Coordinator:
        """Returns a coordinator of some of the ranks, which are counted from 0 in the given order.

        Only these ranks call it, all with the same arguments, and close it.

        Args:
            ranks: Ranks of this coordinator, this one included.
            name: Its purpose; another call with this name returns another coordinator.
        """
        ...

    def board(self, name: str) -> Board:
        """Returns the board of this name; only ranks that use it call this."""
        ...

    def turns(self, period_seconds: float, is_wanted: Callable[[], bool]) -> Turns:
        """Returns turns with rounds only when a rank asks for one; all ranks call it.

        Args:
            period_seconds: The time between two looks whether a rank asks for a round.
            is_wanted: Returns whether this rank asks for one; called in another thread.
        """
        ...

    def shorten_timeout(self, seconds: float) -> None:
        """Lowers the timeout, waits in progress included, when peers may be about to end.

        Signal handlers may call it.
        """
        ...

    def close(self) -> None:
        """Ends this process's part, once the other ranks have read its last values."""
        ...


class SingleProcess:
    """The coordinator of a process that saves alone."""

    rank = 0
    num_ranks = 1

    def __init__(self, global_rank: int = 0) -> None:
        self.global_ranks = (global_rank,)

    def gather_broadcast(self, what: str, value: bytes | BaseException, combine: Combine) -> bytes:
        """Combines the one value."""
        del what
        if isinstance(value, BaseException):
            raise value
        return combine([value])

    def background(self) -> Coordinator:
        """Returns itself."""
        return self

    def channel(self) -> Channel:
        """Returns a channel that returns the sent data."""
        return _Loop()

    def link(self) -> Link:
        """Returns a link without another rank."""
        return _NoOthers()

    def among(self, ranks: Sequence[int], name: str) -> Coordinator:
        """Returns itself."""
        del ranks, name
        return self

    def board(self, name: str) -> Board:
        """Returns an empty board, which no other rank reads."""
        del name
        return MemoryBoard()

    def turns(self, period_seconds: float, is_wanted: Callable[[], bool]) -> Turns:
        """Returns turns in which a round, which costs nothing, is always due."""
        del period_seconds, is_wanted
        return _EveryTurn()

    def shorten_timeout(self, seconds: float) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class MemoryBoard:
    """A board of threads of one process."""

    timeout_seconds = 60.0

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        """See `Board.put`."""
        self._values[key] = value

    def get(self, key: str) -> bytes | None:
        """See `Board.get`."""
        return self._values.get(key)

    def put_if_absent(self, key: str, value: bytes) -> bytes:
        """See `Board.put_if_absent`."""
        return self._values.setdefault(key, value)

    def drop(self, key: str) -> None:
        """See `Board.drop`."""
        self._values.pop(key, None)


class _EveryTurn:
    def enter(self, step: int) -> bool:
        del step
        return True

    def finish(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Loop:
    def all_to_all(self, outgoing: Sequence[Bytes], incoming_bytes: Sequence[int]) -> list[Bytes]:
        del incoming_bytes
        return list(outgoing)

    def close(self) -> None:
        pass


class _NoOthers:
    def send(self, rank: int, data: Bytes, tag: int = 0) -> Transfer:
        raise errors.UsageError(f"There is no rank {rank}: this process is alone.")

    def receive(self, rank: int, into: Bytes, tag: int = 0) -> Transfer:
        raise errors.UsageError(f"There is no rank {rank}: this process is alone.")

    def close(self) -> None:
        pass
