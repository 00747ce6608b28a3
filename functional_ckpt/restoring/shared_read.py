"""Shared reads: one rank reads each chunk that several need, and sends them its parts."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias, cast

import numpy as np

from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.share_plan import Region, SharedChunk, StoredArray, plan_sharing
from functional_ckpt.core.arrays.spec import Array, ArraySpec, Box, numpy_dtype
from functional_ckpt.distributed.collective import collective
from functional_ckpt.distributed.coordinator import Bytes, Coordinator
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.format.reader import ArrayReader
from functional_ckpt.runtime import threads

ROUND_BYTES = 64 * 2**20
"""Bytes of other ranks' data that a rank holds, once to send and once to receive: two chunks of the
largest size. Chosen to bound memory, not measured."""


Delivered: TypeAlias = Collection[tuple[int, tuple[int, ...]]]
"""Chunks that need not be read any more: the index of the request, the chunk's index."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Want:
    """A region that this rank restores."""

    array: str
    item: int
    number: int
    reader: ArrayReader
    request: ReadRequest

    @property
    def grid(self) -> ChunkGrid:
        """The array's chunks."""
        return cast("ChunkGrid", self.request.grid)


def read_shared(
    coordinator: Coordinator,
    names: Sequence[str],
    readers: Sequence[ArrayReader | None],
    requests: Sequence[Sequence[ReadRequest]],
) -> list[Delivered]:
    """Reads the chunks that several ranks need, once each, and delivers the parts; a collective.

    Each round ends with a collective, so that a failure of one rank is raised on all.

    Returns:
        The delivered chunks of each item.

    Raises:
        CoordinationError: Another rank failed or has exited.
    """
    wanted = [
        _Want(f"{name}/{request.name}", item, number, reader, request)
        for item, (name, reader, of_item) in enumerate(zip(names, readers, requests, strict=True))
        if reader is not None
        for number, request in enumerate(of_item)
        if request.grid is not None
    ]
    delivered: list[set[tuple[int, tuple[int, ...]]]] = [set() for _ in names]
    arrays, wants = _exchange_wants(coordinator, wanted)
    rounds = plan_sharing(arrays, wants, round_bytes=ROUND_BYTES)
    if not rounds:
        return list(delivered)
    sources = {each.array: each for each in wanted}
    channel = coordinator.channel()
    try:
        for number, chunks in enumerate(rounds):
            own = [chunk for chunk in chunks if chunk.reader == coordinator.rank]
            outgoing = _read_round(coordinator, own, sources, f"{number + 1} of {len(rounds)}")
            incoming = channel.all_to_all(outgoing, _incoming_bytes(chunks, arrays, coordinator))
            _deliver(chunks, incoming, wanted, coordinator.rank)
    finally:
        channel.close()
    for chunk in (chunk for chunks in rounds for chunk in chunks):
        for part in chunk.parts:
            if part.rank == coordinator.rank:
                want = wanted[part.want]
                delivered[want.item].add((want.number, chunk.index))
    return list(delivered)


def _exchange_wants(
    coordinator: Coordinator, wanted: Sequence[_Want]
) -> tuple[Mapping[str, StoredArray], list[list[Region]]]:
    """Returns the arrays that any rank needs, and the regions that each rank needs."""
    arrays = {
        each.array: (each.request.spec.dtype, *dataclasses.astuple(each.grid)) for each in wanted
    }
    own = [(each.array, each.request.box.offset, each.request.box.shape) for each in wanted]
    packed = zlib.compress(json.dumps([arrays, own]).encode(), 1)

    def unite(values: Sequence[bytes]) -> bytes:
        told = [json.loads(zlib.decompress(value)) for value in values]
        every = {name: array for arrays, _ in told for name, array in arrays.items()}
        return zlib.compress(json.dumps([every, [wants for _, wants in told]]).encode(), 1)

    found, wants = json.loads(
        zlib.decompress(coordinator.gather_broadcast("planning shared reads", packed, unite))
    )
    return {
        name: StoredArray(
            spec=ArraySpec(tuple(shape), dtype),
            grid=ChunkGrid(tuple(shape), tuple(chunk_shape), block_bytes),
        )
        for name, (dtype, shape, chunk_shape, block_bytes) in found.items()
    }, [
        [Region(name, Box(tuple(offset), tuple(shape))) for name, offset, shape in of]
        for of in wants
    ]


def _read_round(
    coordinator: Coordinator, own: Sequence[SharedChunk], sources: Mapping[str, _Want], which: str
) -> list[Bytes]:
    """Reads this rank's chunks of a round, and returns the parts for each rank."""
    chunks: list[Array] = [
        np.empty(
            sources[chunk.array].grid.box(chunk.index).shape,
            numpy_dtype(sources[chunk.array].request.spec.dtype),
        )
        for chunk in own
    ]
    with collective(coordinator, f"shared reads, {which}"):
        threads.run_in_threads(
            [
                task
                for chunk, memory in zip(own, chunks, strict=True)
                for task in _chunk_tasks(sources[chunk.array], chunk.index, memory)
            ]
        )
    outgoing: list[list[Array]] = [[np.empty(0, np.uint8)] for _ in range(coordinator.num_ranks)]
    for chunk, whole in zip(own, chunks, strict=True):
        offset = sources[chunk.array].grid.box(chunk.index).offset
        for part in chunk.parts:
            values = np.ascontiguousarray(whole[part.box.relative_to(offset).slices()])
            outgoing[part.rank].append(values.reshape(-1).view(np.uint8))
    return [np.concatenate(parts) for parts in outgoing]


def _chunk_tasks(source: _Want, index: tuple[int, ...], memory: Array) -> list[Callable[[], None]]:
    """Returns tasks that read and verify one entire chunk."""
    box = source.grid.box(index)
    request = source.request._replace(box=box, destination=Destination.into(memory))
    return source.reader.tasks([request])


def _incoming_bytes(
    chunks: Sequence[SharedChunk], arrays: Mapping[str, StoredArray], coordinator: Coordinator
) -> list[int]:
    sizes = [0] * coordinator.num_ranks
    for chunk in chunks:
        itemsize = arrays[chunk.array].spec.itemsize_bytes
        for part in chunk.parts:
            if part.rank == coordinator.rank:
                sizes[chunk.reader] += part.box.num_elements * itemsize
    return sizes


def _deliver(
    chunks: Sequence[SharedChunk], incoming: Sequence[Bytes], wanted: Sequence[_Want], rank: int
) -> None:
    """Copies received parts to their destinations, in the order in which they were packed."""
    offsets = [0] * len(incoming)
    for chunk in chunks:
        for part in chunk.parts:
            if part.rank != rank:
                continue
            request = wanted[part.want].request
            dtype = numpy_dtype(request.spec.dtype)
            begin = offsets[chunk.reader]
            offsets[chunk.reader] = end = begin + part.box.num_elements * dtype.itemsize
            values = incoming[chunk.reader][begin:end].view(dtype).reshape(part.box.shape)
            destination = cast("Destination", request.destination)
            destination.memory()[part.box.relative_to(request.box.offset).slices()] = values
            destination.done()
