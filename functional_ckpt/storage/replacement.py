"""Replacing a single directory where two cannot be exchanged in one step.

    <final>                                  what is replaced, then the new one
    <final>.orbax-checkpoint-tmp-replaced    what is replaced, between the two renames

The name of the old one says what a journal would. All this happens within `tmp_paths.serialized`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator

from functional_ckpt import errors
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.tmp_paths import tmp_path

__all__ = ["finish", "is_replaced", "is_under_way", "replace", "rollback"]

_ENDING = "-replaced"
_MAX_NAME_BYTES = 255


def replace(storage: Storage, tmp: str, final: str) -> str:
    """Renames `tmp` to `final`, durably; returns where the old directory is, which is `tmp`."""
    old = _replaced(final)
    storage.rename(final, old)
    with rollback(lambda: storage.rename(old, final)):
        storage.rename(tmp, final)
        with rollback(lambda: storage.rename(final, tmp)):
            storage.sync_directory(os.path.dirname(final))
    storage.rename(old, tmp)
    return tmp


def is_replaced(path: str) -> bool:
    """Whether the path is that of an old directory."""
    return path.endswith(_ENDING)


def is_under_way(storage: Storage, final: str) -> bool:
    """Whether what was `final` has the name that it has between the two renames."""
    old = _replaced(final)
    # Where the name would be too long, the first rename was refused.
    return len(os.fsencode(os.path.basename(old))) <= _MAX_NAME_BYTES and storage.exists(old)


def finish(storage: Storage, final: str) -> None:
    """Ends a replacement that was cut: the old one comes back, or goes if the new one is there."""
    if not is_under_way(storage, final):
        return
    if storage.exists(final):
        storage.remove(_replaced(final))
        return
    storage.rename(_replaced(final), final)
    storage.sync_directory(os.path.dirname(final))


def _replaced(final: str) -> str:
    return tmp_path(final) + _ENDING


@contextlib.contextmanager
def rollback(undo: Callable[[], object]) -> Generator[None]:
    """Takes a rename back when what follows it fails: what is not durable must not be seen.

    Without this the caller, told of a failure, would remove `tmp`, where by now the old step is.
    """
    try:
        yield
    except Exception as error:
        try:
            undo()
        except errors.StorageError as failure:
            error.add_note(f"Taking the rename back failed too: {failure}")
        raise
