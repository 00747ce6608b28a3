"""Reading foreign arrays through TensorStore: their chunks, codecs and databases are its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import ArraySpec, numpy_dtype
from functional_ckpt.core.tree import plain_json
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.format.database import NO_CACHE, REFUSALS, Database, read_error
from functional_ckpt.format.read_plan import Batch, ReadRequest, plan_reads


class TensorStoreReader:
    """Reads foreign arrays, each at once; `reader.ArrayReader` says how it is used.

    Args:
        database: The item's arrays.
        is_zarr3: Whether they are of zarr version 3, or 2.
        fills_missing: Whether chunks that an array lacks are zeros, or damage.
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
        for read in batch:
            self._read_array(read.request)

    def _read_array(self, request: ReadRequest) -> None:
        """Reads a region of an array, whatever its chunks and codecs."""
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
            raise read_error(self._database, f"array {request.name!r}", error) from error
        if destination is not None:
            destination.done()


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
        dtype = record["data_type" if is_zarr3 else "dtype"]
        if not is_zarr3 and dtype[:1] in "<>|":
            dtype = np.dtype(dtype).name
        if not isinstance(dtype, str):
            raise ValueError(f"dtype {dtype!r}")
        return ArraySpec(tuple(record["shape"]), dtype)
    except (*REFUSALS, AttributeError) as error:
        raise errors.CorruptCheckpointError(
            f"Metadata {key!r} of a stored array: {type(error).__name__}: {error}", key_path=name
        ) from error
