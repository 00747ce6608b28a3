"""Advisory locks of the local file system: a writer's, and those of temporary directories.

The kernel releases a `flock` when the last process that shares it exits. A forked child shares
every lock and could outlive its parent, so it closes all their descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import socket

from functional_ckpt import errors
from functional_ckpt.storage.buckets.base import NotFound, PermanentError
from functional_ckpt.storage.buckets.lease import LEASE_SECONDS, Lease
from functional_ckpt.storage.buckets.lease import take as take_lease
from functional_ckpt.storage.lease_files import LeaseFiles
from functional_ckpt.storage.system_errors import clear_errors

_UNSUPPORTED = (
    *(errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP),
    *(errno.EINVAL, errno.EBADF),
)
_log = logging.getLogger("functional_ckpt")
_MOVED = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class FileLock:
    """An open file or directory, locked by this process if the file system has locks."""

    def __init__(self, path: str, flags: int) -> None:
        self.path = path
        # A list, because `pop` is atomic: threads and finalizers may close at the same time, and
        # by then the number may be another file's.
        self._descriptors = [os.open(path, flags | os.O_CLOEXEC, 0o666)]
        _open.add(self)

    @property
    def descriptor(self) -> int:
        """The descriptor, or -1 once it was closed."""
        return self._descriptors[0] if self._descriptors else -1

    def lock(self) -> bool | None:
        """Takes the lock if it is free.

        Returns:
            Whether it is held now; None if the file system has no locks.
        """
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                return False
            if error.errno in _UNSUPPORTED:
                return None
            raise
        return True

    def is_at_path(self) -> bool:
        """Returns whether the open file is still at the path, not moved or removed."""
        held = os.fstat(self.descriptor)
        try:
            found = os.stat(self.path)
        except OSError as error:
            if error.errno in _MOVED:
                return False
            raise
        return (held.st_dev, held.st_ino) == (found.st_dev, found.st_ino)

    def close(self) -> None:
        """Closes this process's descriptor; other processes that share the lock keep it."""
        # Where `close` reports an error, the descriptor is closed nevertheless, and nothing was
        # written through it that must last.
        with contextlib.suppress(IndexError, OSError):
            os.close(self._descriptors.pop())
        _open.discard(self)

    def release(self) -> None:
        """Unlocks and closes; safe to call twice, from any thread and from finalizers."""
        if self._descriptors:
            # A child that was forked between opening and registering may share it.
            with contextlib.suppress(OSError, IndexError):
                fcntl.flock(self._descriptors[0], fcntl.LOCK_UN)
        self.close()


_open: set[FileLock] = set()


def _close_in_child() -> None:
    for lock in list(_open):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)


class DirectoryLock:
    """The lock of the one live writer of a directory: a `FileLock` that names its holder.

    Raises:
        LockedError: Another live writer holds it.
        StorageError: The file system refused.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._root = os.path.dirname(os.path.dirname(path))
        self._lease: Lease | None = None
        with clear_errors("lock", path):
            self._file = FileLock(path, os.O_RDWR | os.O_CREAT)
        try:
            with clear_errors("lock", path):
                self._take()
        except BaseException:
            self._file.close()
            raise

    def _take(self) -> None:
        held = self._file.lock()
        if held is False:
            holder = os.pread(self._file.descriptor, 4096, 0).decode(errors="replace").strip()
            raise errors.LockedError(
                f"Another live writer holds {self._root}: {holder or 'unknown'}. Stop it, give "
                "this run its own directory, or open the directory with read_only=True.",
                path=self.path,
            )
        if held is None or _is_fuse(self._file.descriptor):
            _warn_of_lease(self._root)
            self._lease = _take_lease(self.path)
        with contextlib.suppress(OSError):  # on a full disk the lock still holds, without its note
            os.ftruncate(self._file.descriptor, 0)
            holder = {"pid": os.getpid(), "host": socket.gethostname()}  # for other writers
            os.pwrite(self._file.descriptor, json.dumps(holder).encode(), 0)

    def check(self) -> None:
        """Raises `LockedError` unless the lock is held on the directory at its path.

        The lock belongs to an inode, and steps are written by path. Once the directory was moved,
        removed or replaced, another writer may hold the directory at the path.
        """
        with clear_errors("look at the lock", self.path):
            is_held = self._file.descriptor >= 0 and self._file.is_at_path()
        if not is_held:
            raise errors.LockedError(
                f"{self._root} is no longer the directory that was locked: it, or its "
                ".functional_ckpt folder, was moved, removed or replaced. Nothing is written. Make "
                "a new CheckpointManager.",
                path=self.path,
            )
        if self._lease is not None:
            self._lease.check()

    def release(self) -> None:
        """Releases the lock; safe to call twice."""
        if self._lease is not None:
            self._lease.release()
        self._file.release()

    def drop(self) -> None:
        """Releases the lock without waiting; a lease is released by its own thread."""
        if self._lease is not None:
            self._lease.drop()
        self._file.release()


def _is_fuse(descriptor: int) -> bool:
    """Returns whether the file is on FUSE, where locks may be local to one mount."""
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(FileNotFoundError), open("/proc/self/mountinfo") as mounts:
        for mount in mounts:
            if mount.split()[2] == number:
                kind = mount.rpartition(" - ")[2].split()[0]
                return kind == "fuse" or kind.startswith("fuse.")
    return False


def _take_lease(path: str) -> Lease:
    try:
        return take_lease(LeaseFiles(), path.lstrip("/"))
    except (NotFound, PermanentError) as error:
        code = error.errno if isinstance(error, PermanentError) else errno.ENOENT
        raise OSError(code, os.strerror(code)) from error


@functools.cache
def _warn_of_lease(root: str) -> None:
    """Warns, once, that a directory has no file locks."""
    _log.warning(
        "%s: this file system has no file locks (flock) that hold for every host; using a lease of "
        "%.0f s, which the writer renews. After a crash on another machine the next writer "
        "waits until it expires.",
        root,
        LEASE_SECONDS,
    )
