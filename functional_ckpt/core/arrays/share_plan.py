"""Who reads which chunk when ranks read for each other, and in which rounds.

A rank that wants columns of a chunk of rows must read all of it, since bytes are verified by the
block; and replicas all need the same chunks. If several ranks need a chunk, one of them reads it
and sends the parts. Pure: every rank computes the same plan from all requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from functional_ckpt.core.arrays.chunks import ChunkGrid, asked_bytes
from functional_ckpt.core.arrays.spec import ArraySpec, Box


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """An array as it is stored."""

    spec: ArraySpec
    grid: ChunkGrid


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A region that a rank restores."""

    array: str
    box: Box


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """The part of a chunk for one rank."""

    rank: int
    want: int
    box: Box


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SharedChunk:
    """A chunk that one rank reads for itself and others."""

    array: str
    index: tuple[int, ...]
    reader: int
    parts: tuple[Share, ...]


_Rounds: TypeAlias = tuple[tuple[SharedChunk, ...], ...]


def plan_sharing(
    arrays: Mapping[str, StoredArray], wants: Sequence[Sequence[Region]], *, round_bytes: int
) -> _Rounds:
    """Returns the chunks that are read once for all, in rounds.

    A chunk of which every rank can read just its own part is not among them: the ranks read it by
    themselves.

    Args:
        arrays: Every array that is wanted.
        wants: The requests, in order of rank.
        round_bytes: How much a rank reads, and how much it gets, in one round at most; a single
            chunk may be more.
    """
    loads = [0] * len(wants)
    rounds: list[list[SharedChunk]] = []
    budget = Budget(len(wants), round_bytes)
    for name, index, parts in wanted_chunks(arrays, wants):
        array = arrays[name]
        chunk = array.grid.box(index)
        itemsize = array.spec.itemsize_bytes
        size_bytes = chunk.num_elements * itemsize
        if not is_read_twice(array, index, parts):
            continue
        reader = min((part.rank for part in parts), key=lambda rank: (loads[rank], rank))
        loads[reader] += size_bytes
        got = [(part.rank, part.box.num_elements * itemsize) for part in parts]
        if budget.must_close(reader, size_bytes, got) or not rounds:
            rounds.append([])
        shared = SharedChunk(array=name, index=index, reader=reader, parts=parts)
        rounds[-1].append(shared)
    return tuple(map(tuple, rounds))


def is_read_twice(array: StoredArray, index: tuple[int, ...], parts: Sequence[Share]) -> bool:
    """Returns whether the ranks alone would ask for more than the chunk, or for a part twice."""
    itemsize = array.spec.itemsize_bytes
    asked = {part.box: asked_bytes(array.grid, index, part.box, itemsize) for part in parts}
    size_bytes = array.grid.box(index).num_elements * itemsize
    return len(asked) < len(parts) or sum(asked.values()) > size_bytes


def wanted_chunks(
    arrays: Mapping[str, StoredArray], wants: Sequence[Sequence[Region]]
) -> Iterator[tuple[str, tuple[int, ...], tuple[Share, ...]]]:
    """Yields the chunks that ranks need, and the needed parts, by array and in C order."""
    by_array: dict[str, list[tuple[int, int, Box]]] = {}
    for rank, wanted in enumerate(wants):
        for number, want in enumerate(wanted):
            by_array.setdefault(want.array, []).append((rank, number, want.box))
    for name in sorted(by_array):
        grid = arrays[name].grid
        chunks: dict[tuple[int, ...], list[Share]] = {}
        for rank, number, box in by_array[name]:
            for index in grid.indices(box):
                common = grid.box(index).intersect(box)
                if common is not None:
                    chunks.setdefault(index, []).append(Share(rank, number, common))
        for index in sorted(chunks):
            yield name, index, tuple(chunks[index])


class Budget:
    """How much each rank reads and gets in the round that is being filled."""

    def __init__(self, num_ranks: int, round_bytes: int) -> None:
        self._round_bytes = round_bytes
        self._read = [0] * num_ranks
        self._got = [0] * num_ranks

    def must_close(self, reader: int, size_bytes: int, got: Sequence[tuple[int, int]]) -> bool:
        """Adds a chunk; returns whether it starts a new round because the last one is full."""
        is_full = self._read[reader] > 0 and (
            self._read[reader] + size_bytes > self._round_bytes
            or any(self._got[rank] + more > self._round_bytes for rank, more in got)
        )
        if is_full:
            self._read = [0] * len(self._read)
            self._got = [0] * len(self._got)
        self._read[reader] += size_bytes
        for rank, more in got:
            self._got[rank] += more
        return is_full
