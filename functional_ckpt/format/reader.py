"""Verifies the bytes that were read and copies them to their destination, for all executors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, cast

import numpy as np

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import Array, numpy_dtype
from functional_ckpt.format.read_plan import ChunkPart, ChunkRead, ReadRequest


class ArrayReader(Protocol):
    """Reads arrays of one item. Close it after the last task."""

    def tasks(
        self,
        requests: Sequence[ReadRequest],
        *,
        delivered: Collection[tuple[int, tuple[int, ...]]] = (),
    ) -> list[Callable[[], None]]:
        """Plans the reads of requests; nothing is read yet.

        Args:
            requests: The regions to read.
            delivered: Chunks that are not to be read: index of the request, the chunk's index.

        Returns:
            Tasks for any threads. They raise `CorruptCheckpointError` for bytes that are not the
            recorded ones, and `StorageError` for refusals of the system.
        """
        ...

    def close(self) -> None:
        """Closes files."""


def verify(directory: str, read: ChunkRead, part: ChunkPart, data: Any, start: int = 0) -> None:
    """Raises `CorruptCheckpointError` unless bytes are the recorded ones.

    `data` are flat bytes: of the chunk's valid region, entire blocks or the last ones; `start`
    counts from `part.first`.
    """
    request = read.request
    if request.digests is None:
        return
    found = request.digests.check(part.block + start // request.digests.grid.block_bytes, data)
    if found is not None:
        raise errors.CorruptCheckpointError(
            f"{directory}: array {request.name!r}, chunk {part.key!r}, bytes from "
            f"{part.first + start + found.offset}: expected digest {found.expected}, got "
            f"{found.got}. The data changed after it was written; restore another step.",
            path=directory,
            key_path=request.name,
        )


def deliver(directory: str, read: ChunkRead, part: ChunkPart, data: Array) -> None:
    """Verifies all bytes of a read and copies them to their destination.

    `data` is flat uint8: bytes `part.first` to `part.end` of the chunk as it is stored.
    """
    if part.stored_shape is not None:
        stored = data.view(numpy_dtype(read.request.spec.dtype)).reshape(part.stored_shape)
        valid = np.ascontiguousarray(stored[tuple(slice(size) for size in part.valid_shape)])
        data = valid.reshape(-1).view(np.uint8)
    verify(directory, read, part, cast("Any", data))
    put(read, part, data)


def put(read: ChunkRead, part: ChunkPart, data: Array) -> None:
    """Copies verified bytes of a chunk's valid region to their destination."""
    destination = read.request.destination
    if destination is None:
        return
    if destination.send is not None and part.start is not None:
        done = 0

        def fill(memory: Array) -> None:
            nonlocal done
            memory[...] = data[done : done + len(memory)]
            done += len(memory)

        destination.send(part.start, len(data), fill)
    else:
        memory = destination.memory()[part.local]
        if part.skip is None:
            valid = data.view(memory.dtype).reshape(part.valid_shape)
            memory[...] = valid[part.inside.slices()]
        else:
            run = data[part.skip : part.skip + memory.nbytes]
            memory[...] = run.view(memory.dtype).reshape(memory.shape)
    destination.done()
