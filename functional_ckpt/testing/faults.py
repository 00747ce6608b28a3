"""A store that fails on demand: full disks, failing disks and kills, per operation.

In a test:
    storage = FaultyStorage()
    manager = CheckpointManager(directory, storage=storage)
    storage.inject(Fault(at=3, errno=errno.ENOSPC))
    manager.save(1, items)  # the fourth operation fails: disk full
"""

from __future__ import annotations

import dataclasses
import errno as errno_lib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from functional_ckpt import errors
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.storage.base import Lock, Stat, Storage
from functional_ckpt.storage.local import LocalStorage

CHANGES = (
    *("make_directory", "write", "link", "sync", "rename", "swap", "remove", "lock"),
    "write_data",
)
"""The kinds of operation that change a store; the others (`read`, `list`) look."""


class Crash(BaseException):
    """Simulates the death of the process: no cleanup can change the store any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One operation that reached the store.

    Attributes:
        kind: `read`, `list`, or one of `CHANGES`.
        path: The file or directory.
    """

    kind: str
    path: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A failure to inject.

    Attributes:
        at: The operation that fails, counted from zero when the fault is injected.
        errno: The error of the system call, for `once` and `lasting`.
        mode: `once`, that operation alone fails; `lasting`, it and all later ones that change
            something (a disk that stays full); `crash`, a `Crash` there and at all later ones.
        kinds: The kinds of operation that are counted and can fail; None for all.
        where: Selects operations of those kinds; None for all.
    """

    at: int = 0
    errno: int = errno_lib.EIO
    mode: Literal["once", "lasting", "crash"] = "once"
    kinds: tuple[str, ...] | None = None
    where: Callable[[Operation], bool] | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for an operation before the first and an unknown mode."""
        if self.at < 0 or self.mode not in ("once", "lasting", "crash"):
            raise errors.UsageError(f"Not a fault: at={self.at!r}, mode={self.mode!r}.")


class FaultyStorage:
    """A store that records every operation, and fails on demand; wraps another store.

    An injected failure looks like a real one: a `StorageError` with the `errno` and the path.

    Args:
        fault: The operation that fails, counted from the first; None for none yet.
        inner: The store; None for the local file system.
        can_exchange: Whether two directories can be exchanged in one atomic step; if not, an
            overwrite takes two renames.

    Attributes:
        has_failed: Whether the fault has struck.
    """

    def __init__(
        self, fault: Fault | None = None, inner: Storage | None = None, *, can_exchange: bool = True
    ) -> None:
        self._inner: Storage = LocalStorage() if inner is None else inner
        self._mutex = threading.Lock()
        self._can_exchange = can_exchange
        self._fault = fault
        self._num_counted = 0
        self._operations: list[Operation] = []
        self.has_failed = False
        objects = self._inner.objects
        kinds = {"overwrite": "write", "create": "write", "replace_exactly": "write"}
        kinds["remove_exactly"] = "remove"
        self.objects: Any = None if objects is None else _Counted(self, objects, kinds)
        self.tensorstore = self._inner.tensorstore

    @property
    def operations(self) -> Sequence[Operation]:
        """The operations since the storage was made, or since `forget`."""
        with self._mutex:
            return tuple(self._operations)

    def forget(self) -> None:
        """Empties the record of operations."""
        with self._mutex:
            self._operations.clear()

    def inject(self, fault: Fault) -> None:
        """Fails from now on as `fault` says; operations are counted from here."""
        with self._mutex:
            self._fault, self._num_counted, self.has_failed = fault, 0, False

    def heal(self) -> None:
        """Removes the fault."""
        with self._mutex:
            self._fault = None

    def operation(self, kind: str, path: str) -> None:
        """Called before every operation: records it, and raises if the fault strikes it."""
        reached = Operation(kind, path)
        with self._mutex:
            self._operations.append(reached)
            fault = self._fault
            if fault is None or not self._strikes(fault, reached):
                return
            self.has_failed = True
        if fault.mode == "crash":
            raise Crash(f"at {kind} {path}")
        cause = OSError(fault.errno, os.strerror(fault.errno), path)
        raise errors.StorageError(
            f"Cannot {kind} {path}: {cause.strerror} [errno {fault.errno}].",
            errno=fault.errno,
            path=path,
        ) from cause

    def _strikes(self, fault: Fault, reached: Operation) -> bool:
        if fault.mode == "crash" and self.has_failed:
            return True
        if fault.kinds is not None and reached.kind not in fault.kinds:
            return False
        if fault.where is not None and not fault.where(reached):
            return False
        index, self._num_counted = self._num_counted, self._num_counted + 1
        if index < fault.at:
            return False
        return index == fault.at or (fault.mode == "lasting" and reached.kind in CHANGES)

    # -------------------------------------------------------------------------------- operations

    def stat(self, path: str, *, follow: bool = False) -> Stat | None:
        """As the inner store; not counted."""
        return self._inner.stat(path, follow=follow)

    def list(self, path: str) -> list[str]:
        """As the inner store."""
        self.operation("list", path)
        return self._inner.list(path)

    def walk(self, path: str) -> dict[str, Stat]:
        """As the inner store."""
        self.operation("list", path)
        return self._inner.walk(path)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """As the inner store."""
        self.operation("read", path)
        return self._inner.read(path, offset, length)

    def checksum(self, path: str) -> FileRecord:
        """As the inner store."""
        self.operation("read", path)
        return self._inner.checksum(path)

    def make_directory(self, path: str, *, parents: bool = True) -> None:
        """As the inner store."""
        self.operation("make_directory", path)
        self._inner.make_directory(path, parents=parents)

    def write(self, path: str, data: bytes) -> None:
        """As the inner store."""
        self.operation("write", path)
        self._inner.write(path, data)

    def create(self, path: str, size_bytes: int, *, is_direct: bool) -> Any:
        """As the inner store; each write to the file is an operation too."""
        self.operation("write_data", path)
        file = self._inner.create(path, size_bytes, is_direct=is_direct)
        return _Counted(self, file, {"write": "write_data", "finish": "write_data"}, path)

    def put_file(self, source: str, path: str) -> None:
        """As the inner store."""
        self.operation("write", path)
        self._inner.put_file(source, path)

    def link(self, path: str, target: str) -> None:
        """As the inner store."""
        self.operation("link", path)
        self._inner.link(path, target)

    def share(self, path: str, source: str, expected: Stat) -> bool:
        """As the inner store."""
        self.operation("link", path)
        return self._inner.share(path, source, expected)

    def sync(self, path: str) -> None:
        """As the inner store."""
        self.operation("sync", path)
        self._inner.sync(path)

    def rename(self, source: str, target: str) -> None:
        """As the inner store."""
        self.operation("rename", target)
        self._inner.rename(source, target)

    def swap(self, first: str, second: str) -> bool:
        """As the inner store, if made with `can_exchange`; else False."""
        self.operation("swap", second)
        return self._can_exchange and self._inner.swap(first, second)

    def remove(self, path: str) -> None:
        """As the inner store."""
        self.operation("remove", path)
        self._inner.remove(path)

    def lock(self, path: str) -> Lock:
        """As the inner store."""
        self.operation("lock", path)
        return self._inner.lock(path)


class _Counted:
    """A part of a store, some of whose methods are operations.

    Args:
        storage: Counts the operations.
        inner: The part.
        kinds: Method -> kind of operation.
        path: The path of all operations; None for the first argument of each.
    """

    def __init__(
        self,
        storage: FaultyStorage,
        inner: object,
        kinds: Mapping[str, str],
        path: str | None = None,
    ) -> None:
        self._storage, self._inner, self._kinds, self._path = storage, inner, kinds, path

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._kinds:
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self._storage.operation(self._kinds[name], self._path or arguments[0])
            return found(*arguments, **options)

        return call
