"""Reading through TensorStore: object stores, databases of many nodes, foreign arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import Array, ArraySpec, numpy_dtype
from functional_ckpt.core.tree import plain_json
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.format.database import NO_CACHE, REFUSALS, Database, read_error
from functional_ckpt.format.read_plan import Batch, ChunkPart, ChunkRead, ReadRequest, plan_reads
from functional_ckpt.format.reader import deliver


class TensorStoreReader:
    """Executes a read plan through a database; `reader.ArrayReader` says how it is used.

    Args:
        database: The item's arrays.
        is_zarr3: Whether foreign arrays are of zarr version 3, or 2.
        fills_missing: Whether chunks that a foreign array lacks are zeros, or damage.
    """

    def __init__(
        self, database: Database, *, is_zarr3: bool = True, fills_missing: bool = False
    ) -> None:
        self._database = database
        self._is_zarr3 = is_zarr3
        self._fills_missing = fills_missing

    def tasks(
        self,
        requests: Sequence[ReadRequest],
        *,
        delivered: Collection[tuple[int, tuple[int, ...]]] = (),
    ) -> list[Callable[[], None]]:
        """Plans the reads of requests."""
        batches = plan_reads(requests, delivered=delivered)
        return [functools.partial(self._read, batch) for batch in batches]

    def close(self) -> None:
        """Does nothing: TensorStore closes its files itself."""

    def _read(self, batch: Batch) -> None:
        # All are requested before the first is waited for, which hides the latency of each.
        futures = [read.part and self._request(read, read.part) for read in batch]
        for read, future in zip(batch, futures, strict=True):
            if read.part is None:
                self._read_foreign(read.request)
            else:
                deliver(
                    self._database.directory, read, read.part, self._wait(read, read.part, future)
                )

    def _request(self, read: ChunkRead, part: ChunkPart) -> Any:
        key = key_prefix(read.request.name) + part.key
        try:
            return self._database.store.read(key, byte_range=slice(part.first, part.end))
        except REFUSALS as error:
            raise self._error(read.request.name, error) from error

    def _wait(self, read: ChunkRead, part: ChunkPart, future: Any) -> Array:
        try:
            result = future.result()
        except REFUSALS as error:
            raise self._error(read.request.name, error) from error
        if result.state != "value" or len(result.value) != read.num_bytes:
            key = key_prefix(read.request.name) + part.key
            got = f"got {len(result.value)} bytes" if result.state == "value" else "found none"
            raise errors.CorruptCheckpointError(
                f"{self._database.directory}: array {read.request.name!r}, chunk {key!r}: expected "
                f"{read.num_bytes} bytes, {got}.",
                path=self._database.directory,
                key_path=read.request.name,
            )
        return np.frombuffer(result.value, np.uint8)

    def _read_foreign(self, request: ReadRequest) -> None:
        """Reads a region of a foreign array, whatever its chunks and codecs."""
        destination = request.destination
        memory = (
            np.empty(request.box.shape, numpy_dtype(request.spec.dtype))
            if destination is None
            else destination.memory()
        )
        store = self._database.store / key_prefix(request.name)
        spec = {
            "driver": "zarr3" if self._is_zarr3 else "zarr",
            "fill_missing_data_reads": self._fills_missing,
            "kvstore": store.spec().to_json(),
            "cache_pool": NO_CACHE,
        }
        try:
            array = ts.open(spec, open=True, read=True, context=self._database.context).result()
            if tuple(array.shape) != request.spec.shape:
                raise ValueError(f"shape {tuple(array.shape)}, expected {request.spec.shape}")
            ts.array(memory).write(array[request.box.slices()]).result()
        except REFUSALS as error:
            raise self._error(request.name, error) from error
        if destination is not None:
            destination.done()

    def _error(self, name: str, error: Exception) -> errors.CheckpointError:
        return read_error(self._database, f"array {name!r}", error)


def stored_spec(database: Database, name: str, *, is_zarr3: bool) -> ArraySpec:
    """Returns shape and dtype of a foreign array, checked before TensorStore sees them.

    Raises:
        CorruptCheckpointError: The metadata is missing, malformed, or of a dtype that cannot be
            read.
    """
    key = f"{key_prefix(name)}{'zarr.json' if is_zarr3 else '.zarray'}"
    try:
        data = database.store.read(key).result()
    except REFUSALS as error:
        raise read_error(database, f"metadata {key!r} of a stored array", error) from error
    try:
        if data.state != "value":
            raise ValueError("missing")
        record: Any = plain_json.parse(data.value)
        dtype = record["data_type"] if is_zarr3 else _zarr2_dtype(record["dtype"])
        if not isinstance(dtype, str):
            raise ValueError(f"dtype {dtype!r}")
        return ArraySpec(tuple(record["shape"]), dtype)
    except (*REFUSALS, AttributeError) as error:
        raise errors.CorruptCheckpointError(
            f"Metadata {key!r} of a stored array: {type(error).__name__}: {error}", key_path=name
        ) from error


def _zarr2_dtype(dtype: str) -> str:
    return np.dtype(dtype).name if dtype[:1] in "<>|" else dtype
