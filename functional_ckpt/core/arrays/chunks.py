"""How an array is cut into chunks: each has exactly one writer and is contiguous in its shard.

Pure arithmetic on shapes; free of torch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import ArraySpec, Box

# Small enough that object stores and partial reads stay cheap, large enough that a 2 GiB state is
# 64 chunks.
MAX_CHUNK_BYTES = 32 * 2**20
# Chunks of one row each, at most, where only they are runs of a shard's bytes.
MAX_ROWS = 4096
# A reader verifies in units of this many bytes of a chunk's valid region (C order). Smaller ones
# would be hashed by one thread at a time: xxhash keeps the interpreter's lock below 100 KB.
DIGEST_BLOCK_BYTES = 128 * 2**10


# Up to here a chunk lives in a node of the database's tree, and nodes are compressed.
MAX_INLINE_BYTES = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkGrid:
    """A regular grid over an array, as zarr has it: edge chunks are stored padded to full shape.

    Attributes:
        shape: The array's shape.
        chunk_shape: The shape of a chunk, at least 1 in every dim.
        block_bytes: The bytes of a chunk that have a digest of their own.
    """

    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    block_bytes: int = DIGEST_BLOCK_BYTES

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.chunk_shape) or any(
            type(size) is not int or size < 1 for size in self.chunk_shape
        ):
            raise errors.UsageError(f"Chunk shape {self.chunk_shape} does not fit {self.shape}.")

    @property
    def num_chunks_per_dim(self) -> tuple[int, ...]:
        """Chunks along each dim; zero where the dim is empty."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk_shape, strict=True))

    @property
    def num_chunks(self) -> int:
        """Chunks in the grid; a 0-dim array has one, an array with an empty dim none."""
        return math.prod(self.num_chunks_per_dim)

    def box(self, index: tuple[int, ...]) -> Box:
        """Returns the valid region of chunk `index`: edge chunks are cut at the array's end."""
        offset = tuple(i * c for i, c in zip(index, self.chunk_shape, strict=True))
        shape = tuple(
            min(c, n - o) for c, n, o in zip(self.chunk_shape, self.shape, offset, strict=True)
        )
        return Box(offset, shape)

    def is_padded(self, index: tuple[int, ...]) -> bool:
        """Returns whether chunk `index` reaches over the array's end."""
        return self.box(index).shape != self.chunk_shape

    def indices(self, region: Box | None = None) -> Iterator[tuple[int, ...]]:
        """Indices of the chunks that meet `region` (default: all), in C order."""
        if self.num_chunks == 0 or (region is not None and math.prod(region.shape) == 0):
            return iter(())
        region = region or Box.whole(self.shape)
        return itertools.product(
            *(
                range(o // c, -(-e // c))
                for o, e, c in zip(region.offset, region.end, self.chunk_shape, strict=True)
            )
        )

    def position(self, index: tuple[int, ...]) -> int:
        """Position of chunk `index` in C order."""
        position = 0
        for i, n in zip(index, self.num_chunks_per_dim, strict=True):
            position = position * n + i
        return position

    def key(self, index: tuple[int, ...]) -> str:
        """Zarr v3's default chunk key, relative to the array: `c/0/1`, or `c` for a 0-dim array."""
        return "/".join(("c", *map(str, index)))

    def num_digests(self, index: tuple[int, ...], itemsize_bytes: int) -> int:
        """Digest blocks of chunk `index`."""
        return -(-self.box(index).num_elements * itemsize_bytes // self.block_bytes)


@functools.lru_cache(maxsize=65536)
def digest_offsets(grid: ChunkGrid, itemsize_bytes: int) -> tuple[int, ...]:
    """First digest block of each chunk, in C order; the last entry is the total."""
    counts = (grid.num_digests(index, itemsize_bytes) for index in grid.indices())
    return tuple(itertools.accumulate(counts, initial=0))


def run_of(shape: tuple[int, ...], inside: Box) -> tuple[int, int] | None:
    """Returns the first element of a region and one past its last, in C order.

    None where the region is not one run of the elements of an array of `shape`.
    """
    partial = [dim for dim, size in enumerate(shape) if inside.shape[dim] != size]
    if partial and any(size != 1 for size in inside.shape[: partial[-1]]):
        return None
    start = 0
    for offset, size in zip(inside.offset, shape, strict=True):
        start = start * size + offset
    return start, start + inside.num_elements


def run_in_chunk(
    grid: ChunkGrid, index: tuple[int, ...], inside: Box, itemsize_bytes: int
) -> tuple[int, int] | None:
    """Returns the first byte and one past the last of a region that is one run of a chunk's bytes.

    None for any other region, and for a chunk that is cut off in a dim after the first: it is
    stored with gaps.
    """
    shape = grid.box(index).shape
    run = None if shape[1:] != grid.chunk_shape[1:] else run_of(shape, inside)
    return None if run is None else (run[0] * itemsize_bytes, run[1] * itemsize_bytes)


def whole_blocks(start: int, end: int, size_bytes: int, block_bytes: int) -> tuple[int, int]:
    """Returns the first byte and the end of the blocks that a part of a chunk overlaps."""
    first = start // block_bytes * block_bytes
    return first, min(-(-end // block_bytes) * block_bytes, size_bytes)


def asked_bytes(grid: ChunkGrid, index: tuple[int, ...], box: Box, itemsize_bytes: int) -> int:
    """Returns bytes that a verified read of a region reads of one overlapping chunk."""
    chunk = grid.box(index)
    size_bytes = chunk.num_elements * itemsize_bytes
    run = run_in_chunk(grid, index, box.relative_to(chunk.offset), itemsize_bytes)
    if run is None:
        return size_bytes
    first, end = whole_blocks(*run, size_bytes, grid.block_bytes)
    return end - first


def runs(grid: ChunkGrid, itemsize_bytes: int, max_bytes: int) -> Iterator[Box]:
    """Yields regions that cover an array, in C order; each is a run of the array's bytes.

    Their edges are those of chunks, or else of digest blocks, where that is possible: few blocks
    are read twice.

    Args:
        grid: The array's chunks.
        itemsize_bytes: Bytes of an element.
        max_bytes: Bytes of a region, at most; one element may be larger.
    """
    shape = grid.shape
    if not shape or 0 in shape:
        yield from () if shape else [Box.whole(shape)]
        return
    sizes = [math.prod(shape[dim + 1 :]) * itemsize_bytes for dim in range(len(shape))]
    dim = next((dim for dim, size in enumerate(sizes) if size <= max_bytes), len(shape) - 1)
    rows, unit = max(1, max_bytes // sizes[dim]), grid.chunk_shape[dim]
    period = shape[dim]
    if unit > rows:
        period, row_bytes = unit, math.prod(grid.chunk_shape[dim + 1 :]) * itemsize_bytes
        unit = grid.block_bytes // math.gcd(grid.block_bytes, row_bytes)
    rows = rows // unit * unit or rows
    rest = shape[dim + 1 :]
    for lead in itertools.product(*map(range, shape[:dim])):
        for first in range(0, shape[dim], period):
            end = min(first + period, shape[dim])
            for start in range(first, end, rows):
                yield Box(
                    (*lead, start, *[0] * len(rest)),
                    (*[1] * dim, min(rows, end - start), *rest),
                )


def choose_grid(
    spec: ArraySpec,
    shard_shape: tuple[int, ...] | None = None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    *,
    first_dim: int = 0,
    is_even: bool = False,
) -> ChunkGrid:
    """Returns a grid whose chunks are at most `max_chunk_bytes`, cut along the leading dims.

    A chunk is a run of the bytes of a shard: dims before the one that is cut have length 1.

    Args:
        spec: The global array.
        shard_shape: The regular division between writers, `ceil(n / k)` per dim; None for one
            writer. A chunk never reaches over a shard's edge, so it has one writer.
        max_chunk_bytes: Bound on the bytes of a chunk. One element may exceed it, and so may a
            shard whose length has no useful divisor.
        first_dim: The first dim that may be longer than 1 in a chunk.
        is_even: Whether chunks divide the array, so that none reaches over its end.

    >>> choose_grid(ArraySpec((50257, 768), "float32")).chunk_shape
    (10052, 768)
    """
    chunk = [max(1, size) for size in (shard_shape or spec.shape)]
    chunk[:first_dim] = [1] * first_dim
    for dim in range(first_dim, len(chunk)):
        size = chunk[dim]
        budget = max(1, max_chunk_bytes // (math.prod(chunk[dim + 1 :]) * spec.itemsize_bytes))
        if budget < size:
            chunk[dim] = _split(size, budget, exact=is_even or size < spec.shape[dim])
        if chunk[dim] > 1:
            break
    return ChunkGrid(spec.shape, tuple(chunk))


def _split(size: int, budget: int, *, exact: bool) -> int:
    """Returns the largest even part of `size` up to `budget`; a divisor if shards share the dim."""
    if not exact:
        return -(-size // -(-size // budget))
    best = max(d for d in _divisors(size) if d <= budget)
    # A size with no useful divisor (a prime, say) would make thousands of tiny chunks: it is not
    # divided, up to 64 times the budget.
    is_useful = best * 8 >= budget or size // best <= MAX_ROWS or size > 64 * budget
    return best if is_useful else size


def _divisors(number: int) -> Iterator[int]:
    for low in range(1, math.isqrt(number) + 1):
        if number % low == 0:
            yield from (low, number // low)
