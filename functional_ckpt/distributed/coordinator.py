"""How the ranks of a job agree: the protocol, and the coordinator of a single process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

__all__ = ["Coordinator", "SingleProcess"]


@runtime_checkable
class Coordinator(Protocol):
    """What a checkpoint needs of a process group.

    Every method that waits takes a key that is unique to the call and the same on every rank. A
    rank that fails calls `fail`, and every rank that waits raises `CoordinationError` naming it.
    """

    @property
    def rank(self) -> int:
        """This process, counted from zero."""
        ...

    @property
    def num_ranks(self) -> int:
        """Processes that save and restore together."""
        ...

    def barrier(self, key: str) -> None:
        """Waits until every rank has come here."""
        ...

    def broadcast(self, key: str, value: bytes | None) -> bytes:
        """The primary's value, on every rank."""
        ...

    def gather(self, key: str, value: bytes) -> Sequence[bytes] | None:
        """Every rank's value on the primary, in order; None on the others."""
        ...

    def fail(self, key: str, error: BaseException) -> None:
        """Tells the ranks waiting at `key` that this one failed."""
        ...


class SingleProcess:
    """The coordinator of one process: there is nobody to wait for."""

    rank = 0
    num_ranks = 1

    def barrier(self, key: str) -> None:
        """Returns at once."""

    def broadcast(self, key: str, value: bytes | None) -> bytes:
        """Returns the value."""
        return value if value is not None else b""

    def gather(self, key: str, value: bytes) -> Sequence[bytes] | None:
        """Returns the value alone."""
        return [value]

    def fail(self, key: str, error: BaseException) -> None:
        """Does nothing: the error is raised here anyway."""
