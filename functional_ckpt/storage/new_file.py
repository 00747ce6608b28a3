"""Large new files of the local file system: written by position, past the page cache if possible.

All bulk data is written through it; `format.data_file` decides on order and blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
from collections.abc import Sequence
from typing import Any

from functional_ckpt.storage.system_errors import clear_errors

BLOCK_BYTES = 4096
"""Direct writes are complete blocks, aligned in memory and in the file."""
_NO_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class LocalFile:
    """A `NewFile`; with `is_direct` its space is reserved and the page cache bypassed.

    Raises:
        StorageError: The file system refused; also by the methods.
    """

    def __init__(self, path: str, size_bytes: int, *, is_direct: bool) -> None:
        self._path = path
        self._is_direct = is_direct
        self._descriptor = -1
        with clear_errors("write", path):
            self._descriptor = self._open()
            if is_direct:
                try:
                    _reserve(self._descriptor, size_bytes)
                except BaseException:
                    self.close()
                    raise

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

    def write(self, segments: Sequence[memoryview], offset: int) -> None:
        """Writes all segments, one after the other, from an offset on."""
        with clear_errors("write", self._path):
            if self._is_direct and sum(map(len, segments)) % BLOCK_BYTES:
                # The end of the file is an incomplete block: it is written through the page cache.
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                self._is_direct = False
            left = list(segments)
            while left:
                done = os.pwritev(self._descriptor, left, offset)
                offset += done
                while left and done >= len(left[0]):
                    done -= len(left.pop(0))
                if done:
                    left[0] = left[0][done:]

    def finish(self, size_bytes: int) -> None:
        """Sets the size of the file."""
        with clear_errors("write", self._path):
            os.ftruncate(self._descriptor, size_bytes)

    def close(self) -> None:
        """Closes the file; safe to call twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with clear_errors("write", self._path):
                os.close(descriptor)


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Reserves space for the file if the file system can; else a full disk is reported later."""
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
