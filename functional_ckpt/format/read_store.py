"""Reading arrays of object stores: adjacent values, as the index names them, are one request."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import cast

import numpy as np

from functional_ckpt import errors
from functional_ckpt.format.index import Index, span_of
from functional_ckpt.format.ocdbt_decode import INLINE
from functional_ckpt.format.read_plan import Batch, ChunkPart, ChunkRead, ReadRequest, adjacent
from functional_ckpt.format.reader import deliver


class StoreReader:
    """Executes read plans with range requests; `reader.ArrayReader` says how it is used.

    Args:
        index: Where every value of the item is stored.
    """

    def __init__(self, index: Index) -> None:
        self._directory = index.directory
        self._index = index

    def tasks(
        self,
        requests: Sequence[ReadRequest],
        *,
        delivered: Collection[tuple[int, tuple[int, ...]]] = (),
    ) -> list[Callable[[], None]]:
        """Plans the reads of requests."""
        batches = self._index.plan(requests, delivered)
        return [functools.partial(self._read, batch) for batch in batches]

    def close(self) -> None:
        """Does nothing: a store has no open files."""

    def _read(self, batch: Batch) -> None:
        # All are requested before the first is waited for, which hides the latency of each.
        stored = [read for read in batch if read.file != INLINE]
        runs = list(adjacent(stored))
        files = self._index.files
        for run, data in zip(
            runs, self._index.read_spans([span_of(files, run) for run in runs]), strict=True
        ):
            if isinstance(data, errors.CheckpointError):
                raise _of_array(data, run[0].request.name)
            for read in run:
                self._deliver(read, data, read.offset - run[0].offset)
        for read in batch:
            if read.file == INLINE:
                values = self._index.inline[read.offset : read.offset + read.num_bytes]
                self._deliver(read, values, 0)

    def _deliver(self, read: ChunkRead, data: bytes | bytearray, start: int) -> None:
        values = np.frombuffer(data, np.uint8, read.num_bytes, start)
        deliver(self._directory, read, cast("ChunkPart", read.part), values)


def _of_array(error: errors.CheckpointError, name: str) -> errors.CheckpointError:
    if not isinstance(error, errors.CorruptCheckpointError):
        return error
    return errors.CorruptCheckpointError(
        f"Array {name!r} cannot be read: {error.message}", path=error.path, key_path=name
    )
