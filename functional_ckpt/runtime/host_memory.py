"""Host buffers that hold a state between `save` and its write; reused from save to save."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.runtime.threads import run_in_threads

ALIGNMENT_BYTES = 64
NUM_THREADS = 2
"""As many as it takes to keep the memory busy."""
# Copies are cut so that threads finish together.
_PIECE_BYTES = 8 * 2**20


class Slot(NamedTuple):
    """Memory for one array.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        file_offset: Where it is written in a file: its memory has the same offset in a page. None
            for memory of any alignment.
    """

    shape: tuple[int, ...]
    dtype: Any
    file_offset: int | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Arena(mmap.mmap):
    """Memory whose pages may be locked, for as long as anything refers to it."""

    is_lock_tried = False
    unlock: Callable[[], None] | None = None

    def __del__(self) -> None:
        """Unlocks the pages before the memory is freed."""
        if self.unlock is not None:
            self.unlock()


class StagingBuffer:
    """One arena of host memory, grown when needed and then used again.

    Touching fresh memory costs several times the copy itself, so the arena is kept between saves.
    """

    def __init__(self) -> None:
        self._arena: _Arena | None = None
        self.size_bytes = 0
        self._slots: list[Slot] = []
        self._arrays: list[Array] = []

    def reserve(self, slots: Sequence[Slot]) -> list[Array]:
        """Returns an array for every slot, over memory that stays valid until the next call."""
        if self._arena is None or slots != self._slots:
            self._slots, self._arrays = list(slots), []
            self._arrays = self._carve(slots)
        return self._arrays

    def _carve(self, slots: Sequence[Slot]) -> list[Array]:
        offsets: list[int] = []
        end = 0
        sizes = [slot.size_bytes for slot in slots]
        for slot, size_bytes in zip(slots, sizes, strict=True):
            if slot.file_offset is None:
                end += -end % ALIGNMENT_BYTES
            else:
                end += (slot.file_offset - end) % mmap.PAGESIZE
            offsets.append(end)
            end += size_bytes
        if end > self.size_bytes:
            self._arena = None  # free the old memory before the new is allocated
            # Private memory is a quarter cheaper to touch first. A forked child (a data loader's
            # worker) has no use for it, and would have every page of it copied at the next save.
            self._arena = _Arena(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._arena.madvise(mmap.MADV_DONTFORK)
            prefer(self._arena)  # the disk is written from here
            self.size_bytes = end
        arrays: list[Array] = []
        for (shape, dtype, _), size_bytes, offset in zip(slots, sizes, offsets, strict=True):
            if size_bytes == 0:
                arrays.append(np.empty(shape, dtype))
                continue
            flat = np.frombuffer(cast("Any", self._arena), np.uint8, size_bytes, offset)
            arrays.append(flat.view(dtype).reshape(shape))
        return arrays

    def lock(self, lock: Callable[[int, int], Callable[[], None] | None]) -> None:
        """Locks the memory's pages, if that was not tried yet.

        Args:
            lock: Page-locks a number of bytes at an address and returns a function that unlocks
                them; None if it cannot.
        """
        arena = self._arena
        if arena is not None and not arena.is_lock_tried:
            arena.is_lock_tried = True
            whole = np.frombuffer(cast("Any", arena), np.uint8)
            arena.unlock = lock(whole.__array_interface__["data"][0], self.size_bytes)

    def release(self) -> None:
        """Gives the memory back once nothing refers to it."""
        self._arena, self.size_bytes = None, 0
        self._slots, self._arrays = [], []


def copy_in_threads(copies: Sequence[tuple[Array, Array]], num_threads: int = NUM_THREADS) -> None:
    """Copies each second array into the first, of the same shape and dtype, on several threads."""
    tasks: list[Callable[[], None]] = []
    batch: list[tuple[Array, Array]] = []
    batch_bytes = 0
    for target, source in copies:
        for piece in _pieces(target, source):
            batch.append(piece)
            batch_bytes += piece[0].nbytes
            if batch_bytes >= _PIECE_BYTES:
                tasks.append(functools.partial(_copy_all, batch))
                batch, batch_bytes = [], 0
    if batch:
        tasks.append(functools.partial(_copy_all, batch))
    run_in_threads(tasks, num_threads)


def _pieces(target: Array, source: Array) -> list[tuple[Array, Array]]:
    if target.nbytes <= _PIECE_BYTES or target.ndim == 0:
        return [(target, source)]
    if target.flags.c_contiguous and source.flags.c_contiguous:
        target, source = target.reshape(-1), source.reshape(-1)
    rows = max(1, len(target) * _PIECE_BYTES // target.nbytes)
    return [
        (target[start : start + rows], source[start : start + rows])
        for start in range(0, len(target), rows)
    ]


def _copy_all(pieces: Sequence[tuple[Array, Array]]) -> None:
    for target, source in pieces:
        np.copyto(target, source)


def prefer(memory: mmap.mmap) -> None:
    """Asks for large pages, before the memory is touched; a system without them is no error."""
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
