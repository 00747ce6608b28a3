"""Safe reads of untrusted local files: damaged, hostile, or on a failing server.

Only regular files are read. A named pipe would block its reader, a device may have no end, a link
may refer to any file of the machine, and a file with holes may claim to be larger than the memory.
All of them are refused at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from functional_ckpt import errors
from functional_ckpt.storage.base import Kind, Stat
from functional_ckpt.storage.queries import irregular
from functional_ckpt.storage.system_errors import clear_errors, is_absence

# Files that are read at once are JSON, which has no megabyte of zeros.
_PROBED_FROM_BYTES = 2**20
# Errors of opening a link (O_NOFOLLOW), or a socket or a device without a driver.
_IRREGULAR = (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.ENODEV)


def stat_at(path: str, *, follow: bool = False) -> Stat | None:
    """Returns the status of a path; None only if it does not exist.

    Raises:
        StorageError: The system refuses, which does not mean that the path is absent.
    """
    with clear_errors("look at", path):
        try:
            found = (os.stat if follow else os.lstat)(path)
        except OSError as error:
            # Links that lead to each other lead nowhere.
            if is_absence(error) or (follow and error.errno == errno.ELOOP):
                return None
            raise
    return to_stat(found)


def to_stat(found: os.stat_result) -> Stat:
    """Converts the system's status of a path."""
    kind = _kind_of(found.st_mode)
    identity = (found.st_dev, found.st_ino)
    is_link = kind == "a link"
    return Stat(kind, found.st_size, found.st_mtime_ns, identity, is_link, num_links=found.st_nlink)


def _kind_of(mode: int) -> Kind:
    if stat.S_ISREG(mode):
        return "a file"
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a link" if stat.S_ISLNK(mode) else "a special file"


def open_regular(path: str, *, follow: bool = False) -> tuple[int, int]:
    """Opens a regular file for reading; never waits.

    Returns:
        A descriptor, which the caller closes, and the file's size in bytes.

    Raises:
        CorruptCheckpointError: The path is not a regular file.
        StorageError: The path does not exist, or the system refuses.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    with clear_errors("read", path):
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            if error.errno in _IRREGULAR:
                raise irregular(path, _kind_at(path)) from error
            raise
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise irregular(path, _kind_of(found.st_mode))
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor, found.st_size


def read_regular(path: str, *, follow: bool = False) -> bytes:
    """Returns the content of a regular file of text; see `open_regular` for refusals."""
    descriptor, size_bytes = open_regular(path, follow=follow)
    with clear_errors("read", path):
        try:
            if size_bytes >= _PROBED_FROM_BYTES and _has_hole(descriptor, size_bytes):
                raise errors.CorruptCheckpointError(
                    f"{path}: {size_bytes} bytes with holes, which were never written.", path=path
                )
            return _read_all(descriptor, size_bytes)
        finally:
            os.close(descriptor)


def read_into(path: str, buffer: memoryview, offset: int) -> int:
    """Reads from a regular file into memory; returns how many bytes there were.

    See `open_regular` for refusals.
    """
    descriptor, _ = open_regular(path)
    with clear_errors("read", path):
        try:
            done = 0
            while count := os.preadv(descriptor, [buffer[done:]], offset + done):
                done += count
            return done
        finally:
            os.close(descriptor)


def _has_hole(descriptor: int, size_bytes: int) -> bool:
    with contextlib.suppress(OSError):  # not every file system reports holes
        return os.lseek(descriptor, 0, os.SEEK_HOLE) < size_bytes
    return False


def _read_all(descriptor: int, size_bytes: int) -> bytes:
    """Returns as many bytes as the file had when it was opened; fewer if it was truncated since."""
    data = os.pread(descriptor, size_bytes, 0)
    if len(data) == size_bytes:
        return data
    parts, done = [data], len(data)
    while data and done < size_bytes:
        data = os.pread(descriptor, size_bytes - done, done)
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def iter_files(top: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yields relative path and status of all entries below a directory, except directories.

    Links are not followed. Entries that disappear during the walk are skipped; others that cannot
    be read are errors.
    """
    todo = [""]
    while todo:
        folder = todo.pop()
        found: list[tuple[str, os.stat_result]] = []
        with clear_errors("list", os.path.join(top, folder)):
            for entry in _entries(os.path.join(top, folder)):
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    todo.append(name)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found.append((name, entry.stat(follow_symlinks=False)))
        yield from found


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _kind_at(path: str) -> str:
    found = stat_at(path)
    return "nothing" if found is None else found.kind
