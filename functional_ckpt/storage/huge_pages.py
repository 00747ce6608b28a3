"""Memory in large pages: the kernel pins them, and tells the disk of them, in a few pieces."""

from __future__ import annotations

import contextlib
import mmap

__all__ = ["prefer"]


def prefer(memory: mmap.mmap) -> None:
    """Asks for large pages, before the memory is touched; a system without them is no error."""
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
