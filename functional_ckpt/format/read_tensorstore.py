"""Chunks out of databases, straight into their destination, each verified as it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import tensorstore as ts

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import (
    DIGEST_BLOCK_BYTES,
    ChunkGrid,
    digest_offsets,
    run_in_chunk,
    whole_blocks,
)
from functional_ckpt.core.arrays.spec import ArraySpec, Box, numpy_dtype
from functional_ckpt.core.tree import plain_json
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.format.database import (
    NO_CACHE,
    REFUSALS,
    SMALL_CHUNK_BYTES,
    Database,
    as_bytes,
    digest_blocks,
    open_array,
    read_error,
)

__all__ = [
    "ArrayRead",
    "compare_digests",
    "read_array",
    "read_foreign_array",
    "read_part",
    "request_part",
    "stored_spec",
    "verify_part",
]

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArrayRead:
    """One region of one array, to be read.

    Attributes:
        name: The name under which the bytes are stored.
        spec: The array.
        grid: Its chunks.
        digests: 16 hex digits per digest block, or None to read unverified.
        box: The wanted region.
    """

    name: str
    spec: ArraySpec
    grid: ChunkGrid
    digests: str | None
    box: Box


def read_array(database: Database, read: ArrayRead, destination: Array) -> None:
    """Fills `destination` with a region of an array and verifies every byte that it used.

    Args:
        database: From `open_for_reading`.
        read: What to read.
        destination: Host memory of the region's shape; may be strided.

    Raises:
        CorruptCheckpointError: A chunk is missing, of the wrong size, or does not match its digest.
    """
    for index in read.grid.indices(read.box):
        read_part(database, read, index, destination)


def request_part(database: Database, read: ArrayRead, index: tuple[int, ...]) -> None:
    """Asks for a small chunk ahead of `read_part`: many at once hide each one's latency."""
    chunk = read.grid.box(index)
    size_bytes = chunk.num_elements * read.spec.itemsize_bytes
    is_small = size_bytes <= SMALL_CHUNK_BYTES and not read.grid.is_padded(index)
    if is_small and read.box.contains(chunk):
        key = f"{key_prefix(read.name)}{read.grid.key(index)}"
        database.requested[key] = database.store.read(key)


def read_part(
    database: Database, read: ArrayRead, index: tuple[int, ...], destination: Array
) -> None:
    """As `read_array`, for the part of one chunk; parts may be read on several threads."""
    chunk = read.grid.box(index)
    common = chunk.intersect(read.box)
    if common is None:
        return
    part = destination[common.relative_to(read.box.offset).slices()]
    inside = common.relative_to(chunk.offset)
    if common == chunk and part.flags.c_contiguous:
        _read_chunk(database, read, index, part)
    elif (run := run_in_chunk(read.grid, index, inside, read.spec.itemsize_bytes)) is not None:
        part[...] = _read_run(database, read, index, *run, part)
    else:
        whole = np.empty(chunk.shape, destination.dtype)  # bounded: one chunk per thread
        _read_chunk(database, read, index, whole)
        part[...] = whole[inside.slices()]


def _read_run(
    database: Database,
    read: ArrayRead,
    index: tuple[int, ...],
    start: int,
    end: int,
    like: Array,
) -> Array:
    """A byte range of a chunk, read and verified in complete digest blocks."""
    size_bytes = read.grid.box(index).num_elements * read.spec.itemsize_bytes
    first, last = start, end
    if read.digests is not None:
        first, last = whole_blocks(start, end, size_bytes)
    data = _read_key(database, read, index, first, last)
    if read.digests is not None:
        got = digest_blocks(np.frombuffer(data, np.uint8))
        compare_digests(database.directory, read, index, got, first // DIGEST_BLOCK_BYTES)
    wanted = np.frombuffer(data, np.uint8, end - start, start - first)
    return wanted.view(like.dtype).reshape(like.shape)


def _read_key(
    database: Database, read: ArrayRead, index: tuple[int, ...], first: int, last: int
) -> bytes:
    """Bytes `first` to `last` of a chunk as it is stored."""
    key = f"{key_prefix(read.name)}{read.grid.key(index)}"
    try:
        request = database.requested.pop(key, None)
        if request is None:
            request = database.store.read(key, byte_range=slice(first, last))
        result = request.result()
    except REFUSALS as error:
        raise read_error(database, f"array {read.name!r}", error) from error
    if result.state != "value" or len(result.value) != last - first:
        raise errors.CorruptCheckpointError(
            f"{database.directory}: chunk {key!r} is {result.state} with "
            f"{len(result.value)} bytes; expected {last - first} bytes.",
            path=database.directory,
            key_path=read.name,
        )
    database.count(last - first)
    return result.value


def verify_part(database: Database, read: ArrayRead, index: tuple[int, ...]) -> None:
    """Reads one chunk and verifies it, without keeping it."""
    whole = np.empty(read.grid.box(index).shape, numpy_dtype(read.spec.dtype))
    _read_chunk(database, read, index, whole)


def _read_chunk(database: Database, read: ArrayRead, index: tuple[int, ...], out: Array) -> None:
    """One chunk's valid region into contiguous memory, verified."""
    if out.nbytes <= SMALL_CHUNK_BYTES and not read.grid.is_padded(index):
        as_bytes(out)[:] = _read_key(database, read, index, 0, out.nbytes)
    else:
        try:
            store = database.arrays.get(read.name)
            if store is None:
                store = open_array(
                    database.store, read.name, read.spec, read.grid, database.context
                )
                database.arrays[read.name] = store
            ts.array(out).write(store[read.grid.box(index).slices()]).result()
        except REFUSALS as error:
            raise read_error(database, f"array {read.name!r}", error) from error
        database.count(out.nbytes)
    if read.digests is not None:
        compare_digests(database.directory, read, index, digest_blocks(out), 0)


def compare_digests(
    directory: str, read: ArrayRead, index: tuple[int, ...], got: str, first_block: int
) -> None:
    """Raises unless `got` are the digests of a chunk from block `first_block` on."""
    offsets = digest_offsets(read.grid, read.spec.itemsize_bytes)
    begin = 16 * (offsets[read.grid.position(index)] + first_block)
    expected = (read.digests or "")[begin : begin + len(got)]
    if got == expected:
        return
    block = next(i for i in range(0, len(got), 16) if got[i : i + 16] != expected[i : i + 16])
    raise errors.CorruptCheckpointError(
        f"{directory}: array {read.name!r}, chunk {read.grid.key(index)!r}, bytes from "
        f"{(first_block + block // 16) * DIGEST_BLOCK_BYTES}: expected digest "
        f"{expected[block : block + 16]}, got {got[block : block + 16]}. The data changed after it "
        "was written; restore another step.",
        path=directory,
        key_path=read.name,
    )


# --- foreign arrays


def stored_spec(
    database: Database, name: str, *, is_zarr3: bool
) -> tuple[ArraySpec, Mapping[str, Any]]:
    """Shape and dtype of a foreign array, checked before TensorStore sees them.

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
        record = plain_json.parse(data.value)
        dtype = record["data_type"] if is_zarr3 else _zarr2_dtype(record["dtype"])
        if not isinstance(dtype, str):
            raise ValueError(f"dtype {dtype!r}")
        return ArraySpec(tuple(record["shape"]), dtype), record
    except (*REFUSALS, AttributeError) as error:
        raise errors.CorruptCheckpointError(
            f"Metadata {key!r} of a stored array: {type(error).__name__}: {error}", key_path=name
        ) from error


def _zarr2_dtype(dtype: str) -> str:
    return np.dtype(dtype).name if dtype[:1] in "<>|" else dtype


def read_foreign_array(
    database: Database,
    name: str,
    destination: Array,
    *,
    box: Box,
    shape: tuple[int, ...],
    is_zarr3: bool,
    fills_missing: bool = False,
) -> None:
    """Fills `destination` with `box` of a foreign array, whatever its codecs."""
    spec = {
        "driver": "zarr3" if is_zarr3 else "zarr",
        "fill_missing_data_reads": fills_missing,
        "kvstore": (database.store / key_prefix(name)).spec().to_json(),
        "cache_pool": NO_CACHE,
    }
    try:
        store = ts.open(spec, open=True, read=True, context=database.context).result()
        if tuple(store.shape) != shape:
            raise ValueError(f"shape {tuple(store.shape)}, expected {shape}")
        ts.array(destination).write(store[box.slices()]).result()
    except REFUSALS as error:
        raise read_error(database, f"array {name!r}", error) from error
