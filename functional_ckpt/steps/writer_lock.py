"""The exclusive right to write into a directory of steps.

The manager and each commit that it has started hold the lock. A manager that is dropped without
`close` finishes its commit, and only then can another writer take the lock.
"""

from __future__ import annotations

import gc
import os
import time
import weakref

from functional_ckpt import errors
from functional_ckpt.storage.base import Lock, Storage

_WAIT_SECONDS = 10.0
_LOOK_SECONDS = 0.01


class WriterLock:
    """The lock of one directory, shared by a manager and its background work.

    Attributes:
        is_abandoned: Whether its manager was dropped without being closed.
        is_released: Whether another writer may take the lock.
    """

    def __init__(self, lock: Lock, path: str) -> None:
        self.path = path
        self.is_abandoned = False
        self.is_released = False
        self._lock = lock
        # Sets change atomically: finalizers run at any time, on any thread, so none may wait.
        self._users: set[object] = {self}
        _taken.add(self)

    def check(self) -> None:
        """Raises `LockedError` if the lock was lost, or its directory moved or replaced."""
        self._lock.check()

    def enter(self) -> object:
        """Adds a user; returns the token for `leave`."""
        token = object()
        self._users.add(token)
        return token

    def leave(self, token: object) -> None:
        """Removes a user; the last one releases the lock."""
        self._users.discard(token)
        if not self._users:
            self._lock.release()
            self.is_released = True

    def release(self) -> None:
        """Marks the manager as closed; safe to call twice."""
        self.leave(self)

    def abandon(self) -> None:
        """Marks the manager as dropped; its finalizer calls this, so it must not block."""
        self.is_abandoned = True
        self._users.discard(self)
        if not self._users:
            self._lock.drop()
            self.is_released = True


_taken: weakref.WeakSet[WriterLock] = weakref.WeakSet()
# The parent's: its locks are closed in the child.
os.register_at_fork(after_in_child=_taken.clear)


def take(storage: Storage, path: str) -> WriterLock:
    """Takes the lock at `path`; waits a while for the commit of a dropped manager of this process.

    Raises:
        LockedError: Another live writer holds it.
    """
    held = _held(path)  # looked up first: it may be released before the error is handled
    try:
        return WriterLock(storage.lock(path), path)
    except errors.LockedError as error:
        if not held:
            raise
        del held
        gc.collect()  # a dropped manager may wait for that, in a cycle of references
        if _is_released_in_time(path):
            return WriterLock(storage.lock(path), path)
        raise errors.LockedError(f"{error.message} {_advice(path)}", path=error.path) from None


def _held(path: str) -> list[WriterLock]:
    return [each for each in list(_taken) if each.path == path and not each.is_released]


def _is_released_in_time(path: str) -> bool:
    deadline = time.monotonic() + _WAIT_SECONDS
    while held := _held(path):
        if not all(each.is_abandoned for each in held) or time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _advice(path: str) -> str:
    if any(each.path == path and each.is_abandoned for each in list(_taken)):
        return (
            "That is this process: a CheckpointManager was dropped, and its save or an upload is "
            "still in progress. Wait for the result() of the Commit that save returned, or close() "
            "the manager."
        )
    return "That is this process: close() its other CheckpointManager of this directory first."
