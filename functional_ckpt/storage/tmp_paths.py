"""Names of temporary directories, and whether their writer is alive.

    <final>.orbax-checkpoint-tmp                       object stores; Orbax
    <final>.orbax-checkpoint-tmp-<unique>              a manager's; an upload of one commit
    <final>.orbax-checkpoint-tmp-<unique>.<machine>    a claim: of `fc.save`, or of an export

A manager's is alive as long as the lock of its directory is held, so the next holder of that lock
may remove it. A claim belongs to no such directory: its writer holds a `flock` on the claim itself.
A `flock` on a directory does not reach other machines, so the name says where the writer runs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Generator

from functional_ckpt import errors
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.file_lock import FileLock
from functional_ckpt.storage.system_errors import clear_errors

TMP_SUFFIX = ".orbax-checkpoint-tmp"
_CLAIM = re.compile(re.escape(TMP_SUFFIX) + r"-[0-9a-f]{12}\.(?P<machine>[0-9a-f]{8})")
_MAX_NAME_BYTES = 255
_NUM_UNIQUE_CHARS = 12
# The name of a manager's temporary directory contains that of the step.
MAX_STEP_NAME_BYTES = _MAX_NAME_BYTES - len(f"{TMP_SUFFIX}-") - _NUM_UNIQUE_CHARS
# Of a machine whose locks cannot be seen from here.
_STALE_SECONDS = 24 * 3600.0
_SERIALIZED_SECONDS, _LOOK_SECONDS = 60.0, 0.005
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def tmp_path(final: str) -> str:
    """Returns the one temporary path of `final`, for object stores."""
    return final + TMP_SUFFIX


def unique_tmp_path(final: str, ending: str = "") -> str:
    """Returns a unique temporary path of `final`."""
    folder, name = os.path.split(final)
    tail = f"{TMP_SUFFIX}-{uuid.uuid4().hex[:_NUM_UNIQUE_CHARS]}{ending}"
    room = _MAX_NAME_BYTES - len(tail)
    return os.path.join(folder, os.fsdecode(os.fsencode(name)[:room]) + tail)


def final_path(tmp: str) -> str:
    """Returns the final path of a temporary path."""
    folder, name = os.path.split(tmp)
    return os.path.join(folder, name.partition(TMP_SUFFIX)[0])


def is_claim(name: str) -> bool:
    """Returns whether the last component of a path is the name of a claim."""
    return _CLAIM.search(os.path.basename(name)) is not None


def claim(storage: Storage, final: str) -> FileLock:
    """Creates a temporary directory that is locked while this process holds it.

    Leftovers of dead writers of the same directory are removed first.
    """
    folder, base = os.path.split(final)
    for name in storage.list(folder):
        if name.startswith(base + TMP_SUFFIX) and is_claim(name):
            remove_if_dead(storage, os.path.join(folder, name))
    while True:
        path = unique_tmp_path(final, f".{_machine()}")
        storage.make_directory(path, parents=False)
        with clear_errors("lock", path):
            if (lock := _locked(path)) is not None:
                return lock


def _locked(path: str) -> FileLock | None:
    """Returns the lock of a new claim; None if another process has removed it as a leftover."""
    try:
        lock = FileLock(path, _DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        if lock.lock() is not False and lock.is_at_path():
            return lock
    except BaseException:
        lock.release()
        raise
    lock.release()
    return None


def remove_if_dead(storage: Storage, path: str) -> bool:
    """Removes a claim unless its writer may be alive; returns whether it is removed."""
    try:
        # While a claim is published, its name may be that of the replaced directory.
        with serialized(os.path.dirname(path), wait_seconds=0.0):
            return _remove_if_dead(storage, path)
    except errors.LockedError:
        return False


def _remove_if_dead(storage: Storage, path: str) -> bool:
    match = _CLAIM.search(os.path.basename(path))
    is_here = match is not None and match["machine"] == _machine()
    with clear_errors("open", path):
        try:
            lock = FileLock(path, _DIRECTORY)
        except FileNotFoundError:
            return True
        except NotADirectoryError:
            return False  # a foreign file
    try:
        with clear_errors("lock", path):
            is_free = lock.lock()
        if is_free is False:
            return False
        if (is_here and is_free) or _age_seconds(path) > _STALE_SECONDS:
            storage.remove(path)
            return True
        return False
    finally:
        lock.release()


def _age_seconds(path: str) -> float:
    """Returns for how long nothing below a directory has changed."""
    newest = os.lstat(path).st_mtime
    for folder, _, names in os.walk(path):
        for name in (".", *names):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, os.lstat(os.path.join(folder, name)).st_mtime)
    return time.time() - newest


@contextlib.contextmanager
def serialized(folder: str, wait_seconds: float = _SERIALIZED_SECONDS) -> Generator[None]:
    """Excludes other publications of claims into a folder, on this machine.

    Raises:
        LockedError: Another process took too long.
    """
    with clear_errors("lock", folder):
        lock = FileLock(folder, _DIRECTORY)
    try:
        deadline = time.monotonic() + wait_seconds
        with clear_errors("lock", folder):
            while lock.lock() is False:
                if time.monotonic() >= deadline:
                    raise errors.LockedError(
                        f"Another process has been publishing into {folder} for "
                        f"{wait_seconds:.0f} s; it may be suspended, or its disk hangs.",
                        path=folder,
                    )
                time.sleep(_LOOK_SECONDS)
        yield
    finally:
        lock.release()


@functools.cache
def _machine() -> str:
    """Returns this boot of this machine, whose processes see each other's locks."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        text = socket.gethostname()
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
