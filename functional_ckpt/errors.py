"""The error tree: every error of this package, grouped by the caller's reaction.

    CheckpointError
    ├── UsageError (ValueError)                  fix the call
    │   ├── UnsupportedLeafError (TypeError)     a value that cannot be carried
    │   ├── NameCollisionError                   two leaves that would share one name on disk
    │   ├── ClosedError                          the manager was closed
    │   └── ForkedError (RuntimeError)           used in a forked child
    ├── StepNotFoundError (KeyError)             no such step, item or checkpoint
    ├── StepExistsError (FileExistsError)        the step is there and overwriting was not allowed
    ├── MismatchError (ValueError)               checkpoint and target differ: nothing was touched
    ├── CorruptCheckpointError (ValueError)      bytes differ from what was written
    ├── StorageError (OSError)                   the file system said no
    ├── LockedError (BlockingIOError)            another writer holds the directory
    ├── ReadOnlyError (PermissionError)          a write through a read-only manager
    ├── SaveError (RuntimeError)                 a save failed in the background, from `__cause__`
    └── CoordinationError (RuntimeError)         another rank failed
        └── CoordinationTimeoutError (TimeoutError)

With many ranks, an error of one is raised on all: on the others as the same class, which is then a
`CoordinationError` too and names the rank at fault: `except MismatchError` catches it everywhere.

Every error carries `.step`, `.path` and `.key_path` where they apply (else None).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "CheckpointError",
    "ClosedError",
    "CoordinationError",
    "CoordinationTimeoutError",
    "CorruptCheckpointError",
    "ForkedError",
    "LockedError",
    "MismatchError",
    "NameCollisionError",
    "ReadOnlyError",
    "SaveError",
    "StepExistsError",
    "StepNotFoundError",
    "StorageError",
    "UnsupportedLeafError",
    "UsageError",
    "on_other_ranks",
]


class CheckpointError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        step: The step concerned, if any.
        path: The file or directory concerned, if any.
        key_path: The leaf concerned, as `item.key.key`, if any.
        touched: Whether a restore had begun to write into the caller's objects.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int | None = None,
        path: object = None,
        key_path: str | None = None,
    ) -> None:
        super().__init__(message)
        self.touched = False
        self.message = message
        self.step = step
        self.path = None if path is None else str(path)
        self.key_path = key_path

    def __str__(self) -> str:
        # KeyError would show the repr of its argument and OSError an errno; people read this.
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only fields are not in `args`; an error would lose them between processes.
        return (_rebuild, (type(self), self.message, dict(self.__dict__)))


def _rebuild(
    kind: type[CheckpointError], message: str, fields: dict[str, object]
) -> CheckpointError:
    error = kind(message)
    error.__dict__.update(fields)
    return error


class UsageError(CheckpointError, ValueError):
    """The call itself is wrong; nothing was done."""


class UnsupportedLeafError(UsageError, TypeError):
    """A value that no handler and no leaf codec can carry."""


class NameCollisionError(UsageError):
    """Two leaves whose key paths join to the same name."""


class ClosedError(UsageError):
    """The manager was closed."""


class ForkedError(UsageError, RuntimeError):
    """A forked child used a manager of its parent (TensorStore would abort the process)."""


class StepNotFoundError(CheckpointError, KeyError):
    """No such step, item or checkpoint."""


class StepExistsError(CheckpointError, FileExistsError):
    """The step exists and the manager was not told to overwrite."""


class MismatchError(CheckpointError, ValueError):
    """The checkpoint and the restore target differ; the target was left exactly as it was.

    Attributes:
        missing: Leaves the target expects and the checkpoint lacks.
        unexpected: Leaves the checkpoint holds and the target has no place for.
        mismatched: Leaves that differ, each with expected and got.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
        step: int | None = None,
        path: object = None,
        key_path: str | None = None,
    ) -> None:
        super().__init__(message, step=step, path=path, key_path=key_path)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)


class CorruptCheckpointError(CheckpointError, ValueError):
    """What is on disk is not what was written.

    Attributes:
        touched: Whether a restore had written into the caller's objects when the damage was found.
    """

    def __init__(
        self,
        message: str,
        *,
        touched: bool = False,
        step: int | None = None,
        path: object = None,
        key_path: str | None = None,
    ) -> None:
        super().__init__(message, step=step, path=path, key_path=key_path)
        self.touched = touched


class StorageError(CheckpointError, OSError):
    """The file system refused an operation; `errno` is that of the cause."""

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        step: int | None = None,
        path: object = None,
        key_path: str | None = None,
    ) -> None:
        super().__init__(message, step=step, path=path, key_path=key_path)
        self.errno = errno


class LockedError(CheckpointError, BlockingIOError):
    """Another live writer holds the directory."""


class ReadOnlyError(CheckpointError, PermissionError):
    """A write was asked of a read-only manager."""


class SaveError(CheckpointError, RuntimeError):
    """A save failed after `save` had returned; the step was not committed and is not listed."""


class CoordinationError(CheckpointError, RuntimeError):
    """Another rank failed, or the ranks disagree.

    Attributes:
        ranks: The ranks at fault, where known.
    """

    def __init__(
        self,
        message: str,
        *,
        ranks: Iterable[int] = (),
        step: int | None = None,
        path: object = None,
        key_path: str | None = None,
    ) -> None:
        super().__init__(message, step=step, path=path, key_path=key_path)
        self.ranks = tuple(ranks)


class CoordinationTimeoutError(CoordinationError, TimeoutError):
    """Another rank did not answer in time."""


@functools.cache
def on_other_ranks(kind: type[CheckpointError]) -> type[CoordinationError]:
    """The class that other ranks raise where one has raised `kind`: both, that and the other.

    >>> issubclass(on_other_ranks(MismatchError), MismatchError)
    True
    """
    if issubclass(kind, CoordinationError):
        return kind
    if issubclass(CoordinationError, kind):
        return CoordinationError

    def reduce(error: CheckpointError) -> tuple[object, ...]:
        return (_rebuild_of_other_rank, (kind, error.message, dict(error.__dict__)))

    namespace: dict[str, Any] = {
        "__doc__": f"{kind.__name__} of another rank.",
        "__module__": kind.__module__,
        "__reduce__": reduce,  # pickle would look the class up by its name, and find `kind`
    }
    make_class: Any = type  # checkers find no order for the bases of all errors at once
    return make_class(kind.__name__, (kind, CoordinationError), namespace)


def _rebuild_of_other_rank(
    kind: type[CheckpointError], message: str, fields: dict[str, object]
) -> CheckpointError:
    return _rebuild(on_other_ranks(kind), message, fields)
