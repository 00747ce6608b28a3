"""Plans an object that is put together in a store: which of its parts the store copies. Pure.

S3 makes an object of parts, each sent by the client or copied from a range of another object. Every
part but the last has a least size, https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

MIN_PART_BYTES = 5 * 2**20
MAX_PART_BYTES = 512 * 2**20
"""Of a copy; S3 allows 5 GiB, but smaller ones are made at the same time."""
MAX_PARTS = 10_000


class Stored(NamedTuple):
    """Bytes of an object that exists.

    Attributes:
        file: The object.
        start: The first byte.
        end: One past the last.
    """

    file: str
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """The number of bytes."""
        return self.end - self.start


class Made(NamedTuple):
    """Bytes that the client has, or makes at once.

    Attributes:
        number: Which, for the caller.
        size_bytes: The number of bytes.
    """

    number: int
    size_bytes: int


Run: TypeAlias = Stored | Made


class Part(NamedTuple):
    """A part of the object.

    Attributes:
        runs: Its bytes, in order.
        is_copied: Whether the store copies it; it is one `Stored` then.
    """

    runs: Sequence[Run]
    is_copied: bool


def plan_parts(
    runs: Iterable[Run], *, min_bytes: int = MIN_PART_BYTES, max_bytes: int = MAX_PART_BYTES
) -> list[Part]:
    """Returns the parts of an object.

    A run that is too small for a part is joined with the next ones, and goes through the client.

    Args:
        runs: The bytes of the object, in order; none is empty.
        min_bytes: The least size of every part but the last.
        max_bytes: The largest size of a copy; at least twice the least size.
    """
    parts: list[Part] = []
    sent: list[Run] = []
    held = 0
    for run in _joined(runs):
        rest = run
        if isinstance(rest, Stored):
            missing = min_bytes - held if held else 0
            if rest.size_bytes >= missing + min_bytes:
                middle = rest.start + missing
                if missing:
                    sent.append(rest._replace(end=middle))
                if sent:
                    parts.append(Part(sent, is_copied=False))
                    sent, held = [], 0
                parts += _copies(rest._replace(start=middle), max_bytes)
                continue
        sent.append(rest)
        held += rest.size_bytes
        if held >= min_bytes:
            parts.append(Part(sent, is_copied=False))
            sent, held = [], 0
    if sent:
        parts.append(Part(sent, is_copied=False))
    return parts


def least_bytes(size_bytes: int) -> int:
    """Returns a least size with which an object has no more parts than S3 allows."""
    return max(MIN_PART_BYTES, -(-size_bytes // (MAX_PARTS - 1)))


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    """Yields the runs; those that follow one another in an object are one."""
    last: Run | None = None
    for run in runs:
        if (
            isinstance(last, Stored)
            and isinstance(run, Stored)
            and (last.file, last.end) == (run.file, run.start)
        ):
            last = last._replace(end=run.end)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def _copies(run: Stored, max_bytes: int) -> Iterator[Part]:
    """Yields copies of about the same size."""
    count = -(-run.size_bytes // max_bytes)
    edges = [run.start + run.size_bytes * number // count for number in range(count + 1)]
    for start, end in itertools.pairwise(edges):
        yield Part([Stored(run.file, start, end)], is_copied=True)
