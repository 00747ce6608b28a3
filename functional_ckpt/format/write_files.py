"""Regions of arrays into data files as they were planned: a value is copied once, to the disk.

`core.files.file_plan` decides which file holds which region, and where. Chunks are digested as they
are written; the primary makes the index of all ranks' regions (`write_index`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from functional_ckpt.core.arrays.chunks import DIGEST_BLOCK_BYTES, ChunkGrid
from functional_ckpt.core.arrays.digests import BlockDigests, digest_blocks
from functional_ckpt.core.arrays.spec import Array, ArraySpec, Box
from functional_ckpt.core.files.file_plan import FilePlan, chunk_bytes, stored_chunks
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.format.data_file import DataFile, flat_bytes
from functional_ckpt.format.process import check_process
from functional_ckpt.format.shared_files import KeptFile
from functional_ckpt.format.tuning import NUM_THREADS, QUICK_BYTES, SHARED_FROM_BYTES, STEP_BYTES
from functional_ckpt.runtime.threads import gc_paused, run_in_threads
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.new_file import BLOCK_BYTES

_ZEROS = np.zeros(STEP_BYTES, np.uint8)


class Pieces(NamedTuple):
    """A region of an array that is made while it is written, for less memory than it takes.

    Attributes:
        nbytes: Its size.
        of: Yields the elements of a chunk in C order, piece by piece; a piece is used before the
            next one is asked for.
    """

    nbytes: int
    of: Callable[[Box], Iterator[Array]]


class ArrayWrite(NamedTuple):
    """One region of one array, to be written.

    Attributes:
        name: The array's name.
        spec: The array.
        grid: Its chunks.
        box: The region `data` holds; its edges are on the grid, or at the array's end.
        data: Host memory of the region, which may be strided; or its pieces.
        is_stable: Whether `data` does not change until the write is done. If it may, its digest is
            taken of a copy.
        on_copied: Called with the number of bytes of `data` that are no longer needed, if the
            caller waits to change them; on any thread.
    """

    name: str
    spec: ArraySpec
    grid: ChunkGrid
    box: Box
    data: Array | Pieces
    is_stable: bool = False
    on_copied: Callable[[int], None] | None = None

    def inside(self, index: tuple[int, ...]) -> Box:
        """Returns where a chunk is in the region."""
        return self.grid.box(index).relative_to(self.box.offset)


class WrittenBox(NamedTuple):
    """A region in a data file.

    Attributes:
        name: The array's name.
        chunk_shape: The shape of the array's chunks.
        box: The region.
        file: The data file, relative to the item.
        offset: Its first byte there.
        is_tensor: Whether it is stored as it is; else chunk by chunk, padded.
        digests: Of its chunks, in C order.
    """

    name: str
    chunk_shape: tuple[int, ...]
    box: Box
    file: str
    offset: int
    is_tensor: bool
    digests: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The result of writing regions.

    Attributes:
        boxes: The regions.
        files: The records of the files, by path relative to the item.
        kept: The files that the next step may share, by their planned names.
    """

    boxes: Sequence[WrittenBox] = ()
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict[str, FileRecord])
    kept: Mapping[str, KeptFile] = dataclasses.field(default_factory=dict[str, KeptFile])


def write_files(
    storage: Storage,
    item_directory: str,
    plans: Sequence[FilePlan],
    writes: Sequence[ArrayWrite],
    *,
    num_threads: int = NUM_THREADS,
    token: str = "",
    on_written: Callable[[int], None] | None = None,
    kept: Mapping[str, KeptFile] = types.MappingProxyType({}),
) -> Written:
    """Writes data files, or links those of the last step; nothing is durable yet.

    Args:
        storage: The store.
        item_directory: The item; the directory exists.
        plans: The files.
        writes: Their members, file by file and in the order of each.
        num_threads: How many are busy, each with a file of its own.
        token: Makes the names those of one save; see `new_name`.
        on_written: Called with the size of each region after it was written, on any thread.
        kept: The files of the last step, by their planned names.

    Raises:
        StorageError: The store refused.
    """
    check_process()
    rest = iter(writes)
    parts: list[_Part] = []
    for plan in plans:
        name = new_name(plan.name, token)
        path = os.path.join(item_directory, name)
        own = [next(rest) for _ in plan.members]
        parts.append(_Part(name, path, plan, own, kept.get(plan.name)))
    # A caller may be waiting until live memory is copied.
    tasks: list[Callable[[], None]] = [
        functools.partial(part.write, storage, on_written)
        for part in sorted(parts, key=_is_awaited)
    ]
    with contextlib.ExitStack() as pause:
        if sum(plan.size_bytes for plan in plans) < QUICK_BYTES:
            pause.enter_context(gc_paused())
        run_in_threads(tasks, num_threads)
    return Written(
        boxes=[box for part in parts for box in part.boxes],
        files={part.name: part.record for part in parts},
        kept={part.plan.name: part.kept() for part in parts if part.is_kept},
    )


def new_name(name: str, token: str) -> str:
    """Returns the name of a file of one save, with its token before the suffix, if it has one.

    A store has no temporary directories: a suspended writer must not hit the objects of the next.
    """
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{token}{dot}{suffix}" if token else name


def _is_awaited(part: _Part) -> bool:
    return all(write.on_copied is None for write in part.writes)


class _Part:
    """One data file, and that of the last step."""

    def __init__(
        self,
        name: str,
        path: str,
        plan: FilePlan,
        writes: Sequence[ArrayWrite],
        last: KeptFile | None,
    ) -> None:
        self.name = name
        self.plan = plan
        self.writes = writes
        self.boxes: list[WrittenBox] = []
        self.record = FileRecord(0, "")
        self.is_kept = plan.size_bytes >= SHARED_FROM_BYTES
        self._path = path
        self._last = last
        self._num_steps = 1

    def kept(self) -> KeptFile:
        """Returns the file for the next step."""
        return KeptFile(
            self._path, None, self.record, self.plan.header, self.boxes, self._num_steps
        )

    def write(self, storage: Storage, on_written: Callable[[int], None] | None) -> None:
        """Writes the file, or links the one of the last step if no byte has changed."""
        plan, name = self.plan, self.name
        is_lent = all(write.is_stable for write in self.writes)
        known: Iterator[str] = iter(())
        if self._last is not None:
            equal, is_same = self._last.compare(plan, self.writes)
            if is_same and self._last.share(storage, self._path):
                self._take(self._last, on_written)
                return
            # Live memory may have changed since.
            known = iter(equal if is_lent else ())
        file = DataFile(storage, self._path, plan.size_bytes, is_lent=is_lent)
        with contextlib.closing(file):
            if plan.header:
                file.append(np.frombuffer(plan.header, np.uint8))
            append = _append_tensor if plan.has_tensors else _append_chunks
            for member, write in zip(plan.members, self.writes, strict=True):
                if isinstance(write.data, Pieces):
                    digests = _append_pieces(file, write, write.data, is_tensor=plan.has_tensors)
                else:
                    digests = append(file, write, write.data, known)
                if write.on_copied is not None:
                    write.on_copied(write.data.nbytes)
                if on_written is not None:
                    on_written(write.data.nbytes)
                self.boxes.append(
                    WrittenBox(
                        write.name,
                        write.grid.chunk_shape,
                        write.box,
                        name,
                        member.offset,
                        plan.has_tensors,
                        digests,
                    )
                )
            _append_zeros(file, plan.size_bytes - file.size_bytes)
            self.record = file.finish()
        if file.is_large:  # while others are written; small ones share one go of the journal
            storage.sync(self._path)

    def _take(self, last: KeptFile, on_written: Callable[[int], None] | None) -> None:
        """Has the file of the last step, under its new name."""
        for write in self.writes:
            for notify in (write.on_copied, on_written):
                if notify is not None:
                    notify(write.data.nbytes)
        self.boxes = [box._replace(file=self.name) for box in last.boxes]
        self.record = last.record
        self._num_steps = last.num_steps + 1


def _append_pieces(file: DataFile, write: ArrayWrite, data: Pieces, *, is_tensor: bool) -> str:
    """Adds a region of one writer, each chunk of which is a run of its bytes; returns digests."""
    grid, digests = write.grid, list[str]()
    for index in grid.indices(write.box):
        start, blocks = file.size_bytes, BlockDigests()
        for piece in data.of(grid.box(index)):
            flat = piece.reshape(-1).view(np.uint8)
            blocks.update(flat.data)
            file.append(flat)
        digests.append(blocks.hexdigests())
        if not is_tensor:
            full_bytes = chunk_bytes(grid, write.spec.itemsize_bytes)
            _append_zeros(file, start + full_bytes - file.size_bytes)
    return "".join(digests)


def _append_tensor(file: DataFile, write: ArrayWrite, data: Array, known: Iterator[str]) -> str:
    """Adds a region as it is; returns the digests of its chunks, the known ones first."""
    grid = write.grid
    if not data.size:
        return ""
    if write.box.shape == grid.chunk_shape:
        return _append_region(file, data, known, is_stable=write.is_stable)
    chunks = stored_chunks(grid, write.box, data.itemsize, is_tensor=True)
    if not data.flags.c_contiguous:
        return "".join(
            _append_region(
                file, data[write.inside(chunk.chunk).slices()], known, is_stable=write.is_stable
            )
            for chunk in chunks
        )
    flat = data.reshape(-1).view(np.uint8)
    ends = [*(chunk.start for chunk in chunks[1:]), len(flat)]
    return "".join(
        [
            _append(file, flat[chunk.start : end], known, is_stable=write.is_stable)
            for chunk, end in zip(chunks, ends, strict=True)
        ]
    )


def _append_chunks(file: DataFile, write: ArrayWrite, region: Array, known: Iterator[str]) -> str:
    """Adds a region chunk by chunk, each in its full shape; returns the digests."""
    grid = write.grid
    full_bytes = chunk_bytes(grid, region.itemsize)
    digests: list[str] = []
    for index in grid.indices(write.box):
        data = region[write.inside(index).slices()]
        if data.shape[1:] != grid.chunk_shape[1:]:
            own = data if write.is_stable else data.copy()
            file.append(_padded(own, grid).reshape(-1).view(np.uint8))
            digests.append(next(known, "") or digest_blocks(flat_bytes(own).data))
            continue
        digests.append(_append_region(file, data, known, is_stable=write.is_stable))
        _append_zeros(file, full_bytes - data.nbytes)
    return "".join(digests)


def _padded(data: Array, grid: ChunkGrid) -> Array:
    """Returns a chunk with zeros up to its full shape, as zarr stores it."""
    padded = np.zeros(grid.chunk_shape, data.dtype)
    padded[tuple(slice(n) for n in data.shape)] = data
    return padded


def _append_zeros(file: DataFile, size_bytes: int) -> None:
    for start in range(0, size_bytes, STEP_BYTES):
        file.append(_ZEROS[: size_bytes - start])


def _append_region(file: DataFile, data: Array, known: Iterator[str], *, is_stable: bool) -> str:
    if data.flags.c_contiguous:
        flat = data.reshape(-1).view(np.uint8)
        return _append(file, flat, known, is_stable=is_stable)
    own = flat_bytes(data)  # of one chunk per thread
    return _append(file, own, known, is_stable=True, is_lent=False)


def _append(
    file: DataFile, flat: Array, known: Iterator[str], *, is_stable: bool, is_lent: bool = True
) -> str:
    """Adds the bytes of a chunk; returns their digests, which may be known.

    Data that is not stable may change while it is read: it is digested after it was copied, so that
    the digests are those of the bytes in the file.
    """
    if digests := next(known, ""):
        for step in _steps(flat, file.size_bytes):
            file.append(step, is_lent=is_lent)
        return digests
    if len(flat) <= DIGEST_BLOCK_BYTES:
        own = flat if is_stable else flat.copy()
        file.append(own)
        return xxhash.xxh3_64_hexdigest(own.data)
    blocks = BlockDigests()
    for step in _steps(flat, file.size_bytes):
        if is_stable:
            blocks.update(step.data)
            file.append(step, is_lent=is_lent)
        else:
            file.append(step, on_copied=blocks.update)
    return blocks.hexdigests()


def _steps(flat: Array, offset: int) -> Iterator[Array]:
    """Yields pieces that end on the blocks of the file."""
    start = 0
    while start < len(flat):
        end = start + STEP_BYTES - (offset + start) % BLOCK_BYTES
        yield flat[start:end]
        start = end
