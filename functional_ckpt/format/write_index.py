"""The index of an item: a tree over the chunks of all ranks' data files, written in one go.

Its file also holds the small values: each array's `zarr.json`, those that are alike once, and the
plain numbers that Orbax reads as arrays.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.spec import ArraySpec, numpy_dtype
from functional_ckpt.core.files.file_plan import chunk_bytes, stored_chunks
from functional_ckpt.core.records import orbax
from functional_ckpt.core.records.orbax import MANIFEST
from functional_ckpt.core.records.records import (
    DIGEST_BYTES,
    PAGE_BYTES,
    DigestTable,
    FileRecord,
    digest_hex,
)
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.format.data_file import DataFile
from functional_ckpt.format.gathered import ArrayColumns
from functional_ckpt.format.ocdbt import Entries, Span, encode_manifest
from functional_ckpt.format.ocdbt_tree import Run, encode_tree
from functional_ckpt.format.write_files import WrittenBox, new_name
from functional_ckpt.storage.base import Storage

INDEX = "index.ocdbt"
_ENTRY_BYTES = 64  # of a key in a node, roughly

Scalars: TypeAlias = Sequence[tuple[str, ArraySpec, object]]


class IndexedArray(NamedTuple):
    """An array under one of its names.

    Attributes:
        name: The name.
        spec: The array.
        grid: Its chunks.
        boxes: Where its regions are; of a tied leaf, those of the array that holds its bytes.
        columns: Where its chunks are, instead of `boxes`.
    """

    name: str
    spec: ArraySpec
    grid: ChunkGrid
    boxes: Sequence[WrittenBox] = ()
    columns: ArrayColumns | None = None


def write_index(
    storage: Storage,
    item_directory: str,
    files: Sequence[str],
    arrays: Iterable[IndexedArray],
    scalars: Scalars,
    digests: bytes = b"",
    token: str = "",
) -> tuple[dict[str, FileRecord], DigestTable | None]:
    """Writes the index of an item; returns the records of its files, and the table of digests.

    Args:
        storage: The store.
        item_directory: The item.
        files: Its data files, which the columns of arrays number.
        arrays: Every array, under each name.
        scalars: Arrays of one chunk, given by value: name, spec, value.
        digests: The content of a table of digests; empty for none.
        token: Makes the name that of one save; see `new_name`.

    Raises:
        StorageError: The store refused.
    """
    entries = Entries()
    runs: list[Run] = []
    numbers = {file: number for number, file in enumerate(files)}
    small: list[tuple[bytes, bytes]] = []
    for name, spec, grid, boxes, columns in arrays:
        prefix = key_prefix(name).encode()
        small.append((prefix + b"zarr.json", _metadata(spec, grid.chunk_shape)))
        length = chunk_bytes(grid, spec.itemsize_bytes)
        if columns is not None:
            runs.append(Run(prefix + b"c/", columns.keys, columns.files, columns.offsets, length))
        for box in boxes:
            file = numbers[box.file]
            for _, key, start in stored_chunks(
                grid, box.box, spec.itemsize_bytes, is_tensor=box.is_tensor
            ):
                entries.add(prefix + key, file, box.offset + start, length)
    for name, spec, value in scalars:
        prefix = key_prefix(name).encode()
        small.append((prefix + b"zarr.json", _metadata(spec, spec.shape)))
        data = np.array(value, numpy_dtype(spec.dtype)).tobytes()
        small.append((prefix + orbax.only_chunk(spec).encode(), data))
    if not small:
        return {}, None
    name = new_name(INDEX, token)
    known: dict[bytes, int] = {}
    num_keys = len(entries.keys) + len(small) + sum(len(run.files) for run in runs)
    num_bytes = _ENTRY_BYTES * num_keys + len(digests)
    path = os.path.join(item_directory, name)
    with contextlib.closing(DataFile(storage, path, num_bytes)) as file:
        for key, value in small:
            offset = known.get(value)
            if offset is None:
                offset = known[value] = file.append(np.frombuffer(value, np.uint8))
            entries.add(key, len(files), offset, len(value))

        table = None
        if digests:
            offset = file.append(np.frombuffer(digests, np.uint8))
            table = DigestTable(name, offset, len(digests) // DIGEST_BYTES, _page_digests(digests))

        def append(node: bytes) -> Span:
            return Span(name, file.append(np.frombuffer(node, np.uint8)), len(node))

        root = encode_tree([*files, name], entries, append, runs)
        record = file.finish()
    manifest = encode_manifest(root, time.time_ns())
    storage.write(os.path.join(item_directory, MANIFEST), manifest)
    return {name: record, MANIFEST: FileRecord.of(manifest)}, table


def _page_digests(content: bytes) -> str:
    starts = range(0, len(content), PAGE_BYTES)
    return "".join([digest_hex(content[start : start + PAGE_BYTES]) for start in starts])


@functools.lru_cache(maxsize=4096)
def _metadata(spec: ArraySpec, chunk_shape: tuple[int, ...]) -> bytes:
    return json.dumps(orbax.zarr3_metadata(spec, chunk_shape)).encode()
