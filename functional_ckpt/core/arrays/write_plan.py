"""Who writes which region of which array: each has one writer, and replicas share the work. Pure.

Every rank works out its own part from shardings alone, and all parts fit together without a
message between the ranks: each considers only the regions that it holds, in the same order as all
ranks that hold the same. Free of torch.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from functional_ckpt.core.arrays.chunks import MAX_CHUNK_BYTES, MAX_ROWS, ChunkGrid, choose_grid
from functional_ckpt.core.arrays.sharding import Piece, Sharding
from functional_ckpt.core.arrays.spec import ArraySpec, Box

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


class PlannedPiece(NamedTuple):
    """A region that one rank writes: of the array, and of its local tensor."""

    rank: int
    box: Box
    local: Box


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedArray:
    """The writers of an array, as far as a rank knows them.

    Attributes:
        grid: Its chunks.
        pieces: The regions that this rank and its replicas write.
        is_tensor: Whether its chunks are runs of the bytes of each region.
    """

    grid: ChunkGrid
    pieces: tuple[PlannedPiece, ...]
    is_tensor: bool = True

    def of(self, rank: int) -> list[PlannedPiece]:
        """Returns the regions that a rank writes."""
        return [piece for piece in self.pieces if piece.rank == rank]


def plan_writes(arrays: Sequence[ShardedArray], rank: int) -> tuple[PlannedArray, ...]:
    """Returns the regions that `rank` and its replicas write of each array.

    An array that every holder has entirely is written by one of them; of a shard, its replicas
    write consecutive rows. The largest are dealt out first, each to the replica with the least
    work so far.
    """
    grids = [_grid(array) for array in arrays]
    found: list[list[PlannedPiece]] = [[] for _ in arrays]
    shared: dict[tuple[int, ...], list[tuple[int, int, Piece]]] = {}
    for number, array in enumerate(arrays):
        shape = array.spec.shape
        pieces = array.sharding.pieces(shape, rank)
        replicas = array.sharding.replicas(rank)
        if not array.spec.num_elements:
            box = Box.whole(shape)
            found[number] = [PlannedPiece(min(array.sharding.ranks), box, box)]
        elif len(replicas) == 1:
            found[number] = [PlannedPiece(rank, piece.box, piece.local) for piece in pieces]
        else:
            size = array.spec.itemsize_bytes
            shared.setdefault(replicas, []).extend(
                (-piece.box.num_elements * size, number, piece) for piece in pieces
            )
    for replicas, held in shared.items():
        loads = [(0, replica) for replica in replicas]
        heapq.heapify(loads)
        for _, number, piece in sorted(held, key=lambda each: each[:2]):
            array = arrays[number]
            runs = _runs(piece, grids[number][0], len(replicas) if array.sharding.is_cut else 1)
            lightest = [heapq.heappop(loads) for _ in runs]
            for (load, replica), run in zip(lightest, runs, strict=True):
                size_bytes = run.box.num_elements * array.spec.itemsize_bytes
                heapq.heappush(loads, (load + size_bytes, replica))
                found[number].append(PlannedPiece(replica, run.box, run.local))
    return tuple(
        PlannedArray(grid, tuple(pieces), is_tensor)
        for (grid, is_tensor), pieces in zip(grids, found, strict=True)
    )


@functools.lru_cache(maxsize=4096)
def plan_alone(spec: ArraySpec) -> PlannedArray:
    """Returns the part of a single rank in writing an array: all of it."""
    array = ShardedArray("", "", spec, Sharding.replicated((0,)))
    return plan_writes([array], 0)[0]


def _grid(array: ShardedArray) -> tuple[ChunkGrid, bool]:
    """Returns an array's chunks, and whether they are runs of each shard's bytes.

    Chunks are smaller where many replicas share a shard, so that loads come out even.
    """
    spec, sharding = array.spec, array.sharding
    units = sharding.chunk_alignment(spec.shape)
    shares = -(-sharding.num_replicas // _REPLICAS_PER_FULL_CHUNK) if sharding.is_cut else 1
    max_bytes = max(MAX_CHUNK_BYTES // shares, _MIN_SHARED_CHUNK_BYTES)
    dims = range(1, len(spec.shape))
    first_dim = max((dim for dim in dims if not sharding.is_even(spec.shape, dim)), default=0)
    is_tensor = math.prod(spec.shape[:first_dim]) <= MAX_ROWS
    grid = choose_grid(spec, units, max_bytes, first_dim=first_dim if is_tensor else 0)
    return grid, is_tensor


def grid_of_boxes(spec: ArraySpec, boxes: Sequence[Box]) -> tuple[ChunkGrid, bool]:
    """Returns the chunks of an array that was cut into any boxes, and whether they are runs.

    Args:
        spec: The array.
        boxes: The regions of all writers: they cover it, and none overlaps another.
    """
    units = [
        math.gcd(*(box.offset[dim] for box in boxes)) or size for dim, size in enumerate(spec.shape)
    ]
    dims = range(1, len(units))
    first_dim = max(
        (dim for dim in dims if any(box.shape[dim] != units[dim] for box in boxes)), default=0
    )
    is_tensor = math.prod(spec.shape[:first_dim]) <= MAX_ROWS
    return choose_grid(spec, tuple(units), first_dim=first_dim if is_tensor else 0), is_tensor


def _runs(piece: Piece, grid: ChunkGrid, count: int) -> list[Piece]:
    """Cuts a piece into up to `count` runs of rows, the longest first; rows of a chunk stay."""
    if not grid.shape:
        return [piece]
    rows, unit = piece.box.shape[0], grid.chunk_shape[0]
    num_chunks = -(-rows // unit)
    count = max(1, min(count, num_chunks))
    edges = [min(rows, -(-num_chunks * n // count) * unit) for n in range(count + 1)]
    return [
        Piece(_rows(piece.box, start, end), _rows(piece.local, start, end))
        for start, end in itertools.pairwise(edges)
    ]


def _rows(box: Box, start: int, end: int) -> Box:
    return Box((box.offset[0] + start, *box.offset[1:]), (end - start, *box.shape[1:]))
