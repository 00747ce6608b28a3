"""Large files written and read at the speed of the disk: few system calls, and no page cache.

A writer hands the disk some MiB at a time, in blocks that are aligned in memory and in the file.
Of large, stable data whose memory has the same offset in a page as its bytes in the file, only the
ends are copied, and the rest is written from where it is. All other data is gathered in three
rotating buffers: one being written, one ready, one being filled. The digest of the file is computed
while writing, so the file is not read again.
"""

from __future__ import annotations

import collections
import functools
import mmap
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import xxhash

from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.format.tuning import (
    BUFFER_BYTES,
    COPIED_ALONE_BYTES,
    DIRECT_FROM_BYTES,
    LENT_FROM_BYTES,
    MAX_FULL,
)
from functional_ckpt.runtime import host_memory
from functional_ckpt.runtime.threads import BackgroundWriter
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.new_file import BLOCK_BYTES


def flat_bytes(data: Array) -> Array:
    """Returns the bytes of an array in C order; a copy only if it is strided."""
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


class DataFile:
    """A new file that is written from its first byte to its last. Use it from one thread.

    Args:
        storage: The file system.
        path: The file; its directory exists.
        size_bytes: How much data there will be.
        is_lent: Whether nearly all of it will be lent, so that little goes through the buffer.

    Attributes:
        is_large: Whether it is worth going around the page cache.

    Raises:
        StorageError: The file system refused; also by the other methods.
    """

    def __init__(
        self, storage: Storage, path: str, size_bytes: int, *, is_lent: bool = False
    ) -> None:
        self._hash = xxhash.xxh3_64()
        self._written = 0
        self._segments: list[memoryview] = []  # complete blocks to write next
        self._gathered = 0
        self._begin = self._filled = 0  # positions in the buffer
        blocks = -(-min(size_bytes, BUFFER_BYTES) // BLOCK_BYTES)
        self._prefers_huge = not is_lent  # of a huge page, all is taken at the first touch
        self._buffer = self._pages(max(1, blocks) * BLOCK_BYTES)
        self._behind: BackgroundWriter | None = None
        self._full: collections.deque[Array] = collections.deque()  # handed on before
        self.is_large = size_bytes >= DIRECT_FROM_BYTES
        self._file = storage.create(path, size_bytes, is_direct=self.is_large)

    def _pages(self, size_bytes: int) -> Array:
        """Memory on page boundaries."""
        memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if self._prefers_huge:
            host_memory.prefer(memory)
        return np.frombuffer(memory, np.uint8)

    @property
    def size_bytes(self) -> int:
        """The offset of the next data."""
        return self._written + self._gathered + self._filled - self._begin

    def append(
        self,
        data: Array,
        *,
        is_lent: bool = False,
        on_copied: Callable[[memoryview], None] | None = None,
    ) -> int:
        """Adds bytes at the end, without a gap, and returns their offset.

        Args:
            data: A flat array of uint8.
            is_lent: Whether it will stay as it is until the file is finished, so that it need not
                be copied.
            on_copied: Called with the bytes that the file will hold, piece by piece. Where `data`
                may change at any time, a digest must be taken of these. Not for lent data.
        """
        offset = self.size_bytes
        if is_lent and self.is_large and len(data) >= LENT_FROM_BYTES:
            address: int = data.__array_interface__["data"][0]
            if (address - offset) % BLOCK_BYTES == 0:
                self._append_lent(data, -address % BLOCK_BYTES)
                return offset
        self._copy(data, on_copied)
        return offset

    def _append_lent(self, data: Array, head: int) -> None:
        tail = (len(data) - head) % BLOCK_BYTES
        self._copy(data[:head])
        self._gather_buffer()
        self._gather(data[head : len(data) - tail])
        if self._gathered >= BUFFER_BYTES:
            self._flush()
        self._copy(data[len(data) - tail :])

    def _copy(self, data: Array, on_copied: Callable[[memoryview], None] | None = None) -> None:
        start, count, room = 0, len(data), len(self._buffer)
        while start < count:
            taken = min(count - start, room - self._filled)
            end = self._filled + taken
            if taken < COPIED_ALONE_BYTES:  # numpy would offer the interpreter to others first
                self._buffer.data[self._filled : end] = data.data[start : start + taken]
            else:
                self._buffer[self._filled : end] = data[start : start + taken]
            if on_copied is not None:  # before the buffer is handed on
                on_copied(self._buffer.data[self._filled : end])
            self._filled, start = end, start + taken
            if end == room:
                self._flush()
                self._turn()

    def _gather_buffer(self) -> None:
        if self._filled > self._begin:
            self._gather(self._buffer[self._begin : self._filled])
            self._begin = self._filled

    def _gather(self, data: Array) -> None:
        segment = memoryview(cast("Any", data))
        self._hash.update(segment)
        self._segments.append(segment)
        self._gathered += len(segment)

    def _flush(self) -> None:
        self._gather_buffer()
        segments, self._segments = self._segments, []
        write = functools.partial(self._file.write, segments, self._written)
        self._written += self._gathered
        self._gathered = 0
        if not self.is_large:
            write()
            return
        if self._behind is None:
            self._behind = BackgroundWriter(MAX_FULL)
        self._behind.run(write)  # waits for data of the next buffer

    def _turn(self) -> None:
        self._begin = self._filled = 0
        if self.is_large:
            self._full.append(self._buffer)
            is_free = len(self._full) > MAX_FULL
            self._buffer = self._full.popleft() if is_free else self._pages(len(self._buffer))

    def finish(self) -> FileRecord:
        """Writes the rest and returns the file's record; durable once it is synced."""
        if self.size_bytes > self._written:
            self._flush()
        if self._behind is not None:
            self._behind.wait()
        self._file.finish(self._written)
        return FileRecord(self._written, self._hash.hexdigest())

    def close(self) -> None:
        """Gives file and memory back; safe to call twice."""
        if self._behind is not None:
            self._behind.close()
            self._behind = None
        self._file.close()
        self._buffer, self._segments = np.empty(0, np.uint8), []
        self._full.clear()
