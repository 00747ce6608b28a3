"""Digests of arrays: 16 hex digits (XXH3, 64 bits) for every block of every chunk.

The blocks of one chunk are `block_bytes` of its valid region in C order; the last may be
shorter. The digests of an array are one string, chunks in C order. Pure; free of torch and NumPy.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import xxhash

from functional_ckpt.core.arrays.chunks import DIGEST_BLOCK_BYTES, ChunkGrid, digest_offsets

_DIGITS = 16


def digest_blocks(data: Any, block_bytes: int = DIGEST_BLOCK_BYTES) -> str:
    """Returns 16 hex digits for every block of flat bytes (any buffer)."""
    view = memoryview(data)
    if len(view) <= block_bytes:
        return xxhash.xxh3_64_hexdigest(view) if len(view) else ""
    return "".join(
        xxhash.xxh3_64_hexdigest(view[start : start + block_bytes])
        for start in range(0, len(view), block_bytes)
    )


class Mismatch(NamedTuple):
    """The first block whose bytes are not the recorded ones."""

    offset: int
    expected: str
    got: str


class StoredText(Protocol):
    """Digits that are read when they are asked for."""

    def digits(self, start: int, end: int) -> str:
        """Returns digits `start` to `end`."""
        ...


DigestText: TypeAlias = "str | StoredText"
"""The digests of an array as one string of digits."""


class Digests(NamedTuple):
    """The recorded digests of one array."""

    grid: ChunkGrid
    itemsize_bytes: int
    text: DigestText

    def is_same(self, other: Digests) -> bool:
        """Returns whether two arrays with the same chunks have the same digests."""
        count = digest_offsets(self.grid, self.itemsize_bytes)[-1]
        return self._digits(0, count * _DIGITS) == other._digits(0, count * _DIGITS)

    def _digits(self, start: int, end: int) -> str:
        text = self.text
        return text[start:end] if isinstance(text, str) else text.digits(start, end)

    def of(self, index: tuple[int, ...]) -> str:
        """Returns the digests of one chunk."""
        offsets = digest_offsets(self.grid, self.itemsize_bytes)
        position = self.grid.position(index)
        return self._digits(_DIGITS * offsets[position], _DIGITS * offsets[position + 1])

    def check(self, block: int, data: Any) -> Mismatch | None:
        """Compares bytes with their recorded digests.

        Args:
            block: The array's block that `data` starts with, chunks in C order.
            data: Flat bytes: entire blocks, or the last ones of a chunk.

        Returns:
            The first difference; None where there is none.
        """
        got = digest_blocks(data, self.grid.block_bytes)
        start, text = _DIGITS * block, self.text
        end = start + len(got)
        expected = text[start:end] if isinstance(text, str) else text.digits(start, end)
        if got == expected:
            return None
        at = next(
            i for i in range(0, len(got), _DIGITS) if got[i:][:_DIGITS] != expected[i:][:_DIGITS]
        )
        offset = at // _DIGITS * self.grid.block_bytes
        return Mismatch(offset, expected[at:][:_DIGITS], got[at:][:_DIGITS])


class BlockDigests:
    """Computes `digest_blocks` of bytes that arrive in pieces of any size."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._block = xxhash.xxh3_64()
        self._missing_bytes = DIGEST_BLOCK_BYTES

    def update(self, data: memoryview) -> None:
        """Adds the next bytes."""
        start = 0
        while start < len(data):
            piece = data[start : start + self._missing_bytes]
            start += len(piece)
            if len(piece) == DIGEST_BLOCK_BYTES:
                self._found.append(xxhash.xxh3_64_hexdigest(piece))
                continue
            self._block.update(piece)
            self._missing_bytes -= len(piece)
            if not self._missing_bytes:
                self._end_block()

    def _end_block(self) -> None:
        self._found.append(self._block.hexdigest())
        self._block.reset()
        self._missing_bytes = DIGEST_BLOCK_BYTES

    def hexdigests(self) -> str:
        """Returns 16 hex digits for every block; nothing may be added afterwards."""
        if self._missing_bytes < DIGEST_BLOCK_BYTES:
            self._end_block()
        return "".join(self._found)
