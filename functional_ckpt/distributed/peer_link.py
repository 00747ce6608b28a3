"""Streams and messages over a `Link`, in pieces, with bounded memory; and links between threads.

Both sides of a stream know its size. A sender that cannot read its data sends other bytes in place
of them, and a receiver that cannot store them drops them, so that the next stream is not disturbed:
the caller compares digests.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import Bytes, Link, Transfer

PIECE_BYTES = 16 * 2**20
_NUM_PIECES = 2
"""How many pieces of a stream are on their way at a time; each has a buffer on both sides."""
_LENGTH_BYTES = 8


def send_stream(
    link: Link,
    rank: int,
    num_bytes: int,
    fill: Callable[[memoryview, int], None],
    *,
    tag: int = 0,
    before: Callable[[int], None] = lambda _: None,
) -> None:
    """Sends data to a rank, which calls `receive_stream` for it.

    Args:
        link: The link.
        rank: The receiver.
        num_bytes: The size of the data.
        fill: Called with memory for each piece, and the offset of the piece in the data.
        tag: The number of the stream.
        before: Called with the size of each piece before it is sent; may wait.

    Raises:
        CoordinationError: The receiver is gone.
    """
    pending: collections.deque[tuple[Transfer, Bytes]] = collections.deque()
    for offset, size in _pieces(num_bytes):
        if len(pending) < _NUM_PIECES:
            buffer = np.empty(size, np.uint8)
        else:
            transfer, buffer = pending.popleft()
            transfer.wait()
        piece = buffer[:size]
        fill(piece.data, offset)
        before(size)
        pending.append((link.send(rank, piece, tag), buffer))
    for transfer, _ in pending:
        transfer.wait()


def receive_stream(
    link: Link,
    rank: int,
    num_bytes: int,
    take: Callable[[memoryview, int], None],
    *,
    tag: int = 0,
) -> None:
    """Receives the data of a rank's `send_stream`.

    Args:
        link: The link.
        rank: The sender.
        num_bytes: The size of the data.
        take: Called with each piece, which is overwritten after the call, and its offset.
        tag: The number of the stream.

    Raises:
        CoordinationError: The sender is gone.
    """
    pending: collections.deque[tuple[Transfer, Bytes, int, int]] = collections.deque()

    def take_one() -> Bytes:
        transfer, buffer, offset, size = pending.popleft()
        transfer.wait()
        take(buffer[:size].data, offset)
        return buffer

    for offset, size in _pieces(num_bytes):
        buffer = np.empty(size, np.uint8) if len(pending) < _NUM_PIECES else take_one()
        pending.append((link.receive(rank, buffer[:size], tag), buffer, offset, size))
    while pending:
        take_one()


def send_message(link: Link, rank: int, message: bytes, *, tag: int = 0) -> None:
    """Sends bytes to a rank, which calls `receive_message` for them."""
    length = np.frombuffer(bytearray(len(message).to_bytes(_LENGTH_BYTES)), np.uint8)
    sent = link.send(rank, length, tag)

    def fill(piece: memoryview, offset: int) -> None:
        piece[:] = message[offset : offset + len(piece)]

    send_stream(link, rank, len(message), fill, tag=tag)
    sent.wait()


def receive_message(link: Link, rank: int, *, tag: int = 0) -> bytes:
    """Returns the bytes of a rank's `send_message`."""
    length = np.empty(_LENGTH_BYTES, np.uint8)
    link.receive(rank, length, tag).wait()
    message = bytearray()
    num_bytes = int.from_bytes(length.tobytes())
    receive_stream(link, rank, num_bytes, lambda piece, _: message.extend(piece), tag=tag)
    return bytes(message)


def _pieces(num_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields offset and size of each piece; the first is as large as any."""
    for offset in range(0, num_bytes, PIECE_BYTES):
        yield offset, min(PIECE_BYTES, num_bytes - offset)


class Pace:
    """Limits the rate of a program's streams together. Safe to use from any thread.

    Args:
        max_bytes_per_second: The rate; None for no limit.
    """

    def __init__(self, max_bytes_per_second: float | None) -> None:
        self._rate = max_bytes_per_second
        self._free_at = 0.0
        self._mutex = threading.Lock()

    def wait(self, num_bytes: int) -> None:
        """Waits until the bytes sent before have had their time."""
        if self._rate is None:
            return
        with self._mutex:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + num_bytes / self._rate
        time.sleep(start - now)


@dataclasses.dataclass(slots=True)
class _Offer:
    """Data that a thread sends.

    Attributes:
        data: The data.
        is_taken: Whether the receiver has copied it.
    """

    data: Bytes
    is_taken: bool = False


class MemoryLinks:
    """Links between threads of one process that stand for ranks, e.g. in tests.

    Args:
        timeout_seconds: How long to wait for another rank.
    """

    def __init__(self, timeout_seconds: float = 60.0) -> None:
        self.timeout_seconds = timeout_seconds
        self.changed = threading.Condition()
        self.offers: dict[tuple[int, int, int], collections.deque[_Offer]] = {}
        self._lost: set[int] = set()

    def link(self, rank: int) -> Link:
        """Returns the link of a rank."""
        return _MemoryLink(self, rank)

    def lose(self, rank: int) -> None:
        """Lets everyone who waits for a rank fail: it was killed, or has closed its link."""
        with self.changed:
            self._lost.add(rank)
            self.changed.notify_all()

    def wait(self, is_done: Callable[[], bool], rank: int, other: int) -> None:
        """Waits for another rank; call it with `changed` held."""
        self.changed.wait_for(lambda: is_done() or {rank, other} & self._lost, self.timeout_seconds)
        if not is_done():
            fate = "is gone" if other in self._lost else "did not take part in time"
            raise errors.CoordinationError(
                f"Connection to a rank lost while exchanging data with rank {other}: it {fate}.",
                ranks=(other,),
            )


@dataclasses.dataclass(frozen=True, slots=True)
class _MemoryTransfer:
    finish: Callable[[], None]

    def wait(self) -> None:
        """See `Transfer.wait`."""
        self.finish()


class _MemoryLink:
    """A `Link` between threads."""

    def __init__(self, links: MemoryLinks, rank: int) -> None:
        self._links = links
        self._rank = rank

    def send(self, rank: int, data: Bytes, tag: int = 0) -> Transfer:
        """See `Link.send`."""
        offer, links = _Offer(data), self._links
        with links.changed:
            links.offers.setdefault((self._rank, rank, tag), collections.deque()).append(offer)
            links.changed.notify_all()

        def finish() -> None:
            with links.changed:
                links.wait(lambda: offer.is_taken, self._rank, rank)

        return _MemoryTransfer(finish)

    def receive(self, rank: int, into: Bytes, tag: int = 0) -> Transfer:
        """See `Link.receive`; transfers of a stream are waited for in their order."""
        return _MemoryTransfer(functools.partial(self._take, rank, into, tag))

    def _take(self, rank: int, into: Bytes, tag: int) -> None:
        links, key = self._links, (rank, self._rank, tag)
        with links.changed:
            links.wait(lambda: bool(links.offers.get(key)), self._rank, rank)
            offer = links.offers[key].popleft()
            into[:] = offer.data
            offer.is_taken = True
            links.changed.notify_all()

    def close(self) -> None:
        """See `Link.close`."""
        self._links.lose(self._rank)
