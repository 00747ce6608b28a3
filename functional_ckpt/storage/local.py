"""The file system as the commit protocol sees it.

`LocalStorage` is a POSIX file system; `base.Storage` says what each operation is. Every operation
passes through `operation`, which does nothing here and is what the fault-injecting storage of
`functional_ckpt.testing` overrides.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import shutil
import stat
import time
import uuid
from collections.abc import Mapping
from typing import Any

import xxhash

from functional_ckpt import errors
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.storage import local_files
from functional_ckpt.storage.file_lock import DirectoryLock
from functional_ckpt.storage.paths import is_remote, resolve, resolve_uri
from functional_ckpt.storage.system_errors import clear_errors, is_absence

__all__ = [
    "LocalStorage",
    "is_remote",
    "resolve",
    "resolve_uri",
]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Read and hashed while it is in the cache.
_STEP_BYTES = 2**20
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class LocalStorage:
    """A POSIX file system. Stateless; safe to use from any thread."""

    num_requests = 1

    def operation(self, kind: str, path: str) -> None:
        """Called before every operation that changes or reads the store."""

    # -------------------------------------------------------------------------------- reading

    def read(self, path: str) -> bytes:
        """The content of a regular file."""
        self.operation("read", path)
        return local_files.read_regular(path)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Part of a regular file; shorter where the file ends."""
        self.operation("read", path)
        descriptor, size_bytes = local_files.open_regular(path)
        with clear_errors("read", path), open(descriptor, "rb") as file:
            return os.pread(file.fileno(), max(0, min(length, size_bytes - offset)), offset)

    def exists(self, path: str) -> bool:
        """Whether anything is at `path`."""
        return local_files.mode_at(path) is not None

    def is_directory(self, path: str) -> bool:
        """Whether a directory is at `path`, or a link to one."""
        mode = local_files.mode_at(path, follow=True)
        return mode is not None and stat.S_ISDIR(mode)

    def is_committed(self, path: str) -> bool:
        """Whether a directory is at `path`: it has its name only since it is whole."""
        return self.is_directory(path)

    def commit_id(self, path: str) -> str | None:
        """Inode and time of a directory: another one of its name differs in one of them."""
        found = _stat(path, follow=False)
        if found is None or not stat.S_ISDIR(found.st_mode):
            return None
        return f"{found.st_ino}.{found.st_mtime_ns}"

    def directory_id(self, path: str) -> str | None:
        """Device and inode."""
        found = _stat(path, follow=True)
        return None if found is None else f"{found.st_dev}.{found.st_ino}"

    def kind(self, path: str, *, follow: bool = False) -> str:
        """What is at a path, for people."""
        return local_files.kind_of(local_files.mode_at(path, follow=follow))

    def is_link(self, path: str) -> bool:
        """Whether a symbolic link is at `path`."""
        mode = local_files.mode_at(path)
        return mode is not None and stat.S_ISLNK(mode)

    def list(self, path: str) -> list[str]:
        """Sorted names in a directory; empty when it does not exist."""
        self.operation("list", path)
        with clear_errors("list", path):
            try:
                return sorted(os.listdir(path))
            except FileNotFoundError:
                return []

    def walk(self, path: str) -> list[str]:
        """Sorted paths, relative to `path`, of the files below it; links are never followed."""
        return sorted(self.sizes(path))

    def sizes(self, path: str) -> dict[str, int]:
        """The size of every file below `path`, by its path relative to that."""
        self.operation("list", path)
        return {name: found.st_size for name, found in local_files.iter_files(path)}

    def regular_sizes(self, path: str) -> dict[str, int]:
        """As `sizes`; raises `CorruptCheckpointError` for links and special files."""
        self.operation("list", path)
        if self.is_link(path):
            raise local_files.irregular(path, stat.S_IFLNK, "a directory")
        sizes: dict[str, int] = {}
        for name, found in local_files.iter_files(path):
            if not stat.S_ISREG(found.st_mode):
                raise local_files.irregular(os.path.join(path, name), found.st_mode)
            sizes[name] = found.st_size
        return sizes

    def modified_ns(self, path: str) -> int:
        """When it was changed, nanoseconds since the epoch; 0 for what is not there."""
        with clear_errors("look at", path):
            try:
                return os.stat(path).st_mtime_ns
            except OSError as error:
                if not is_absence(error):
                    raise
                return 0

    def age_seconds(self, path: str) -> float:
        """How long ago a file was changed; zero for one that is not there any more."""
        with clear_errors("look at", path):
            try:
                return time.time() - os.lstat(path).st_mtime
            except FileNotFoundError:
                return 0.0

    def checksum(self, path: str) -> FileRecord:
        """Size and digest of a regular file."""
        self.operation("read", path)
        descriptor, size_bytes = local_files.open_regular(path)
        with clear_errors("read", path), open(descriptor, "rb", buffering=0) as file:
            if size_bytes <= _STEP_BYTES:
                data = os.read(descriptor, size_bytes)
                return FileRecord(len(data), xxhash.xxh3_64_hexdigest(data))
            # Not by memory map: where the disk fails, or the file is cut, that kills the process.
            digest, buffer, done_bytes = xxhash.xxh3_64(), memoryview(bytearray(_STEP_BYTES)), 0
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                done_bytes += count
            return FileRecord(done_bytes, digest.hexdigest())

    def total_bytes(self, path: str) -> int:
        """Sum of the sizes of every file below `path`."""
        return sum(self.sizes(path).values())

    # -------------------------------------------------------------------------------- writing

    def make_directory(self, path: str, *, parents: bool = True) -> None:
        """Creates a directory, with its parents or in one that is there; may exist."""
        self.operation("make_directory", path)
        with clear_errors("create directory", path):
            if parents:
                os.makedirs(path, exist_ok=True)
                return
            try:
                os.mkdir(path)
            except FileExistsError:
                if not os.path.isdir(path):
                    raise

    def write(self, path: str, data: bytes) -> None:
        """Creates a file; neither its content nor its entry is durable before they are synced."""
        self.operation("write", path)
        with clear_errors("write", path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with open(os.open(path, flags, 0o666), "wb") as file:
                file.write(data)

    def replace(self, path: str, data: bytes) -> None:
        """Writes a file durably; a reader, and a crash, see the old content or the new."""
        temporary = f"{path}.{uuid.uuid4().hex[:12]}.tmp"
        self.write(temporary, data)
        self.sync(temporary)
        self.rename(temporary, path)
        self.sync_directory(os.path.dirname(path))

    def replace_link(self, path: str, target: str, temporary: str) -> None:
        """Points the symbolic link `path` at `target`, atomically and durably.

        Args:
            path: The link.
            target: A name in the link's directory.
            temporary: Where the link is made first, in the same file system.
        """
        self.operation("link", path)
        with clear_errors("link", path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            os.symlink(target, temporary)
            os.replace(temporary, path)
        self.sync_directory(os.path.dirname(path))

    def sync(self, path: str) -> None:
        """Makes the content of an existing file durable."""
        self.operation("sync", path)
        with clear_errors("sync", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def sync_directory(self, path: str) -> None:
        """Makes the entries of a directory durable."""
        self.sync(path)

    def put_file(self, source: str, path: str) -> None:
        """Copies a file; under its name only when all of it is there."""
        self.make_directory(os.path.dirname(path))
        self.operation("write", path)
        temporary = f"{path}.{uuid.uuid4().hex[:12]}.tmp"
        with clear_errors("write", path):
            shutil.copyfile(source, temporary)
        self.rename(temporary, path)

    def rename(self, source: str, target: str) -> None:
        """Renames a file or directory; a directory never replaces one that has entries."""
        self.operation("rename", target)
        with clear_errors("rename to", target):
            os.rename(source, target)

    def swap(self, first: str, second: str) -> bool:
        """Swaps two paths in one atomic step; False where the system cannot."""
        self.operation("swap", second)
        rename = _renameat2()
        if rename is None:
            return False
        a, b = os.fsencode(first), os.fsencode(second)
        if rename(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE) == 0:
            return True
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        raise errors.StorageError(
            f"Cannot exchange {first} and {second}: {os.strerror(code)} [errno {code}].",
            errno=code,
            path=second,
        )

    def remove(self, path: str) -> None:
        """Removes a file, or a directory and all in it; nothing happens when it is absent."""
        self.operation("remove", path)
        with clear_errors("remove", path):
            mode = local_files.mode_at(path)
            if mode is not None and stat.S_ISDIR(mode):
                shutil.rmtree(path, onerror=_unless_absent)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def lock(self, path: str) -> DirectoryLock:
        """Takes the writer's lock at `path`; `LockedError` names the holder."""
        self.operation("lock", path)
        return DirectoryLock(path)

    # -------------------------------------------------------------------------------- arrays

    def kvstore(self, directory: str) -> Mapping[str, Any]:
        """TensorStore's spec; as a URL, a path with `%`, `?` or `#` would be another."""
        return {"driver": "file", "path": f"{directory}/"}

    def context(self) -> Mapping[str, Any]:
        """None but the defaults."""
        return {}

    def flush_arrays(self, directory: str) -> None:
        """Nothing: TensorStore wrote where it was told."""

    def redact(self, text: str) -> str:
        """The message as it is."""
        return text


def _stat(path: str, *, follow: bool) -> os.stat_result | None:
    """What is at a path, None for nothing; any other refusal is an error."""
    with clear_errors("look at", path):
        try:
            return os.stat(path, follow_symlinks=follow)
        except (FileNotFoundError, NotADirectoryError):
            return None


def _unless_absent(function: object, path: str, info: Any) -> None:
    """What another process has removed meanwhile is removed."""
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]


@functools.cache
def _renameat2() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    return getattr(library, "renameat2", None)
