"""Converts the system's errors to errors of this package, and identifies those of absent paths."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Generator

from functional_ckpt import errors

_ABSENT = (errno.ENOENT, errno.ENOTDIR)


def is_absence(error: OSError) -> bool:
    """Returns whether an error means that a path does not exist; other errors do not.

    If a server does not answer, a directory may not be searched or the process has no descriptors
    left, the checkpoint may still exist.
    """
    return error.errno in _ABSENT


@contextlib.contextmanager
def absence_as_damage(message: str, path: str) -> Generator[None]:
    """Converts an error of the block that means absence to `CorruptCheckpointError`."""
    try:
        yield
    except errors.StorageError as error:
        if not is_absence(error):
            raise
        raise errors.CorruptCheckpointError(message, path=path) from error


@contextlib.contextmanager
def clear_errors(action: str, path: str) -> Generator[None]:
    """Converts the system's errors in the block to `StorageError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, errors.CheckpointError):
            raise
        raise errors.StorageError(
            f"Cannot {action} {path}: {error.strerror or error} [errno {error.errno}].",
            errno=error.errno,
            path=path,
        ) from error
    except MemoryError as error:
        code = errno.ENOMEM
        raise errors.StorageError(
            f"Cannot {action} {path}: {os.strerror(code)} [errno {code}].", errno=code, path=path
        ) from error
