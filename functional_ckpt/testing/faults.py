"""A file system that fails on demand: full disks, failing disks and kills, per operation.

storage = FaultyStorage()
manager = CheckpointManager(directory, storage=storage)
storage.inject(Fault(at=3, errno=errno.ENOSPC))
manager.save(1, items)  # the third operation fails: disk full
"""

from __future__ import annotations

import dataclasses
import errno as errno_lib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Literal

from functional_ckpt import errors
from functional_ckpt.storage.local import LocalStorage

__all__ = ["CHANGES", "Crash", "Fault", "FaultyStorage", "Operation"]

CHANGES = (
    *("make_directory", "write", "link", "sync", "rename", "swap", "remove", "lock"),
    *("write_array", "commit_arrays", "merge_arrays"),
)
"""The kinds of operation that change a store; the others (`read`, `list`) look."""


class Crash(BaseException):
    """The process as good as died here: no cleanup can touch the store any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One operation that reached the store.

    Attributes:
        kind: `read`, `list`, or one of `CHANGES`.
        path: What it was asked of.
    """

    kind: str
    path: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is to go wrong.

    Attributes:
        at: Which operation fails, counted from zero when the fault is injected.
        errno: The error of the system call, for `once` and `lasting`.
        mode: `once`, that operation alone fails; `lasting`, it and all later ones that change
            something (a disk that stays full); `crash`, a `Crash` there and at all later ones.
        kinds: Which kinds of operation are counted and can fail; None for all.
        where: Which operations, of those kinds; None for all. How many files TensorStore spreads an
            item's data over differs from run to run: leave out those under `d/` where the k-th
            operation must be the same one each time.
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


class FaultyStorage(LocalStorage):
    """A local file system that records every operation, and fails as told.

    An injected failure looks like a real one: a `StorageError` with the `errno` and the path.

    Args:
        fault: What goes wrong, counted from the first operation; None for nothing yet.
        can_exchange: Whether two directories can be exchanged in one atomic step; if not, an
            overwrite takes two renames.
    """

    def __init__(self, fault: Fault | None = None, *, can_exchange: bool = True) -> None:
        self._mutex = threading.Lock()
        self._can_exchange = can_exchange
        self._fault = fault
        self._num_counted = 0
        self._operations: list[Operation] = []
        self.has_failed = False

    @property
    def operations(self) -> Sequence[Operation]:
        """What reached the store since it was made, or since `forget`."""
        with self._mutex:
            return tuple(self._operations)

    def forget(self) -> None:
        """Empties the record of operations."""
        with self._mutex:
            self._operations.clear()

    def inject(self, fault: Fault) -> None:
        """From now on goes wrong as `fault` says; operations are counted from here."""
        with self._mutex:
            self._fault, self._num_counted, self.has_failed = fault, 0, False

    def heal(self) -> None:
        """From now on all goes well."""
        with self._mutex:
            self._fault = None

    def operation(self, kind: str, path: str) -> None:
        """Records the operation, and raises where the fault says so."""
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
        place, self._num_counted = self._num_counted, self._num_counted + 1
        if place < fault.at:
            return False
        return place == fault.at or (fault.mode == "lasting" and reached.kind in CHANGES)

    def swap(self, first: str, second: str) -> bool:
        """As on a local file system, if it was made with `can_exchange`; else False."""
        if self._can_exchange:
            return super().swap(first, second)
        self.operation("swap", second)
        return False
