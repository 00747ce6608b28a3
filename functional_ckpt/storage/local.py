"""The local file system: a POSIX file system, which may also be a mounted network one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import shutil
import stat
from collections.abc import Mapping
from typing import Any

import xxhash

from functional_ckpt import errors
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.storage import local_files
from functional_ckpt.storage.base import Lock, Stat
from functional_ckpt.storage.file_lock import DirectoryLock
from functional_ckpt.storage.new_file import LocalFile
from functional_ckpt.storage.system_errors import clear_errors

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Read and hashed while it is in the cache.
_STEP_BYTES = 2**20
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
# No links, not these two, too many, not of this file, or the file is gone.
_NO_SHARING = (
    *_UNSUPPORTED,
    *(errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EACCES, errno.ENOENT, errno.ESTALE),
)
_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class LocalTensorStore:
    """How TensorStore reaches local files: by their paths."""

    has_driver = True

    def kvstore(self, directory: str) -> Mapping[str, Any]:
        """Returns a spec and no URL, in which `%`, `?` and `#` would not be literal."""
        return {"driver": "file", "path": f"{directory}/"}

    def context(self) -> Mapping[str, Any]:
        """Returns nothing: the defaults."""
        return {}

    def redact(self, text: str) -> str:
        """Returns the message unchanged."""
        return text


class LocalStorage:
    """A POSIX file system. Stateless; safe to use from any thread."""

    objects = None
    tensorstore = LocalTensorStore()

    # -------------------------------------------------------------------------------- reading

    def stat(self, path: str, *, follow: bool = False) -> Stat | None:
        """Returns the status of a path; None only if it does not exist."""
        return local_files.stat_at(path, follow=follow)

    def list(self, path: str) -> list[str]:
        """Returns the sorted names in a directory; none if it does not exist."""
        with clear_errors("list", path):
            try:
                return sorted(os.listdir(path))
            except FileNotFoundError:
                return []

    def walk(self, path: str) -> dict[str, Stat]:
        """Returns all entries below `path` that are not directories, by sorted relative path."""
        found = sorted(local_files.iter_files(path), key=lambda entry: entry[0])
        return {name: local_files.to_stat(entry) for name, entry in found}

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Returns the content of a regular file, or a part of it; fewer bytes at its end."""
        if length is None and not offset:
            return local_files.read_regular(path)
        descriptor, size_bytes = local_files.open_regular(path)
        left = max(0, size_bytes - offset)
        with clear_errors("read", path), open(descriptor, "rb") as file:
            return os.pread(file.fileno(), left if length is None else min(length, left), offset)

    def checksum(self, path: str) -> FileRecord:
        """Returns size and digest of a regular file."""
        descriptor, size_bytes = local_files.open_regular(path)
        with clear_errors("read", path), open(descriptor, "rb", buffering=0) as file:
            if size_bytes <= _STEP_BYTES:
                data = os.read(descriptor, size_bytes)
                return FileRecord(len(data), xxhash.xxh3_64_hexdigest(data))
            # A memory map would kill the process if the disk fails or the file is truncated.
            digest, buffer, done_bytes = xxhash.xxh3_64(), memoryview(bytearray(_STEP_BYTES)), 0
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                done_bytes += count
            return FileRecord(done_bytes, digest.hexdigest())

    # -------------------------------------------------------------------------------- writing

    def make_directory(self, path: str, *, parents: bool = True) -> None:
        """Creates a directory, which may exist, with its parents or in one that exists."""
        with clear_errors("create directory", path):
            try:
                (os.makedirs if parents else os.mkdir)(path)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(path).st_mode):  # `isdir` would hide its errors
                    raise

    def write(self, path: str, data: bytes) -> None:
        """Writes a file; neither content nor entry is durable before they are synced."""
        with clear_errors("write", path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with open(os.open(path, flags, 0o666), "wb") as file:
                file.write(data)

    def create(self, path: str, size_bytes: int, *, is_direct: bool) -> LocalFile:
        """Creates a file; with `is_direct` its space is reserved and the page cache bypassed."""
        return LocalFile(path, size_bytes, is_direct=is_direct)

    def put_file(self, source: str, path: str) -> None:
        """Copies a file; creates its directory. The caller compares the copy's digest."""
        self.make_directory(os.path.dirname(path))
        with clear_errors("write", path):
            shutil.copyfile(source, path)

    def link(self, path: str, target: str) -> None:
        """Creates a symbolic link; an error if something is at `path`."""
        with clear_errors("link", path):
            os.symlink(target, path)

    def share(self, path: str, source: str, expected: Stat) -> bool:
        """Creates a hard link, and makes the file read-only; returns False where it cannot."""
        with clear_errors("link", path):
            try:
                os.link(source, path, follow_symlinks=False)
            except OSError as error:
                if error.errno in _NO_SHARING:
                    return False
                raise
            found = os.lstat(path)
            if local_files.to_stat(found) == expected:
                try:
                    if found.st_mode & _WRITABLE:
                        os.chmod(path, stat.S_IMODE(found.st_mode) & ~_WRITABLE)
                    return True
                except PermissionError:  # the file of another user
                    pass
            os.unlink(path)
            return False

    def sync(self, path: str) -> None:
        """Makes the content of a file, or the entries of a directory, durable."""
        with clear_errors("sync", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rename(self, source: str, target: str) -> None:
        """Renames a file or directory; a directory never replaces a non-empty one."""
        with clear_errors("rename to", target):
            os.rename(source, target)

    def swap(self, first: str, second: str) -> bool:
        """Exchanges two paths in one atomic step; returns False if the system cannot."""
        rename = _renameat2()
        if rename is None:
            return False
        a, b = os.fsencode(first), os.fsencode(second)
        if rename(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE) == 0:
            return True
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        advice = ""
        if code == errno.EXDEV:
            advice = (
                " A directory of a lower layer of an overlay file system cannot be replaced: "
                "delete it first, or save under another number or path."
            )
        raise errors.StorageError(
            f"Cannot exchange {first} and {second}: {os.strerror(code)} [errno {code}].{advice}",
            errno=code,
            path=second,
        )

    def remove(self, path: str) -> None:
        """Removes a file, or a directory with its content; nothing happens if it is absent."""
        with clear_errors("remove", path):
            found = local_files.stat_at(path)
            if found is not None and found.kind == "a directory":
                shutil.rmtree(path, onerror=_unless_absent)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def lock(self, path: str) -> Lock:
        """Takes the writer's lock at `path`; `LockedError` names the holder."""
        return DirectoryLock(path)


def _unless_absent(function: object, path: str, info: Any) -> None:
    """Ignores entries that another process has removed at the same time."""
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]


@functools.cache
def _renameat2() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    return getattr(library, "renameat2", None)
