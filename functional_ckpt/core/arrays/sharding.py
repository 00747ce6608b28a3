"""Which rank holds which part of a global array: device meshes and placements as plain data.

Facts about DTensor (torch 2.13, tried on real meshes): placements apply to the mesh dims from left
to right; `Shard` divides the remainder of a dim into parts of ceil(n / k), the last ones smaller or
empty; `_StridedShard` with the split factor f first cuts it into f such parts and gives every rank
its share of each. Free of torch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Iterator
from typing import Any, TypeAlias

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import Box

_Run: TypeAlias = tuple[int, int]
"""First index and one past the last of a stretch of a dim."""


@dataclasses.dataclass(frozen=True, slots=True)
class DimShard:
    """One mesh dim cuts one dim of the array.

    `split_factor` is 1 for `Shard`; else that of `_StridedShard`.
    """

    dim: int
    split_factor: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A box of the global array and its position in a rank's local tensor.

    `box` is in the global array, `local` in the local tensor.
    """

    box: Box
    local: Box


@dataclasses.dataclass(frozen=True, slots=True)
class Sharding:
    """How an array is spread over ranks.

    Attributes:
        mesh_shape: Ranks along each mesh dim.
        ranks: The global ranks in the mesh, in C order.
        placements: The array dim that each mesh dim shards; None if it replicates.
    """

    mesh_shape: tuple[int, ...]
    ranks: tuple[int, ...]
    placements: tuple[DimShard | None, ...]

    def __post_init__(self) -> None:
        is_whole = math.prod(self.mesh_shape) == len(self.ranks)
        if not is_whole or len(self.placements) != len(self.mesh_shape):
            raise errors.UsageError(
                f"Mesh shape {self.mesh_shape} needs {math.prod(self.mesh_shape)} ranks and "
                f"{len(self.mesh_shape)} placements; got {len(self.ranks)} and "
                f"{len(self.placements)}."
            )

    @classmethod
    def replicated(cls, ranks: tuple[int, ...]) -> Sharding:
        """Returns the complete array on each of `ranks`."""
        return cls((len(ranks),), ranks, (None,))

    def coordinate(self, rank: int) -> tuple[int, ...] | None:
        """Returns the mesh coordinate of a rank; None for a rank outside the mesh."""
        position = _positions(self.ranks).get(rank)
        if position is None:
            return None
        coordinate: list[int] = []
        for size in reversed(self.mesh_shape):
            position, here = divmod(position, size)
            coordinate.append(here)
        return tuple(reversed(coordinate))

    def pieces(self, shape: tuple[int, ...], rank: int) -> tuple[Piece, ...]:
        """Returns a rank's parts of an array of `shape`, in the order of its local tensor."""
        coordinate = self.coordinate(rank)
        return () if coordinate is None else self.pieces_at(shape, coordinate)

    def pieces_at(self, shape: tuple[int, ...], coordinate: tuple[int, ...]) -> tuple[Piece, ...]:
        """Returns the parts of the rank at a mesh coordinate."""
        runs = [
            _intervals(size, self._shard_dims(dim), self._coordinate_of(dim, coordinate))
            for dim, size in enumerate(shape)
        ]
        return tuple(_combine(runs))

    def local_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Shape of a rank's local tensor."""
        coordinate = self.coordinate(rank)
        return (0,) * len(shape) if coordinate is None else self.local_shape_at(shape, coordinate)

    def local_shape_at(
        self, shape: tuple[int, ...], coordinate: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Shape of the local tensor of the rank at a mesh coordinate."""
        return tuple(
            sum(
                end - start
                for start, end in _intervals(
                    size, self._shard_dims(dim), self._coordinate_of(dim, coordinate)
                )
            )
            for dim, size in enumerate(shape)
        )

    def to_group_ranks(self, group: tuple[int, ...]) -> Sharding:
        """Returns the same sharding with ranks counted within a group of processes.

        Raises:
            UnsupportedLeafError: The mesh has a rank outside the group.
        """
        if self.ranks == group == tuple(range(len(group))):
            return self
        positions = _positions(group)
        outside = [rank for rank in self.ranks if rank not in positions]
        if outside:
            raise errors.UnsupportedLeafError(
                f"the DTensor's mesh has rank {outside[0]}, which is outside the saving process "
                f"group ({len(group)} ranks); give a process_group that contains the mesh"
            )
        ranks = tuple(positions[rank] for rank in self.ranks)
        return dataclasses.replace(self, ranks=ranks)

    def chunk_alignment(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Per dim a length that divides all shard edges; the dim's size if it is not sharded.

        A chunk that divides the unit never reaches over an edge, so it has one writer.
        """
        return tuple(_unit(size, self._shard_dims(dim)) for dim, size in enumerate(shape))

    def is_even(self, shape: tuple[int, ...], dim: int) -> bool:
        """Returns whether all stretches of a dim are as long as `chunk_alignment` says."""
        return _is_even(shape[dim], self._shard_dims(dim))

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold different parts."""
        return any(cut is not None for cut in self.placements)

    @property
    def num_replicas(self) -> int:
        """How many ranks hold the same of it."""
        return math.prod(
            size for size, cut in zip(self.mesh_shape, self.placements, strict=True) if cut is None
        )

    def replicas(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks with the same parts as `rank`, itself included, ascending."""
        coordinate = self.coordinate(rank)
        if coordinate is None:
            return ()
        choices = [
            range(size) if cut is None else (here,)
            for size, cut, here in zip(self.mesh_shape, self.placements, coordinate, strict=True)
        ]
        return tuple(sorted(self._rank_at(at) for at in itertools.product(*choices)))

    def first_replica(self) -> Sharding:
        """Returns the sharding in which only the first of several equal replicas holds a part."""
        cuts = zip(self.mesh_shape, self.placements, strict=True)
        mesh_shape = tuple(1 if cut is None else size for size, cut in cuts)
        ranks = tuple(self._rank_at(at) for at in itertools.product(*map(range, mesh_shape)))
        return Sharding(mesh_shape, ranks, self.placements)

    def _rank_at(self, coordinate: tuple[int, ...]) -> int:
        position = 0
        for here, size in zip(coordinate, self.mesh_shape, strict=True):
            position = position * size + here
        return self.ranks[position]

    def _shard_dims(self, dim: int) -> tuple[tuple[int, int], ...]:
        """`(ranks, split factor)` of every mesh dim that cuts `dim`, from left to right."""
        return tuple(
            (size, cut.split_factor)
            for size, cut in zip(self.mesh_shape, self.placements, strict=True)
            if cut is not None and cut.dim == dim
        )

    def _coordinate_of(self, dim: int, coordinate: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            here
            for here, cut in zip(coordinate, self.placements, strict=True)
            if cut is not None and cut.dim == dim
        )


@functools.lru_cache(maxsize=1024)
def _positions(ranks: tuple[int, ...]) -> dict[int, int]:
    return {rank: position for position, rank in enumerate(ranks)}


@functools.lru_cache(maxsize=65536)
def _intervals(
    size: int, cuts: tuple[tuple[int, int], ...], coordinate: tuple[int, ...]
) -> tuple[_Run, ...]:
    """Returns the stretches of a dim that one coordinate holds, in local order."""
    runs: list[_Run] = [(0, size)] if size else []
    for (num_ranks, split_factor), here in zip(cuts, coordinate, strict=True):
        length = sum(end - start for start, end in runs)
        taken: list[_Run] = []
        for start, end in _parts(0, length, split_factor):
            low, high = _part(start, end, num_ranks, here)
            taken += _slice_runs(runs, low, high)
        runs = _join(taken)
    return tuple(runs)


def _parts(start: int, end: int, count: int) -> Iterator[_Run]:
    for index in range(count):
        yield _part(start, end, count, index)


def _part(start: int, end: int, count: int, index: int) -> _Run:
    step = -(-(end - start) // count)
    return min(start + index * step, end), min(start + (index + 1) * step, end)


def _slice_runs(runs: list[_Run], low: int, high: int) -> Iterator[_Run]:
    """Yields the stretches at positions `low` to `high` of the sequence that `runs` spell out."""
    position = 0
    for start, end in runs:
        first = max(low - position, 0)
        last = min(high - position, end - start)
        if first < last:
            yield start + first, start + last
        position += end - start


def _join(runs: list[_Run]) -> list[_Run]:
    """Neighbouring stretches as one."""
    joined: list[_Run] = []
    for start, end in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


@functools.lru_cache(maxsize=65536)
def _unit(size: int, cuts: tuple[tuple[int, int], ...]) -> int:
    if not cuts or size == 0:
        return size
    if len(cuts) == 1 and cuts[0][1] == 1:
        return -(-size // cuts[0][0])
    unit = 0
    for coordinate in itertools.product(*(range(num_ranks) for num_ranks, _ in cuts)):
        for edges in _intervals(size, cuts, coordinate):
            for edge in edges:
                if edge != size:
                    unit = math.gcd(unit, edge)
    return unit or size


@functools.lru_cache(maxsize=65536)
def _is_even(size: int, cuts: tuple[tuple[int, int], ...]) -> bool:
    unit = _unit(size, cuts)
    if not unit or (len(cuts) <= 1 and all(factor == 1 for _, factor in cuts)):
        return not unit or size % unit == 0
    coordinates = itertools.product(*(range(num_ranks) for num_ranks, _ in cuts))
    runs = (run for each in coordinates for run in _intervals(size, cuts, each))
    return all(end - start == unit for start, end in runs)


def _combine(runs: list[tuple[_Run, ...]]) -> Iterator[Piece]:
    """Yields the boxes that are products of one stretch in every dim."""
    positions: list[list[tuple[int, _Run]]] = []
    for stretches in runs:
        position, placed = 0, []
        for start, end in stretches:
            placed.append((position, (start, end)))
            position += end - start
        positions.append(placed)
    for choice in itertools.product(*positions):
        shape = tuple(end - start for _, (start, end) in choice)
        yield Piece(
            box=Box(tuple(start for _, (start, _) in choice), shape),
            local=Box(tuple(position for position, _ in choice), shape),
        )


_Placements: TypeAlias = tuple[DimShard | None, ...]
# A mesh of thousands of ranks is listed once.
_shardings: weakref.WeakKeyDictionary[Any, dict[_Placements, Sharding]] = (
    weakref.WeakKeyDictionary()
)


def sharding_of(tensor: Any) -> Sharding | None:
    """Returns the sharding of a DTensor, from its mesh and placements; None for other tensors.

    Raises:
        UnsupportedLeafError: A placement that holds partial sums.
    """
    mesh = getattr(tensor, "device_mesh", None)
    placements = getattr(tensor, "placements", None)
    if mesh is None or placements is None:
        return None
    # By placements as data: torch's compare a strided one as equal to a plain one.
    known, cuts = _shardings.setdefault(mesh, {}), tuple(map(_as_data, placements))
    if (found := known.get(cuts)) is None:
        found = Sharding(tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist()), cuts)
        known[cuts] = found
    return found


def pieces_of(tensor: Any) -> tuple[Piece, ...]:
    """Returns this rank's part of a tensor: all of it, or its shard of a DTensor."""
    shape = tuple(tensor.shape)
    sharding = sharding_of(tensor)
    if sharding is None:
        return (Piece(Box.whole(shape), Box.whole(shape)),)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return ()
    return sharding.pieces_at(shape, tuple(coordinate))


def local_of(tensor: Any) -> Any:
    """Returns this rank's part of a DTensor; any other tensor unchanged."""
    if getattr(tensor, "device_mesh", None) is None:
        return tensor
    local = tensor.detach().to_local()
    # An asynchronous redistribution that nothing has waited for yet.
    return local.trigger_wait() if hasattr(local, "trigger_wait") else local


def wrong_local(tensor: Any, sharding: Sharding | None, found: tuple[int, ...]) -> str | None:
    """Why this rank's part of a DTensor differs from its placements; None if it does not.

    `DTensor.from_local` checks nothing: with parts that differ from torch.chunk's, the elements of
    a rank are unknown.
    """
    coordinate = None if sharding is None else tensor.device_mesh.get_coordinate()
    if sharding is None or coordinate is None:
        return None
    shape = tuple(tensor.shape)
    expected = sharding.local_shape_at(shape, tuple(coordinate))
    if expected == found or (0 in expected and 0 in found):
        return None
    return (
        f"the local tensor of this DTensor of shape {list(shape)}, placements "
        f"{tuple(tensor.placements)} on a mesh of shape {list(sharding.mesh_shape)}, has the shape "
        f"{list(found)}; expected {list(expected)}, as torch.chunk and distribute_tensor give this "
        "rank. Divide it like that, or save the parts as plain tensors under a name of their own "
        "on each rank"
    )


def _as_data(placement: Any) -> DimShard | None:
    if placement.is_replicate():
        return None
    if placement.is_partial():
        raise errors.UnsupportedLeafError(
            f"the DTensor has placement {placement!r} (pending reduction); "
            "redistribute it to Replicate() or Shard(dim) before saving"
        )
    return DimShard(placement.dim, int(getattr(placement, "split_factor", 1)))
