"""The error tree: every error of this package, grouped by the caller's reaction.

    CheckpointError
    ├── UsageError (ValueError)                  fix the call
    │   ├── UnsupportedLeafError (TypeError)     a value that cannot be stored
    │   ├── NameCollisionError                   two leaves with one name on disk
    │   ├── ClosedError                          the manager was closed
    │   └── ForkedError (RuntimeError)           used in a forked child
    ├── StepNotFoundError (KeyError)             no such step, item or checkpoint
    ├── StepExistsError (FileExistsError)        the step exists, and overwrite was not passed
    ├── MismatchError (ValueError)               checkpoint and target differ: nothing was touched
    ├── CorruptCheckpointError (ValueError)      stored bytes are damaged
    ├── StorageError (OSError)                   the file system refused
    ├── LockedError (BlockingIOError)            another writer holds the directory
    ├── ReadOnlyError (PermissionError)          a write through a read-only manager
    ├── SaveError (RuntimeError)                 a save failed in the background, from `__cause__`
    └── CoordinationError (RuntimeError)         another rank failed
        └── CoordinationTimeoutError (TimeoutError)

With several ranks, an error of one is raised on all. The others raise a subclass of the same class
and of `CoordinationError` that names the failed rank: `except MismatchError` catches it everywhere.

Errors do not change once raised: `CheckpointError.replace` returns a copy with other attributes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypedDict, TypeVar, Unpack

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
    "rebuild",
]


class Context(TypedDict, total=False):
    """The keyword arguments that every error takes: the attributes of `CheckpointError`."""

    step: int | None
    path: object
    key_path: str | None
    touched: bool


_Kind = TypeVar("_Kind", bound="CheckpointError")


class CheckpointError(Exception):
    """Base of every error that this package raises.

    Attributes:
        message: The text.
        step: The step concerned, or None.
        path: The file or directory concerned, or None.
        key_path: The leaf concerned, as `item.key.key`, or None.
        touched: Whether a restore had started to write into the caller's objects.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int | None = None,
        path: object = None,
        key_path: str | None = None,
        touched: bool = False,
    ) -> None:
        super().__init__(message)
        self.touched = touched
        self.message = message
        self.step = step
        self.path = None if path is None else str(path)
        self.key_path = key_path

    def replace(self, message: str | None = None, **fields: Any) -> Self:
        """Returns a copy with another message or other attributes, its cause and traceback kept."""
        known = self._fields() | fields | ({} if message is None else {"message": message})
        error = rebuild(type(self), known["message"], known)
        error.__cause__, error.__suppress_context__ = self.__cause__, self.__suppress_context__
        return error.with_traceback(self.__traceback__)

    def __str__(self) -> str:
        return self.message  # KeyError would show the repr of its argument, OSError an errno

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword arguments are not in `args`: pickle would lose them.
        return (rebuild, (type(self), self.message, self._fields()))

    def _fields(self) -> dict[str, Any]:
        # `errno` is a slot of OSError.
        return self.__dict__ | ({"errno": self.errno} if isinstance(self, StorageError) else {})


def rebuild(kind: type[_Kind], message: str, fields: Mapping[str, object]) -> _Kind:
    """Returns an error with other attributes than its constructor takes.

    Args:
        kind: The class.
        message: The message.
        fields: The attributes by name.
    """
    error = kind(message)
    for name, value in fields.items():
        setattr(error, name, value)
    return error


class UsageError(CheckpointError, ValueError):
    """The call itself is wrong; nothing was done."""


class UnsupportedLeafError(UsageError, TypeError):
    """A value that no handler and no leaf codec can store."""


class NameCollisionError(UsageError):
    """Two leaves whose key paths join to the same name."""


class ClosedError(UsageError):
    """The manager was closed."""


class ForkedError(UsageError, RuntimeError):
    """A forked child used a manager of its parent (TensorStore would abort the process)."""


class StepNotFoundError(CheckpointError, KeyError):
    """No such step, item or checkpoint."""


class StepExistsError(CheckpointError, FileExistsError):
    """The step exists, and the manager has `overwrite=False`."""


class MismatchError(CheckpointError, ValueError):
    """The checkpoint and the restore target differ; the target was left exactly as it was.

    Attributes:
        missing: Leaves the target expects and the checkpoint lacks.
        unexpected: Leaves the checkpoint holds and the target lacks.
        mismatched: Leaves that differ, each with expected and got.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
        **context: Unpack[Context],
    ) -> None:
        super().__init__(message, **context)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)


class CorruptCheckpointError(CheckpointError, ValueError):
    """Stored bytes are damaged; `.touched` says whether the target was modified."""


class StorageError(CheckpointError, OSError):
    """The file system refused an operation; `errno` is that of the cause."""

    def __init__(
        self, message: str, *, errno: int | None = None, **context: Unpack[Context]
    ) -> None:
        super().__init__(message, **context)
        self.errno = errno


class LockedError(CheckpointError, BlockingIOError):
    """Another live writer holds the directory."""


class ReadOnlyError(CheckpointError, PermissionError):
    """A write through a read-only manager."""


class SaveError(CheckpointError, RuntimeError):
    """A save failed after `save` had returned; the step was not committed and is not listed."""


class CoordinationError(CheckpointError, RuntimeError):
    """Another rank failed, or the ranks disagree.

    Attributes:
        ranks: The ranks that failed, where known.
    """

    def __init__(
        self, message: str, *, ranks: Iterable[int] = (), **context: Unpack[Context]
    ) -> None:
        super().__init__(message, **context)
        self.ranks = tuple(ranks)


class CoordinationTimeoutError(CoordinationError, TimeoutError):
    """Another rank did not answer in time."""


@functools.cache
def on_other_ranks(kind: type[CheckpointError]) -> type[CoordinationError]:
    """Returns the class that the other ranks raise: a subclass of `kind` and `CoordinationError`.

    >>> issubclass(on_other_ranks(MismatchError), MismatchError)
    True
    """
    if issubclass(kind, CoordinationError):
        return kind
    if issubclass(CoordinationError, kind):
        return CoordinationError

    def reduce(error: CheckpointError) -> tuple[object, ...]:
        return (_rebuild_of_other_rank, (kind, error.message, error._fields()))

    namespace: dict[str, Any] = {
        "__doc__": f"{kind.__name__} of another rank.",
        "__module__": kind.__module__,
        "__reduce__": reduce,  # pickle would look the class up by its name and find `kind`
    }
    make_class: Any = type  # checkers find no order for the bases of all errors at once
    return make_class(kind.__name__, (kind, CoordinationError), namespace)


def _rebuild_of_other_rank(
    kind: type[CheckpointError], message: str, fields: dict[str, object]
) -> CheckpointError:
    return rebuild(on_other_ranks(kind), message, fields)
