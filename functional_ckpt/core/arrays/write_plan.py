"""Who writes which chunk: each has one writer, and replicas share the work evenly. Pure.

Every rank works out its own part from shardings alone, and all parts fit together without a word
between the ranks: each considers only the chunks that it holds, in the same order as everyone who
holds the same. Free of torch.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from functional_ckpt.core.arrays.chunks import MAX_CHUNK_BYTES, ChunkGrid, choose_grid
from functional_ckpt.core.arrays.sharding import Piece, Sharding
from functional_ckpt.core.arrays.spec import ArraySpec

_Index: TypeAlias = tuple[int, ...]

# Eight replicas that share 2 GiB in full chunks have eight each, and none more than one more.
_REPLICAS_PER_FULL_CHUNK = 8
_MIN_SHARED_CHUNK_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class ShardedArray:
    """An array as all ranks know it."""

    item: str
    name: str
    spec: ArraySpec
    sharding: Sharding


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedPiece:
    """A piece of a rank's local tensor and the chunks of it that this rank writes.

    `indices` are in C order; `is_whole` says that the piece has no others.
    """

    piece: Piece
    indices: tuple[_Index, ...]
    is_whole: bool


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedArray:
    """One rank's part in writing an array.

    Without pieces other ranks write it all; the owner writes the array's metadata.
    """

    grid: ChunkGrid
    pieces: tuple[PlannedPiece, ...]
    is_owner: bool


def plan_writes(arrays: Sequence[ShardedArray], rank: int) -> tuple[PlannedArray, ...]:
    """Returns the chunks that `rank` writes of each array.

    The chunks that the same set of replicas holds are dealt out largest first, each to the replica
    with the least work so far.
    """
    grids = [_grid(array) for array in arrays]
    mine = _deal(arrays, grids, rank)
    planned: list[PlannedArray] = []
    for place, (array, grid) in enumerate(zip(arrays, grids, strict=True)):
        pieces: list[PlannedPiece] = []
        for piece in array.sharding.pieces(array.spec.shape, rank):
            every = tuple(grid.indices(piece.box))
            indices = tuple(index for index in every if (place, index) in mine)
            if indices:
                pieces.append(PlannedPiece(piece, indices, len(indices) == len(every)))
        first = (place, (0,) * len(array.spec.shape))
        is_owner = first in mine if grid.num_chunks else rank == min(array.sharding.ranks)
        planned.append(PlannedArray(grid, tuple(pieces), is_owner))
    return tuple(planned)


@functools.lru_cache(maxsize=4096)
def plan_alone(spec: ArraySpec) -> PlannedArray:
    """Returns the chunks of an array that a single rank writes: all of them."""
    array = ShardedArray("", "", spec, Sharding.replicated((0,)))
    return plan_writes([array], 0)[0]


def _grid(array: ShardedArray) -> ChunkGrid:
    """The array's chunks: smaller where many replicas share them, so that loads come out even."""
    units = array.sharding.chunk_alignment(array.spec.shape)
    shares = -(-array.sharding.num_replicas // _REPLICAS_PER_FULL_CHUNK)
    return choose_grid(array.spec, units, max(MAX_CHUNK_BYTES // shares, _MIN_SHARED_CHUNK_BYTES))


def _deal(
    arrays: Sequence[ShardedArray], grids: Sequence[ChunkGrid], rank: int
) -> set[tuple[int, _Index]]:
    """Returns the chunks assigned to `rank`, as (position of the array, chunk index)."""
    mine: set[tuple[int, _Index]] = set()
    shared: dict[tuple[int, ...], list[tuple[int, int, _Index]]] = {}
    for place, (array, grid) in enumerate(zip(arrays, grids, strict=True)):
        replicas = array.sharding.replicas(rank)
        for index in _held(array, grid, rank):
            if len(replicas) == 1:
                mine.add((place, index))
            else:
                size_bytes = grid.box(index).num_elements * array.spec.itemsize_bytes
                shared.setdefault(replicas, []).append((-size_bytes, place, index))
    for replicas, chunks in shared.items():
        loads = [(0, replica) for replica in replicas]
        heapq.heapify(loads)
        for negative_bytes, place, index in sorted(chunks):
            load, replica = heapq.heappop(loads)
            heapq.heappush(loads, (load - negative_bytes, replica))
            if replica == rank:
                mine.add((place, index))
    return mine


def _held(array: ShardedArray, grid: ChunkGrid, rank: int) -> Iterator[_Index]:
    for piece in array.sharding.pieces(array.spec.shape, rank):
        yield from grid.indices(piece.box)
