"""Reads complete arrays from data files, many at a time: few system calls, one copy per byte.

The tree of a database has the location of every value. Adjacent values, as a save writes them, are
read by one call into the memory of many tensors, and verified while they are cached. Databases
other than one plain leaf, and parts of arrays, are read through TensorStore.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import xxhash

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import DIGEST_BLOCK_BYTES, ChunkGrid
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.format.ocdbt import is_inside, read_entries
from functional_ckpt.format.read_tensorstore import ArrayRead, compare_digests
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local_files import open_regular
from functional_ckpt.storage.system_errors import clear_errors, is_absence

__all__ = ["DirectReader", "ReadRequest"]

Array: TypeAlias = "np.ndarray[Any, Any]"

# Read and verified while it is in the cache.
_STEP_BYTES = 2**20
_BATCH_BYTES = 8 * 2**20
# Number of batches to prefetch, so that a disk works at full speed.
_NUM_AHEAD = 8
_PADDING_BYTES = 4096
_BATCH_VALUES = 512  # the system takes up to 1,024 buffers per call


class ReadRequest(NamedTuple):
    """A complete array and its destination.

    Attributes:
        name: The name under which the bytes are stored.
        spec: Shape and dtype.
        chunk_shape: How it is cut.
        digests: 16 hex digits per digest block, or None to read unverified.
        destination: Contiguous host memory; None where `send` takes the bytes.
        finish: Called once all of it is there, on any thread.
        send: Takes an offset and a number of bytes. It provides memory to fill, piece by piece, on
            the thread that calls it.
    """

    name: str
    spec: ArraySpec
    chunk_shape: tuple[int, ...]
    digests: str | None
    destination: Array | None
    finish: Callable[[], None]
    send: Callable[[int, int, Callable[[Array], None]], None] | None = None


@dataclasses.dataclass(slots=True)
class _Pending:
    """An array under way."""

    wanted: ReadRequest
    num_values: int
    is_one: bool


_Extent: TypeAlias = "tuple[int, int, int, Array | None, int, _Pending]"
"""File, offset, bytes, where they go (None: they are sent), which chunk of its array it is, and the
array."""


class DirectReader:
    """Reads arrays of one item. Use it once, and close it.

    Args:
        storage: The file system.
        directory: The item.
    """

    def __init__(self, storage: Storage, directory: str) -> None:
        self._directory = directory
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        self._values: list[_Extent] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}
        self._files: list[str] = []
        self.size_bytes = 0
        try:
            found = read_entries(storage, directory)
        except errors.StorageError as error:
            if not is_absence(error):
                raise
            found = None  # TensorStore reports the missing file
        if found is not None:
            self._files, entries = found
            columns = zip(entries.files, entries.offsets, entries.lengths, strict=True)
            self._places = dict(zip(entries.keys, columns, strict=True))

    def add(self, wanted: ReadRequest) -> bool:
        """Whether it will read this array; otherwise use TensorStore."""
        place = wanted.destination
        if not self._places or (place is not None and not place.flags.c_contiguous):
            return False
        shape, chunk_shape = wanted.spec.shape, wanted.chunk_shape
        if chunk_shape[1:] != shape[1:] or not wanted.spec.num_elements:
            return False  # chunks are not runs of the array's bytes
        flat = None if place is None else place.reshape(-1).view(np.uint8)
        prefix = key_prefix(wanted.name).encode()
        size_bytes, stored_bytes, keys = _cut(shape, chunk_shape, wanted.spec.itemsize_bytes)
        pending = _Pending(wanted, len(keys), len(keys) == 1)
        for number, key in enumerate(keys):
            at = self._places.get(prefix + key)
            if at is None or at[2] != stored_bytes:
                state = "none" if at is None else f"{at[2]} bytes"
                raise errors.CorruptCheckpointError(
                    f"{self._directory}: chunk {(prefix + key).decode()!r}: expected "
                    f"{stored_bytes} bytes, found {state}.",
                    path=self._directory,
                    key_path=wanted.name,
                )
            start = number * stored_bytes
            end = size_bytes if len(keys) == 1 else min(start + stored_bytes, size_bytes)
            part = None if flat is None else flat if len(keys) == 1 else flat[start:end]
            self._values.append((at[0], at[1], end - start, part, number, pending))
        self.size_bytes += size_bytes
        return True

    def tasks(self) -> list[Callable[[], None]]:
        """The tasks that read all requests, in order of the files; they run on any threads."""
        self._values.sort(key=lambda value: value[:2])
        for file in sorted({value[0] for value in self._values}):
            self._descriptors[file] = self._open(self._files[file])
        batches = list(self._batches())
        for batch in batches[:_NUM_AHEAD]:
            self._announce(batch)
        pairs = itertools.zip_longest(batches, batches[_NUM_AHEAD:], fillvalue=())
        return [functools.partial(self._read, batch, later) for batch, later in pairs]

    def _announce(self, batch: Sequence[_Extent]) -> None:
        """Prefetches the next batches, while earlier ones are verified."""
        for file, begin, end in _spans(batch):
            _advise(self._descriptors[file], begin, end - begin, "POSIX_FADV_WILLNEED")

    def _open(self, file: str) -> int:
        path = os.path.join(self._directory, file)
        if not is_inside(file):
            raise errors.CorruptCheckpointError(
                f"{self._directory}: data file {file!r} is outside the checkpoint directory.",
                path=self._directory,
            )
        try:
            descriptor, _ = open_regular(path)
        except errors.StorageError as error:
            if not is_absence(error):
                raise
            raise errors.CorruptCheckpointError(
                f"{path}: the file is missing.", path=path
            ) from error
        # Read once: the kernel need not note, page by page, which of them to keep.
        _advise(descriptor, 0, 0, "POSIX_FADV_NOREUSE")
        return descriptor

    def _batches(self) -> Iterator[list[_Extent]]:
        batch: list[_Extent] = []
        filled = 0
        for value in self._values:
            if batch and (filled >= _BATCH_BYTES or len(batch) >= _BATCH_VALUES):
                yield batch
                batch, filled = [], 0
            batch.append(value)
            filled += value[2]
        if batch:
            yield batch

    def _read(self, batch: Sequence[_Extent], later: Sequence[_Extent]) -> None:
        self._announce(later)
        run: list[_Extent] = []
        run_bytes = 0
        for value in batch:
            if value[3] is None:
                self._send(value)
                continue
            if value[2] > _STEP_BYTES:
                self._read_large(value)
                continue
            is_next = run and run[-1][0] == value[0] and run[-1][1] + run[-1][2] == value[1]
            if not is_next or run_bytes + value[2] > _STEP_BYTES:
                if run:
                    self._read_run(run)
                run, run_bytes = [], 0
            run.append(value)
            run_bytes += value[2]
        if run:
            self._read_run(run)

    def _read_run(self, run: Sequence[_Extent]) -> None:
        """Adjacent values that are read together."""
        views = [memoryview(cast("Any", value[3])) for value in run]
        total = run[-1][1] + run[-1][2] - run[0][1]
        with clear_errors("read", self._directory):
            got = os.preadv(self._descriptors[run[0][0]], views, run[0][1])
        if got != total:
            for value, view in zip(run, views, strict=True):
                self._fill(value, view, 0)
        for value, view in zip(run, views, strict=True):
            digests = value[5].wanted.digests
            if digests is not None:
                self._verify(value, view, 0, digests)
            self._count(value)

    def _read_large(self, value: _Extent) -> None:
        self._read_steps(value, 0, memoryview(cast("Any", value[3])))
        self._count(value)

    def _send(self, value: _Extent) -> None:
        wanted = value[5].wanted
        done = 0

        def fill(memory: Array) -> None:
            nonlocal done
            self._read_steps(value, done, memoryview(cast("Any", memory)))
            done += len(memory)

        if wanted.send is not None:
            wanted.send(value[4] * _stored_bytes(wanted), value[2], fill)
        self._count(value)

    def _read_steps(self, value: _Extent, begin: int, view: memoryview) -> None:
        """Reads, from a byte of the value on, as much as the view takes."""
        digests = value[5].wanted.digests
        for start in range(0, len(view), _STEP_BYTES):
            step = view[start : start + _STEP_BYTES]
            self._fill(value, step, begin + start)
            if digests is not None:
                self._verify(value, step, begin + start, digests)

    def _fill(self, value: _Extent, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            with clear_errors("read", self._directory):
                offset = value[1] + start + done
                got = os.preadv(self._descriptors[value[0]], [view[done:]], offset)
            if got == 0:
                name = value[5].wanted.name
                raise errors.CorruptCheckpointError(
                    f"{self._directory}: array {name!r} cannot be read: its file "
                    f"{self._files[value[0]]!r} is truncated.",
                    path=self._directory,
                    key_path=name,
                )
            done += got

    def _verify(self, value: _Extent, view: memoryview, start: int, digests: str) -> None:
        if len(view) <= DIGEST_BLOCK_BYTES:
            got = xxhash.xxh3_64_hexdigest(view)
        else:
            got = "".join(
                xxhash.xxh3_64_hexdigest(view[at : at + DIGEST_BLOCK_BYTES])
                for at in range(0, len(view), DIGEST_BLOCK_BYTES)
            )
        wanted = value[5].wanted
        first = start // DIGEST_BLOCK_BYTES
        begin = first
        if value[4]:
            begin += value[4] * -(-_stored_bytes(wanted) // DIGEST_BLOCK_BYTES)
        if digests[16 * begin : 16 * begin + len(got)] != got:
            read = ArrayRead(
                name=wanted.name,
                spec=wanted.spec,
                grid=ChunkGrid(wanted.spec.shape, wanted.chunk_shape),
                digests=digests,
                box=Box.whole(wanted.spec.shape),
            )
            index = (value[4], *(0 for _ in wanted.spec.shape[1:])) if wanted.spec.shape else ()
            compare_digests(self._directory, read, index, got, first)

    def _count(self, value: _Extent) -> None:
        pending = value[5]
        if pending.is_one:
            pending.wanted.finish()
            return
        with self._lock:
            pending.num_values -= 1
            is_last = pending.num_values == 0
        if is_last:
            pending.wanted.finish()

    def close(self) -> None:
        """Gives the files back."""
        while self._descriptors:
            with clear_errors("read", self._directory):
                os.close(self._descriptors.popitem()[1])


def _spans(batch: Sequence[_Extent]) -> Iterator[tuple[int, int, int]]:
    """File, start and end of adjacent values, except for a block's padding between them."""
    file = begin = end = -1
    for value in batch:
        if value[0] != file or value[1] - end > _PADDING_BYTES:
            if file >= 0:
                yield file, begin, end
            file, begin = value[0], value[1]
        end = value[1] + value[2]
    if file >= 0:
        yield file, begin, end


def _advise(descriptor: int, offset: int, size_bytes: int, advice: str) -> None:
    """Advises the kernel, which may ignore it."""
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fadvise(descriptor, offset, size_bytes, getattr(os, advice))


def _stored_bytes(wanted: ReadRequest) -> int:
    """The size of a complete chunk."""
    return _cut(wanted.spec.shape, wanted.chunk_shape, wanted.spec.itemsize_bytes)[1]


@functools.lru_cache(maxsize=4096)
def _cut(
    shape: tuple[int, ...], chunk_shape: tuple[int, ...], itemsize_bytes: int
) -> tuple[int, int, tuple[bytes, ...]]:
    """Bytes of an array, bytes of one stored chunk, and the chunks' keys, along the first dim."""
    grid = ChunkGrid(shape, chunk_shape)
    keys = tuple(grid.key(index).encode() for index in grid.indices())
    return math.prod(shape) * itemsize_bytes, math.prod(chunk_shape) * itemsize_bytes, keys
