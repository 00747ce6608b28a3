"""Reading data files with few system calls: each byte is copied once, many arrays at a time.

The index of a database has the location of every value. Adjacent values, as a save leaves them, are
read by one call into the memory of many tensors, and verified while they are in the cache.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any, cast

import numpy as np

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.format import tuning
from functional_ckpt.format.index import Index
from functional_ckpt.format.ocdbt_decode import INLINE
from functional_ckpt.format.read_plan import Batch, ChunkPart, ChunkRead, ReadRequest, adjacent
from functional_ckpt.format.reader import deliver, put, verify
from functional_ckpt.storage.local_files import open_regular
from functional_ckpt.storage.system_errors import absence_as_damage, clear_errors

_LINE_BYTES = 64
_CASTABLE = frozenset(np.dtype(char).num for char in "?bBhHiIlLqQefd")
"""Dtypes whose memory Python casts to bytes, in a third of numpy's time; those of ml_dtypes have
numbers of their own."""


class DirectReader:
    """Executes read plans with system calls; `reader.ArrayReader` says how it is used.

    Args:
        index: Where every value of the item is stored.
    """

    def __init__(self, index: Index) -> None:
        self._directory = index.directory
        self._index = index
        self._descriptors: dict[int, int] = {}
        self._users: collections.Counter[int] = collections.Counter()
        self._opening = threading.Lock()

    def tasks(
        self,
        requests: Sequence[ReadRequest],
        *,
        delivered: Collection[tuple[int, tuple[int, ...]]] = (),
    ) -> list[Callable[[], None]]:
        """Plans the reads of requests, in the order of the files, and opens those.

        Few files stay open. Of thousands, each is opened once to see that it is there, and again by
        the tasks that read it.
        """
        batches = self._index.plan(requests, delivered)
        files = sorted({read.file for batch in batches for read in batch} - {INLINE})
        if len(files) <= tuning.MAX_OPEN_FILES:
            self._acquire(files)
        else:
            for file in files:
                self._acquire([file])
                self._release([file])
        for batch in batches[: tuning.NUM_AHEAD]:
            self._prefetch(batch)
        pairs = itertools.zip_longest(batches, batches[tuning.NUM_AHEAD :], fillvalue=())
        return [functools.partial(self._read, batch, later) for batch, later in pairs]

    @contextlib.contextmanager
    def _opened(self, batch: Batch) -> Generator[None]:
        """Keeps the files of a batch open."""
        files = {read.file for read in batch} - {INLINE}
        self._acquire(files)
        try:
            yield
        finally:
            self._release(files)

    def _acquire(self, files: Collection[int]) -> None:
        taken: list[int] = []
        try:
            with self._opening:
                for file in files:
                    if file not in self._descriptors:
                        self._descriptors[file] = self._open(self._index.files[file])
                    self._users[file] += 1
                    taken.append(file)
        except errors.CheckpointError:
            self._release(taken)
            raise

    def _release(self, files: Collection[int]) -> None:
        with self._opening:
            for file in files:
                self._users[file] -= 1
                if not self._users[file] and file in self._descriptors:
                    with clear_errors("read", self._directory):
                        os.close(self._descriptors.pop(file))

    def _open(self, file: str) -> int:
        path = os.path.join(self._directory, file)
        with absence_as_damage(f"{path}: the file is missing.", path):
            descriptor, _ = open_regular(path)
        # Each page is read once: the kernel need not keep track of which are used again.
        _advise(descriptor, 0, 0, "POSIX_FADV_NOREUSE")
        return descriptor

    def _prefetch(self, batch: Batch) -> None:
        """Has the disk fetch a later batch while an earlier one is verified."""
        with self._opened(batch):
            for file, begin, end in _spans(batch):
                _advise(self._descriptors[file], begin, end - begin, "POSIX_FADV_WILLNEED")

    def _read(self, batch: Batch, later: Batch) -> None:
        self._prefetch(later)
        with self._opened(batch):
            self._read_batch(batch)

    def _read_batch(self, batch: Batch) -> None:
        run: list[tuple[ChunkRead, memoryview]] = []
        run_bytes = run_file = run_end = 0
        for read in batch:
            part = cast("ChunkPart", read.part)
            if read.file == INLINE:
                data = self._index.inline[read.offset : read.offset + read.num_bytes]
                deliver(self._directory, read, part, np.frombuffer(data, np.uint8))
                continue
            view = _memory_of(read, part)
            if view is None:
                self._read_apart(read, part)
                continue
            size_bytes = len(view)
            is_next = read.file == run_file and read.offset == run_end
            if not is_next or run_bytes + size_bytes > tuning.STEP_BYTES:
                self._read_run(run)
                run, run_bytes = [], 0
            run.append((read, view))
            run_bytes += size_bytes
            run_file, run_end = read.file, read.offset + size_bytes
        self._read_run(run)

    def _read_run(self, run: Sequence[tuple[ChunkRead, memoryview]]) -> None:
        """Reads values that are stored side by side straight into their memory."""
        if not run:
            return
        first = run[0][0]
        if len(run) == 1 and len(run[0][1]) > tuning.STEP_BYTES:
            self._read_steps(first, cast("ChunkPart", first.part), 0, run[0][1])
        else:
            views = [view for _, view in run]
            total = run[-1][0].offset + len(views[-1]) - first.offset
            with clear_errors("read", self._directory):
                got = os.preadv(self._descriptors[first.file], views, first.offset)
            for read, view in run:
                if got != total:
                    self._fill(read, view, 0)
                verify(self._directory, read, cast("ChunkPart", read.part), view)
        for read, _ in run:
            if (destination := read.request.destination) is not None:
                destination.done()

    def _read_apart(self, read: ChunkRead, part: ChunkPart) -> None:
        """Reads what does not go into contiguous host memory as it is stored."""
        destination = read.request.destination
        if part.stored_shape is not None:
            data = _buffer(read.num_bytes)  # bounded: one chunk per thread
            self._fill(read, memoryview(cast("Any", data)), 0)
            deliver(self._directory, read, part, data)
        elif destination is None:
            scratch = memoryview(bytearray(min(read.num_bytes, tuning.STEP_BYTES)))
            for start in range(0, read.num_bytes, tuning.STEP_BYTES):
                step = scratch[: read.num_bytes - start]
                self._read_steps(read, part, start, step)
        elif destination.send is not None and part.start is not None:
            self._send(read, part, part.start, destination.send)
            destination.done()
        else:
            data = _buffer(read.num_bytes)  # bounded: one chunk per thread
            self._read_steps(read, part, 0, memoryview(cast("Any", data)))
            put(read, part, data)

    def _send(
        self,
        read: ChunkRead,
        part: ChunkPart,
        start: int,
        send: Callable[[int, int, Callable[[Array], None]], None],
    ) -> None:
        done = 0

        def fill(memory: Array) -> None:
            nonlocal done
            self._read_steps(read, part, done, memoryview(cast("Any", memory)))
            done += len(memory)

        send(start, read.num_bytes, fill)

    def _read_steps(self, read: ChunkRead, part: ChunkPart, start: int, view: memoryview) -> None:
        """Fills a view from byte `start` of the read on, verifying each step in the cache."""
        for at in range(0, len(view), tuning.STEP_BYTES):
            step = view[at : at + tuning.STEP_BYTES]
            self._fill(read, step, start + at)
            verify(self._directory, read, part, step, start + at)

    def _fill(self, read: ChunkRead, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            offset = read.offset + start + done
            with clear_errors("read", self._directory):
                got = os.preadv(self._descriptors[read.file], [view[done:]], offset)
            if got == 0:
                name = read.request.name
                raise errors.CorruptCheckpointError(
                    f"{self._directory}: array {name!r} cannot be read: its file "
                    f"{self._index.files[read.file]!r} is truncated.",
                    path=self._directory,
                    key_path=name,
                )
            done += got

    def close(self) -> None:
        """Closes the files."""
        self._users.clear()
        while self._descriptors:
            with clear_errors("read", self._directory):
                os.close(self._descriptors.popitem()[1])


def _buffer(size_bytes: int) -> Array:
    """Returns memory that starts at a multiple of 64 bytes, for the kernel to read into.

    Large memory of numpy starts 16 bytes after a page, where some processors copy at a third of the
    speed.
    """
    memory = np.empty(size_bytes + _LINE_BYTES, np.uint8)
    start = -memory.__array_interface__["data"][0] % _LINE_BYTES
    return memory[start : start + size_bytes]


def _memory_of(read: ChunkRead, part: ChunkPart) -> memoryview | None:
    """Returns the memory that the read bytes go to as they are; None where it is not so simple."""
    destination, start = read.request.destination, part.start
    if destination is None or destination.send is not None or start is None:
        return None
    memory = destination.memory()
    if not memory.flags.c_contiguous:
        return None
    if memory.dtype.num in _CASTABLE:
        flat = memory.data.cast("B")
    else:
        flat = memoryview(cast("Any", memory.reshape(-1).view(np.uint8)))
    size_bytes = part.end - part.first
    return flat if len(flat) == size_bytes else flat[start : start + size_bytes]


def _spans(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Yields file, start and end of values that are stored side by side, padding aside."""
    for reads in adjacent(batch):
        file, start, _, _ = reads[0]
        if file != INLINE:
            yield file, start, reads[-1].offset + reads[-1].num_bytes


def _advise(descriptor: int, offset: int, size_bytes: int, advice: str) -> None:
    """Advises the kernel, which may ignore it and may not know it."""
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fadvise(descriptor, offset, size_bytes, getattr(os, advice))
