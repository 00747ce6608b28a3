"""The machine's limits for the same bytes without a format: copies, durable writes, reads."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np

from benchmarks import files, meters, workloads

__all__ = ["aligned", "measure", "read", "write"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_PIECE_BYTES = 8 * 2**20


def measure(divisor: int, root: str) -> dict[str, float]:
    """Seconds for the bytes of `big`: into warm memory, to the disk and from it.

    Copies and reads in pieces, so that threads finish together; everything is written once more
    than it is timed.
    """
    size = workloads.size_bytes("big", divisor)
    source, target = aligned(size), aligned(size)
    state = workloads.make("big", divisor)
    for index, tensor in enumerate(state.values()):
        source[index * tensor.nbytes : (index + 1) * tensor.nbytes] = (
            tensor.view(-1).numpy().view(np.uint8)
        )
    del state
    np.copyto(target, source)  # no page of it is touched for the first time below
    figures: dict[str, float] = {"size_bytes": size}
    for threads in (1, 2):
        figures[f"memcpy_{threads}_seconds"] = meters.seconds(
            lambda threads=threads: _each(
                threads, _pieces(size), lambda a, b: _copy(target, source, a, b)
            )
        )
    for direct in (False, True):
        for threads in (1, 2):
            name = f"write_{'direct' if direct else 'buffered'}_{threads}_seconds"
            if direct and not _takes_direct(root):
                continue
            path = _new_folder(root)
            figures[name] = meters.seconds(
                lambda path=path, direct=direct, threads=threads: write(
                    path, source, direct, threads
                )
            )
    files.fill_cache(path)  # data written around it is not cached
    for threads in (1, 2):
        figures[f"read_warm_{threads}_seconds"] = meters.seconds(
            lambda threads=threads: read(path, target, threads)
        )
    if not np.array_equal(source, target):
        raise RuntimeError("the read bytes differ from the written ones")
    for threads in (1, 2):
        figures[f"cold_{threads}_resident"] = files.drop_cache(path)
        figures[f"read_cold_{threads}_seconds"] = meters.seconds(
            lambda threads=threads: read(path, target, threads)
        )
    files.fresh(path)
    return figures


def _new_folder(root: str) -> str:
    path = files.fresh(os.path.join(root, "limits"))
    os.makedirs(path)
    return path


def _takes_direct(path: str) -> bool:
    """Whether the file system can be written past its cache."""
    probe = os.path.join(path, "probe")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    finally:
        files.fresh(probe)
    return True


def aligned(size: int) -> Array:
    """Memory on page boundaries, as O_DIRECT needs it."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def _pieces(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + _PIECE_BYTES, size)) for start in range(0, size, _PIECE_BYTES)]


def _each(
    threads: int, pieces: Sequence[tuple[int, int]], action: Callable[[int, int], object]
) -> None:
    if threads == 1:
        for start, end in pieces:
            action(start, end)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: action(*piece), pieces))


def _copy(target: Array, source: Array, start: int, end: int) -> None:
    np.copyto(target[start:end], source[start:end])


def write(path: str, source: Array, direct: bool, threads: int) -> None:
    """One file for each thread; synced, and their directory."""
    part = -(-len(source) // threads // _PIECE_BYTES) * _PIECE_BYTES
    flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0)

    def write_part(index: int, _: int) -> None:
        begin, finish = index * part, min((index + 1) * part, len(source))
        descriptor = os.open(os.path.join(path, str(index)), flags)
        try:
            if direct:
                os.posix_fallocate(descriptor, 0, finish - begin)
            view = memoryview(source)
            while begin < finish:
                begin += os.write(descriptor, view[begin : min(begin + _PIECE_BYTES, finish)])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    _each(threads, [(index, 0) for index in range(threads)], write_part)
    files.sync_tree(path)


def read(path: str, target: Array, threads: int) -> None:
    """Reads the files of a directory, one after the other, into memory as far as they fit."""
    names = sorted(os.listdir(path))
    sizes = [os.path.getsize(os.path.join(path, name)) for name in names]
    descriptors = [os.open(os.path.join(path, name), os.O_RDONLY) for name in names]
    pieces = [
        (place, start) for place, size in enumerate(sizes) for start in range(0, size, _PIECE_BYTES)
    ]

    def read_piece(place: int, start: int) -> None:
        end = min(start + _PIECE_BYTES, sizes[place])
        offset = sum(sizes[:place])
        view = memoryview(target)[offset + start : offset + end]
        done = 0
        while done < len(view):
            done += os.preadv(descriptors[place], [view[done:]], start + done)

    try:
        _each(threads, pieces, read_piece)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
