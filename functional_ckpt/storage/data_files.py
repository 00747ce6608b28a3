"""Large files written and read at the speed of the disk: few system calls, and no page cache.

A writer gathers what it is given in an aligned buffer and hands whole buffers to the disk, which
has one while the next is filled. The digest of the file is taken on the way, so that nobody has to
read it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
from typing import Any, TypeAlias, cast

import numpy as np
import xxhash

from functional_ckpt.core.manifest import FileRecord
from functional_ckpt.storage.paths import LocalStorage, clear_errors
from functional_ckpt.storage.threads import WriteBehind

__all__ = ["DataFile"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_BLOCK_BYTES = 4096
_BUFFER_BYTES = 4 * 2**20
# Smaller files are not worth going around the page cache, from which they may soon be read.
_DIRECT_FROM_BYTES = 16 * 2**20
_NO_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class DataFile:
    """A new file that is written from its first byte to its last. Use it from one thread.

    Args:
        storage: Told that it is made.
        path: Where; its directory is there.
        size_bytes: How large it will be.

    Attributes:
        is_large: Whether it is worth going around the page cache.

    Raises:
        StorageError: The file system refused; also by the other methods.
    """

    def __init__(self, storage: LocalStorage, path: str, size_bytes: int) -> None:
        storage.operation("write_data", path)
        self._path = path
        self._hash = xxhash.xxh3_64()
        self._written = 0
        self._filled = 0
        blocks = -(-min(size_bytes, _BUFFER_BYTES) // _BLOCK_BYTES)
        self._buffer = _pages(max(1, blocks) * _BLOCK_BYTES)
        self._behind: WriteBehind | None = None
        self._other: Array | None = None  # the buffer that is being written
        self.is_large = self._is_direct = size_bytes >= _DIRECT_FROM_BYTES
        with clear_errors("write", path):
            self._descriptor = self._open()
            if self._is_direct:
                _reserve(self._descriptor, size_bytes)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        if self._is_direct:
            try:
                return os.open(self._path, flags | os.O_DIRECT, 0o666)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
                self._is_direct = False
        return os.open(self._path, flags, 0o666)

    @property
    def size_bytes(self) -> int:
        """Bytes given so far."""
        return self._written + self._filled

    def append(self, data: Array) -> int:
        """Adds bytes, a flat array of uint8, and returns where they begin."""
        offset, start, count = self.size_bytes, 0, len(data)
        room = len(self._buffer)
        while start < count:
            taken = min(count - start, room - self._filled)
            end = self._filled + taken
            self._buffer[self._filled : end] = data[start : start + taken]
            self._filled, start = end, start + taken
            if end == room:
                self._flush()
        return offset

    def _flush(self) -> None:
        view = memoryview(cast("Any", self._buffer[: self._filled]))
        self._hash.update(view)
        write = functools.partial(self._write, view, self._written)
        self._written += self._filled
        self._filled = 0
        if not self.is_large:
            write()
            return
        if self._behind is None:
            self._behind = WriteBehind()
            self._other = _pages(len(self._buffer))
        self._behind.run(write)
        self._buffer, self._other = cast("Array", self._other), self._buffer

    def _write(self, view: memoryview, offset: int) -> None:
        with clear_errors("write", self._path):
            if self._is_direct and len(view) % _BLOCK_BYTES:
                # Only whole blocks go around the page cache: the rest of the file goes through it.
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                self._is_direct = False
            done = 0
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)

    def finish(self) -> FileRecord:
        """Writes what is left, and returns what the file must be; durable once it is synced."""
        if self._filled:
            self._flush()
        if self._behind is not None:
            self._behind.wait()
        with clear_errors("write", self._path):
            os.ftruncate(self._descriptor, self._written)
        return FileRecord(self._written, self._hash.hexdigest())

    def close(self) -> None:
        """Gives file and memory back; safe to call twice."""
        if self._behind is not None:
            self._behind.close()
            self._behind = None
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        self._buffer, self._other = np.empty(0, np.uint8), None


def _pages(size_bytes: int) -> Array:
    """Memory on page boundaries; huge pages, of which the disk is told in a few pieces."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a kernel, or a system, without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Finds room for the whole file at once; a file system that cannot is asked as we go."""
    function = _fallocate()
    if function is None or function(descriptor, 0, 0, size_bytes) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        raise OSError(code, os.strerror(code))


@functools.cache
def _fallocate() -> Any:
    with contextlib.suppress(AttributeError, OSError):
        function = ctypes.CDLL(None, use_errno=True).fallocate
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        return function
    return None
