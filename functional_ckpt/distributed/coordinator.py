"""How the ranks of a job agree: the protocol, and the coordinator of a single process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

__all__ = [
    "Bytes",
    "Channel",
    "Combine",
    "Coordinator",
    "SingleProcess",
    "run_on_primary",
    "run_on_all",
]

Combine: TypeAlias = Callable[[Sequence[bytes]], bytes]
Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"


class Channel(Protocol):
    """A way for large data between ranks; made when it is needed."""

    def all_to_all(self, outgoing: Sequence[Bytes], incoming_bytes: Sequence[int]) -> list[Bytes]:
        """Every rank hands every rank something; all make the same calls.

        Args:
            outgoing: One-dimensional; for each rank, itself included.
            incoming_bytes: How much comes from each rank.

        Returns:
            What came from each rank.

        Raises:
            CoordinationError: Another rank is gone, or did not come in time.
        """
        ...

    def close(self) -> None:
        """Ends it; whoever still waits in `all_to_all` gets an error."""
        ...


@runtime_checkable
class Coordinator(Protocol):
    """What a checkpoint needs of a group of processes: one kind of round trip.

    Its cost does not grow with the number of leaves: a save takes the same few rounds whatever it
    saves.
    """

    @property
    def rank(self) -> int:
        """This process, counted from zero; the primary is rank 0."""
        ...

    @property
    def num_ranks(self) -> int:
        """Processes that save and restore together."""
        ...

    @property
    def global_ranks(self) -> tuple[int, ...]:
        """The ranks of the whole job that these processes are, in order."""
        ...

    def gather_broadcast(self, what: str, value: bytes | BaseException, combine: Combine) -> bytes:
        """Every rank gives a value, the primary combines them, every rank gets the outcome.

        All ranks make the same calls in the same order.

        Args:
            what: What the ranks are about, for messages.
            value: This rank's value; or the error that kept it from having one.
            combine: Called on the primary with the values in order of rank; what it does there is
                done before any rank goes on.

        Raises:
            CoordinationError: Another rank gave an error, or `combine` failed on the primary; of
                the class of that error as well, if it is one of `errors`.
            CoordinationTimeoutError: A rank did not come.
            BaseException: The error that this rank itself gave.
        """
        ...

    def background(self) -> Coordinator:
        """The same group for another thread: the two never wait for each other."""
        ...

    def channel(self) -> Channel:
        """A channel between the ranks; every rank makes it."""
        ...

    def shorten_timeout(self, seconds: float) -> None:
        """Waits no longer than this from now on, since peers may be about to die.

        Signal handlers may call it.
        """
        ...

    def close(self) -> None:
        """The last call: others may still be reading what this process said last, or hosts."""
        ...


class SingleProcess:
    """The coordinator of one process: there is nobody to wait for.

    Args:
        global_rank: Its rank in the whole job.
    """

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
        """Itself."""
        return self

    def channel(self) -> Channel:
        """One that leads back to itself."""
        return _Loop()

    def shorten_timeout(self, seconds: float) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class _Loop:
    def all_to_all(self, outgoing: Sequence[Bytes], incoming_bytes: Sequence[int]) -> list[Bytes]:
        del incoming_bytes
        return list(outgoing)

    def close(self) -> None:
        pass


def run_on_all(coordinator: Coordinator, what: str, action: Callable[[], object]) -> None:
    """Every rank does something; then all go on, or all raise."""
    run_on_primary(coordinator, what, lambda: None, prepare=action)


def run_on_primary(
    coordinator: Coordinator,
    what: str,
    action: Callable[[], object],
    *,
    prepare: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Every rank gets ready; when all are, the primary does something while the others wait.

    Args:
        coordinator: How they wait.
        what: What it is, for messages.
        action: What the primary does.
        prepare: What every rank does first.
        after: What the others do when it is done.
    """

    def act(_: Sequence[bytes]) -> bytes:
        action()
        return b""

    value: bytes | BaseException = b""
    try:
        prepare()
    except Exception as error:  # noqa: BLE001 - the other ranks must hear of it before it is raised here
        value = error
    coordinator.gather_broadcast(what, value, act)
    if coordinator.rank:
        after()
