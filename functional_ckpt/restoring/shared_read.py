"""Ranks that read for each other: each shared chunk is read once, and its parts are handed on."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.read_plan import Region, SharedChunk, StoredArray, plan_sharing
from functional_ckpt.core.arrays.spec import ArraySpec, Box, numpy_dtype
from functional_ckpt.distributed.collective import collective
from functional_ckpt.distributed.coordinator import Bytes, Coordinator
from functional_ckpt.format import read_tensorstore
from functional_ckpt.format.database import Database
from functional_ckpt.runtime import threads

__all__ = ["SharedRequest", "read_shared"]

Array: TypeAlias = "np.ndarray[Any, Any]"

# Bytes of other ranks' data that a rank holds at a time, once to send and once to receive.
_ROUND_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SharedRequest:
    """A region that this rank restores.

    Attributes:
        item: The item's name.
        database: Where to read it.
        read: What to read; its box is the region.
        deliver: Takes a part of it: its box in the global array, its elements.
    """

    item: str
    database: Database
    read: read_tensorstore.ArrayRead
    deliver: Callable[[Box, Array], None]

    @property
    def want(self) -> Region:
        """As the plan knows it."""
        return Region(f"{self.item}/{self.read.name}", self.read.box)


def read_shared(
    group: Coordinator, wanted: Sequence[SharedRequest]
) -> set[tuple[int, tuple[int, ...]]]:
    """Reads and delivers shared data; a collective.

    Each round ends in a word between the ranks, so that a failure on one is an error on all.

    Returns:
        The delivered parts: the position in `wanted`, and the chunk's index.

    Raises:
        CoordinationError: Another rank failed or is gone.
    """
    arrays, wants = _exchange_wants(group, wanted)
    rounds = plan_sharing(arrays, wants, round_bytes=_ROUND_BYTES)
    if not rounds:
        return set()
    sources = {each.want.array: each for each in wanted}
    channel = group.channel()
    try:
        for number, chunks in enumerate(rounds):
            own = [chunk for chunk in chunks if chunk.reader == group.rank]
            outgoing = _read_round(group, own, sources, f"{number + 1} of {len(rounds)}")
            incoming = channel.all_to_all(outgoing, _incoming_bytes(chunks, arrays, group))
            _deliver(chunks, incoming, wanted, group.rank)
    finally:
        channel.close()
    return {
        (part.want, chunk.index)
        for chunks in rounds
        for chunk in chunks
        for part in chunk.parts
        if part.rank == group.rank
    }


def _exchange_wants(
    group: Coordinator, wanted: Sequence[SharedRequest]
) -> tuple[Mapping[str, StoredArray], list[list[Region]]]:
    """The requests of all ranks, and their arrays."""
    arrays = {
        each.want.array: (each.read.spec.shape, each.read.spec.dtype, each.read.grid.chunk_shape)
        for each in wanted
    }
    own = [(each.want.array, each.read.box.offset, each.read.box.shape) for each in wanted]
    packed = zlib.compress(json.dumps([arrays, own]).encode(), 1)

    def unite(values: Sequence[bytes]) -> bytes:
        told = [json.loads(zlib.decompress(value)) for value in values]
        every = {name: array for arrays, _ in told for name, array in arrays.items()}
        return zlib.compress(json.dumps([every, [wants for _, wants in told]]).encode(), 1)

    found, wants = json.loads(
        zlib.decompress(group.gather_broadcast("assigning shared reads", packed, unite))
    )
    return {
        name: StoredArray(
            spec=ArraySpec(tuple(shape), dtype), grid=ChunkGrid(tuple(shape), tuple(chunk_shape))
        )
        for name, (shape, dtype, chunk_shape) in found.items()
    }, [
        [Region(name, Box(tuple(offset), tuple(shape))) for name, offset, shape in of]
        for of in wants
    ]


def _read_round(
    group: Coordinator, own: Sequence[SharedChunk], sources: Mapping[str, SharedRequest], which: str
) -> list[Bytes]:
    """Reads this rank's chunks of a round; returns each rank's parts of them."""
    chunks: list[Array] = [np.empty(0)] * len(own)

    def read(place: int) -> None:
        chunk = own[place]
        source = sources[chunk.array]
        box = source.read.grid.box(chunk.index)
        whole = np.empty(box.shape, numpy_dtype(source.read.spec.dtype))
        request = dataclasses.replace(source.read, box=box)
        read_tensorstore.read_part(source.database, request, chunk.index, whole)
        chunks[place] = whole

    with collective(group, f"reading shared data, {which}"):
        threads.run_in_threads([functools.partial(read, place) for place in range(len(own))])
    outgoing: list[list[Array]] = [[np.empty(0, np.uint8)] for _ in range(group.num_ranks)]
    for chunk, whole in zip(own, chunks, strict=True):
        offset = sources[chunk.array].read.grid.box(chunk.index).offset
        for part in chunk.parts:
            values = np.ascontiguousarray(whole[part.box.relative_to(offset).slices()])
            outgoing[part.rank].append(values.reshape(-1).view(np.uint8))
    return [np.concatenate(parts) for parts in outgoing]


def _incoming_bytes(
    chunks: Sequence[SharedChunk], arrays: Mapping[str, StoredArray], group: Coordinator
) -> list[int]:
    sizes = [0] * group.num_ranks
    for chunk in chunks:
        itemsize = arrays[chunk.array].spec.itemsize_bytes
        for part in chunk.parts:
            if part.rank == group.rank:
                sizes[chunk.reader] += part.box.num_elements * itemsize
    return sizes


def _deliver(
    chunks: Sequence[SharedChunk],
    incoming: Sequence[Bytes],
    wanted: Sequence[SharedRequest],
    rank: int,
) -> None:
    """Splits the received data, in the order of the readers."""
    begun = [0] * len(incoming)
    for chunk in chunks:
        for part in chunk.parts:
            if part.rank != rank:
                continue
            target = wanted[part.want]
            dtype = numpy_dtype(target.read.spec.dtype)
            begin = begun[chunk.reader]
            begun[chunk.reader] = end = begin + part.box.num_elements * dtype.itemsize
            values = incoming[chunk.reader][begin:end].view(dtype).reshape(part.box.shape)
            target.deliver(part.box, values)
