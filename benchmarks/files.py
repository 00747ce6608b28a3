"""Files, as every peer's are treated: synced alike, dropped from the cache alike, counted alike."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil

__all__ = [
    "drop_cache",
    "fill_cache",
    "fill_free_memory",
    "fresh",
    "inodes",
    "resident_fraction",
    "sync_tree",
    "walk_files",
]


_MIB = 2**20
_KEPT_FREE_BYTES = 2**30


def fresh(path: str) -> str:
    """The path, with nothing there."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    return path


def walk_files(path: str) -> Iterator[str]:
    """Every file below a directory."""
    for folder, _, names in os.walk(path):
        for name in names:
            yield os.path.join(folder, name)


def sync_tree(path: str) -> None:
    """Syncs every file below a directory, on two threads, then every directory and its parent."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_sync, walk_files(path)))
    for folder, _, _ in os.walk(path, topdown=False):
        _sync(folder)
    _sync(os.path.dirname(path))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_cache(path: str) -> float:
    """Drops the files below a directory from the page cache.

    Returns:
        The fraction of their pages that are still there.
    """
    for file in walk_files(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages are not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return resident_fraction(path)


def fill_cache(path: str) -> float:
    """Reads the files below a directory, so that who wrote past the page cache is warm as well.

    Returns:
        The fraction of their pages that are there now.
    """
    scratch = bytearray(2**20)
    for file in walk_files(path):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(scratch):
                pass
    return resident_fraction(path)


def fill_free_memory(path: str) -> None:
    """Fills free memory with the page cache of a sparse file of this name.

    So is a machine that has trained for an hour: who needs memory takes it from the cache. Free
    memory is not the same for all: a virtual machine's may have been given back to its host, and
        the next process that takes it waits for it, at a fraction of a disk's speed.
    """
    size = (psutil.virtual_memory().available - _KEPT_FREE_BYTES) // _MIB * _MIB
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    scratch = threading.local()

    def read(start: int) -> None:
        if not hasattr(scratch, "buffer"):
            scratch.buffer = bytearray(_MIB)
        os.preadv(descriptor, [scratch.buffer], start)

    try:
        os.ftruncate(descriptor, max(size, 0))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(read, range(0, size, _MIB)))
    finally:
        os.close(descriptor)


def resident_fraction(path: str) -> float:
    """The fraction of the pages of the files below a directory that are in the page cache."""
    resident = pages = 0
    for file in walk_files(path):
        found = _resident_pages(file)
        resident += sum(found)
        pages += len(found)
    return resident / pages if pages else 0.0


def _resident_pages(file: str) -> list[int]:
    """One number for each page, 1 where it is cached, as mincore(2) says."""
    size = os.path.getsize(file)
    if size == 0:
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    descriptor = os.open(file, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap", file)
    states = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    try:
        if libc.mincore(address, size, states) != 0:
            raise OSError(ctypes.get_errno(), "mincore", file)
    finally:
        libc.munmap(address, size)
    return [state & 1 for state in states.raw]


def inodes(path: str) -> dict[int, int]:
    """The bytes that each inode below a directory occupies: hard links count once."""
    found: dict[int, int] = {}
    for file in walk_files(path):
        status = os.lstat(file)
        found[status.st_ino] = status.st_blocks * 512
    return found
