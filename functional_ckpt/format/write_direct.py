"""Chunks straight into data files, and the tree over them written in one go.

The same databases as `write_tensorstore` makes, without TensorStore: a value is copied once,
into the buffer that goes to the disk, and costs a few microseconds whatever its size. Object stores
are left to `write_tensorstore`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import xxhash

from functional_ckpt.core.arrays.chunks import DIGEST_BLOCK_BYTES, ChunkGrid
from functional_ckpt.core.arrays.digests import BlockDigests, digest_blocks
from functional_ckpt.core.arrays.spec import Array, ArraySpec, Box, numpy_dtype
from functional_ckpt.core.records import orbax
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.format.data_file import DataFile
from functional_ckpt.format.index import open_tree, span_reader
from functional_ckpt.format.ocdbt import MANIFEST, Entries, Span, encode_manifest, encode_tree
from functional_ckpt.format.tuning import BYTES_PER_FILE, NUM_THREADS, QUICK_BYTES, STEP_BYTES
from functional_ckpt.format.write_tensorstore import ArrayWrite, Digests, padded
from functional_ckpt.runtime.threads import gc_paused, run_in_threads
from functional_ckpt.storage.base import Storage

_FOLDER = "d"
_ZEROS = np.zeros(STEP_BYTES, np.uint8)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The result of writing arrays.

    Attributes:
        digests: Of every chunk.
        files: The records of the new files, by path relative to the item.
    """

    digests: Digests
    files: Mapping[str, FileRecord]


def write_arrays(
    storage: Storage,
    item_directory: str,
    child: str,
    arrays: Sequence[ArrayWrite],
    scalars: Iterable[tuple[str, ArraySpec, object]] = (),
    tied: Mapping[str, tuple[str, ChunkGrid]] | None = None,
    *,
    num_threads: int = NUM_THREADS,
) -> Written:
    """Writes arrays into one database, in one or several data files.

    Args:
        storage: The file system.
        item_directory: The item.
        child: The database's directory relative to the item; empty for the item's own.
        arrays: What to write; at least one, or a scalar.
        scalars: Arrays of one chunk, given by value: name, spec, value.
        tied: Name of a tied leaf -> name and grid of the array that holds its bytes.
        num_threads: How many are busy, each with a file of its own.

    Raises:
        StorageError: The file system refused.
    """
    path = os.path.join(item_directory, child) if child else item_directory
    if child:
        storage.make_directory(path, parents=False)
    storage.make_directory(os.path.join(path, _FOLDER), parents=False)
    with contextlib.ExitStack() as pause:
        if sum(array.data.nbytes for array in arrays) < QUICK_BYTES:
            pause.enter_context(gc_paused())
        return _write_arrays(
            storage, item_directory, child, arrays, scalars, tied or {}, num_threads
        )


def _write_arrays(
    storage: Storage,
    item_directory: str,
    child: str,
    arrays: Sequence[ArrayWrite],
    scalars: Iterable[tuple[str, ArraySpec, object]],
    tied: Mapping[str, tuple[str, ChunkGrid]],
    num_threads: int,
) -> Written:
    path = os.path.join(item_directory, child) if child else item_directory
    groups = _spread(arrays)
    names = [f"{_FOLDER}/{uuid.uuid4().hex}" for _ in groups]
    parts = [_Part(place, os.path.join(path, name)) for place, name in enumerate(names)]
    try:
        tasks: list[Callable[[], None]] = [
            functools.partial(part.write, storage, group, is_whole=part is not parts[-1])
            for part, group in zip(parts, groups, strict=True)
        ]
        run_in_threads(tasks, num_threads)
        *others, last = parts
        for part in others:
            last.entries.extend(part.entries)
        last.add_metadata(arrays, scalars)
        last.tie(tied)
        files = last.complete(storage, path, names)
        for part in others:
            files[names[part.place]] = part.record
    finally:
        for part in parts:
            part.close()
    digests: Digests = {}
    for part in parts:
        for name, chunks in part.digests.items():
            if name in digests:
                digests[name].update(chunks)
            else:
                digests[name] = chunks
    return Written(digests=digests, files=_below(child, files))


def _below(child: str, files: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    return {f"{child}/{name}" if child else name: record for name, record in files.items()}


_Chunk: TypeAlias = "tuple[ArrayWrite, Box | None, bytes, int]"
"""An array, the part of it (None: all of it), the key relative to the array and the position."""


def _spread(arrays: Sequence[ArrayWrite]) -> list[list[_Chunk]]:
    """The chunks of each data file: neighbours stay together, and all files are of like size."""
    total = sum(array.data.nbytes for array in arrays)
    count = min(NUM_THREADS, max(1, total // BYTES_PER_FILE))
    limit = -(-total // count)
    groups: list[list[_Chunk]] = [[]]
    filled = 0
    for array in arrays:
        for chunk in _chunks(array):
            if filled >= len(groups) * limit:
                groups.append([])
            groups[-1].append(chunk)
            box = chunk[1]
            size = array.data.nbytes if box is None else box.num_elements * array.data.itemsize
            filled += size
    for group in groups:  # arrays with a waiting caller come first
        group.sort(key=lambda chunk: chunk[0].on_copied is None)
    return groups


def _chunks(array: ArrayWrite) -> Iterable[_Chunk]:
    grid = array.grid
    if array.box.shape == grid.chunk_shape:
        if grid.chunk_shape == grid.shape:
            return ((array, None, _only_key(len(grid.shape)), 0),)
        index = tuple(o // c for o, c in zip(array.box.offset, grid.chunk_shape, strict=True))
        return ((array, None, grid.key(index).encode(), grid.position(index)),)
    return [
        (array, grid.box(index), grid.key(index).encode(), grid.position(index))
        for index in grid.indices(array.box)
    ]


@functools.cache
def _only_key(num_dims: int) -> bytes:
    return b"c" + b"/0" * num_dims


class _Part:
    """One data file under construction, and its contents."""

    def __init__(self, place: int, path: str) -> None:
        self.place = place
        self.entries = Entries()
        self.digests: Digests = {}
        self.record = FileRecord(0, "")
        self._path = path
        self._file: DataFile | None = None

    def write(self, storage: Storage, chunks: Sequence[_Chunk], *, is_whole: bool) -> None:
        """Writes chunks; `is_whole` says that nothing else will follow."""
        size_bytes = sum(
            (array.data.nbytes if box is None else box.num_elements * array.data.itemsize)
            for array, box, _, _ in chunks
        )
        are_lent = all(array.is_stable for array, _, _, _ in chunks)
        self._file = file = DataFile(storage, self._path, size_bytes, is_lent=are_lent)
        digests, add = self.digests, self.entries.add
        for array, box, key, position in chunks:
            data = array.data
            if box is not None:
                data = data[box.relative_to(array.box.offset).slices()]
            is_lent = is_stable = array.is_stable
            if not data.flags.c_contiguous:  # a copy of our own, of one chunk per thread
                data, is_lent, is_stable = np.ascontiguousarray(data), False, True
            found = digests.get(array.name)
            if found is None:
                found = digests[array.name] = {}
            place, found[position] = _append(
                file, data, array.grid, is_lent=is_lent, is_stable=is_stable
            )
            if array.on_copied is not None:
                array.on_copied(data.nbytes)
            add(key_prefix(array.name).encode() + key, self.place, *place)
        if is_whole:
            self.record = file.finish()
            file.close()  # its memory is for the next one
            storage.sync(self._path)  # while the others are still writing

    def add_metadata(
        self, arrays: Sequence[ArrayWrite], scalars: Iterable[tuple[str, ArraySpec, object]]
    ) -> None:
        """Every array's `zarr.json`: those that are alike are stored once."""
        for array in arrays:
            if array.writes_metadata:
                self._put(
                    key_prefix(array.name) + "zarr.json",
                    _metadata(array.spec, array.grid.chunk_shape),
                )
        for name, spec, value in scalars:
            self._put(key_prefix(name) + "zarr.json", _metadata(spec, spec.shape))
            data = np.array(value, numpy_dtype(spec.dtype)).tobytes()
            self._put(key_prefix(name) + orbax.only_chunk(spec), data)

    @functools.cached_property
    def _places(self) -> dict[bytes, int]:
        return {}

    def _put(self, key: str, value: bytes) -> None:
        offset = self._places.get(value)
        if offset is None:
            offset = self._places[value] = self._open.append(np.frombuffer(value, np.uint8))
        self.entries.add(key.encode(), self.place, offset, len(value))

    @property
    def _open(self) -> DataFile:
        if self._file is None:
            raise RuntimeError("nothing was written yet")
        return self._file

    def tie(self, tied: Mapping[str, tuple[str, ChunkGrid]]) -> None:
        """A second range of keys over the same bytes, so that every reader sees both names."""
        if not tied:
            return
        entries = self.entries
        columns = zip(entries.files, entries.offsets, entries.lengths, strict=True)
        places = dict(zip(entries.keys, columns, strict=True))
        for name, (owner, grid) in tied.items():
            for key in ("zarr.json", *map(grid.key, grid.indices())):
                place = places[(key_prefix(owner) + key).encode()]
                entries.add((key_prefix(name) + key).encode(), *place)

    def complete(self, storage: Storage, path: str, names: Sequence[str]) -> dict[str, FileRecord]:
        """Writes the tree behind the last value, and the manifest."""
        file = self._open

        def append(node: bytes) -> Span:
            offset = file.append(np.frombuffer(node, np.uint8))
            return Span(names[self.place], offset, len(node))

        root = encode_tree(names, self.entries, append)
        self.record = file.finish()
        if file.is_large:  # a small one is synced with all the others, in one go of the journal
            storage.sync(self._path)
        manifest = encode_manifest(root, time.time_ns())
        storage.write(os.path.join(path, MANIFEST), manifest)
        record = FileRecord(len(manifest), xxhash.xxh3_64_hexdigest(manifest))
        return {names[self.place]: self.record, MANIFEST: record}

    def close(self) -> None:
        """Gives the file back."""
        if self._file is not None:
            self._file.close()


def _append(
    file: DataFile, data: Array, grid: ChunkGrid, *, is_lent: bool, is_stable: bool
) -> tuple[tuple[int, int], str]:
    """Adds a chunk; returns its offset and stored bytes, and the digests of its valid region.

    Data that is not stable may change while it is read: it is digested after it was copied, so that
    the digests are those of the bytes in the file.
    """
    flat = data.reshape(-1).view(np.uint8)
    missing_bytes = 0
    if data.shape != grid.chunk_shape:  # at the array's end
        missing_bytes = math.prod(grid.chunk_shape) * data.itemsize - len(flat)
        if data.shape[1:] != grid.chunk_shape[1:]:
            own = data if is_stable else data.copy()
            whole = padded(own, grid).reshape(-1).view(np.uint8)
            return (file.append(whole), len(whole)), digest_blocks(
                own.reshape(-1).view(np.uint8).data
            )
    if not missing_bytes and len(flat) <= DIGEST_BLOCK_BYTES:
        own = flat if is_stable else flat.copy()
        digest = xxhash.xxh3_64_hexdigest(own.data) if len(own) else ""
        return (file.append(own), len(own)), digest
    offset = 0
    blocks = BlockDigests()
    for start in range(0, len(flat), STEP_BYTES):
        step = flat[start : start + STEP_BYTES]
        if is_stable:
            blocks.update(step.data)
            place = file.append(step, is_lent=is_lent)
        else:
            place = file.append(step, on_copied=blocks.update)
        offset = offset if start else place
    for start in range(0, missing_bytes, STEP_BYTES):
        file.append(_ZEROS[: missing_bytes - start])
    return (offset, len(flat) + missing_bytes), blocks.hexdigests()


@functools.lru_cache(maxsize=4096)
def _metadata(spec: ArraySpec, chunk_shape: tuple[int, ...]) -> bytes:
    return json.dumps(orbax.zarr3_metadata(spec, chunk_shape)).encode()


# ------------------------------------------------------------------------------------ merging


def merge_children(
    storage: Storage,
    item_directory: str,
    children: Sequence[str],
    tied: Mapping[str, tuple[str, ChunkGrid]],
) -> dict[str, FileRecord] | None:
    """Makes every child's arrays visible in the item's own database; copies trees, not data.

    Returns:
        The records of the new files; None, with nothing written, if a child was written by
        TensorStore, or there are no keys.
    """
    names: list[str] = [f"{_FOLDER}/{uuid.uuid4().hex}"]
    merged = Entries()
    for child in children:
        path = os.path.join(item_directory, child)
        numbers: dict[str, int] = {}
        for leaf in open_tree(storage, path, span_reader(storage, path)).read():
            if leaf.node.inline:
                return None
            table = [
                numbers.setdefault(file, len(names) + len(numbers)) for file in leaf.node.files
            ]
            entries = leaf.node.entries
            merged.keys += leaf.keys
            merged.files.extend(map(table.__getitem__, entries.files))
            merged.offsets.extend(entries.offsets)
            merged.lengths.extend(entries.lengths)
        names += [f"{child}/{file}" for file in numbers]
    if not merged.keys:
        return None
    storage.make_directory(os.path.join(item_directory, _FOLDER), parents=False)
    part = _Part(0, os.path.join(item_directory, names[0]))
    try:
        part.write(storage, (), is_whole=False)
        part.entries = merged
        part.tie(tied)
        return part.complete(storage, item_directory, names)
    finally:
        part.close()
