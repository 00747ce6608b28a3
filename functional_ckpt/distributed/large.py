"""Values of any size over a coordinator, in pieces: a store of the ranks refuses large messages."""

from __future__ import annotations

import json
from collections.abc import Sequence

from functional_ckpt.distributed.coordinator import Coordinator

_PIECE_BYTES = 2**22  # a TCPStore closes the connection after a message of 8 MiB


def gather(group: Coordinator, what: str, value: bytes | BaseException) -> list[bytes]:
    """Returns on the primary the value of every rank, in order of rank; elsewhere nothing.

    Args:
        group: The ranks, all of which call.
        what: Name of the operation, for messages.
        value: This rank's value; or the error that it failed with, which is raised on every rank.
    """
    found = [bytearray() for _ in range(group.num_ranks)]
    rest = value if isinstance(value, BaseException) else memoryview(value)

    def combine(pieces: Sequence[bytes]) -> bytes:
        for whole, piece in zip(found, pieces, strict=True):
            whole += piece[1:]
        return b"1" if any(piece[:1] == b"1" for piece in pieces) else b""

    while True:
        if isinstance(rest, BaseException):
            group.gather_broadcast(what, rest, combine)
            raise rest
        more = b"1" if len(rest) > _PIECE_BYTES else b"0"
        piece, rest = more + bytes(rest[:_PIECE_BYTES]), rest[_PIECE_BYTES:]
        if not group.gather_broadcast(what, piece, combine):
            return [bytes(each) for each in found] if group.rank == 0 else []


def broadcast(group: Coordinator, what: str, value: bytes | BaseException) -> bytes:
    """Returns the primary's value on every rank.

    Args:
        group: The ranks, all of which call.
        what: Name of the operation, for messages.
        value: The primary's value; or the error that this rank failed with, which is raised on
            every rank.
    """
    whole = bytearray()
    start = 0

    def combine(_: Sequence[bytes]) -> bytes:
        assert isinstance(value, bytes)  # noqa: S101 - an error does not come here
        piece = value[start : start + _PIECE_BYTES]
        return (b"1" if start + _PIECE_BYTES < len(value) else b"0") + piece

    while True:
        given = value if isinstance(value, BaseException) else b""
        piece = group.gather_broadcast(what, given, combine)
        whole += piece[1:]
        start += _PIECE_BYTES
        if piece[:1] == b"0":
            return bytes(whole)


def exchange(group: Coordinator, what: str, value: bytes | BaseException) -> list[bytes]:
    """Returns the value of every rank on every rank; see `gather`."""
    values = gather(group, what, value)
    sizes = json.dumps([len(each) for each in values]).encode()
    joined = broadcast(group, what, sizes + b"\n" + b"".join(values))
    header, _, data = joined.partition(b"\n")
    found: list[bytes] = []
    for size in json.loads(header):
        found.append(data[:size])
        data = data[size:]
    return found
