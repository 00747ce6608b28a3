"""A new object, kept in memory until it is complete, then uploaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from functional_ckpt.storage.system_errors import clear_errors


class ObjectFile:
    """A `NewFile` of an object store.

    Args:
        put: Uploads a local file.
        path: The object, for errors.
        size_bytes: Its size.
    """

    def __init__(self, put: Callable[[str], None], path: str, size_bytes: int) -> None:
        self._put = put
        self._path = path
        self._descriptor = -1
        with clear_errors("write", path):
            self._descriptor = os.memfd_create("functional_ckpt", os.MFD_CLOEXEC)
            os.ftruncate(self._descriptor, size_bytes)

    def write(self, segments: Sequence[memoryview], offset: int) -> None:
        """Writes all segments, one after the other, from an offset on."""
        with clear_errors("write", self._path):
            for segment in segments:
                left = segment
                while left:
                    done = os.pwrite(self._descriptor, left, offset)
                    left, offset = left[done:], offset + done

    def finish(self, size_bytes: int) -> None:
        """Uploads the object."""
        with clear_errors("write", self._path):
            os.ftruncate(self._descriptor, size_bytes)
        self._put(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def close(self) -> None:
        """Frees the memory; safe to call twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
