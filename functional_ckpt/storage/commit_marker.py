"""The commit where there is no rename: a marker, written last.

    <root>/<step>/...                               what is being written, where it will stay
    <root>/<step>/commit_success.txt                the marker: from now on it is a step
    <root>/<step>.orbax-checkpoint-tmp/.unfinished  the note that it is being written, or removed

The note comes before the first object and goes after the marker, or after the last object was
removed; so what a crash left is known from a note without its marker. A step that replaces another
is written below the note's folder, marked there, and copied within the store.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import uuid

from functional_ckpt import errors
from functional_ckpt.core.tree import plain_json
from functional_ckpt.storage.object_store import MARKER, ObjectStorage

__all__ = ["abandon", "begin", "clean_up", "discard", "intent", "publish", "write_marker"]

_NOTE = ".unfinished"
_log = logging.getLogger("functional_ckpt")


def intent(tmp: str) -> str:
    """The note that belongs to a temporary name."""
    return os.path.join(tmp, _NOTE)


def begin(storage: ObjectStorage, tmp: str, final: str) -> str:
    """Notes that `final` is being written, and says below what: `final`, or `tmp` if it is taken.

    Raises:
        StorageError: Objects are there that no writer of ours has left.
    """
    clean_up(storage, tmp, final)
    is_taken = storage.is_committed(final)
    if not is_taken and storage.exists(final):
        raise errors.StorageError(
            f"Cannot write {final}: objects are there, but no {MARKER}. A copy of a step needs "
            "that file, written last; remove what is of no use.",
            errno=errno.ENOTEMPTY,
            path=final,
        )
    storage.write(intent(tmp), json.dumps({"token": uuid.uuid4().hex}).encode())
    place = tmp if is_taken else final
    storage.make_directory(place)
    return place


def publish(storage: ObjectStorage, tmp: str, final: str) -> None:
    """Marks what was written below `final`: the one request that makes it a step.

    Raises:
        StepExistsError: Another writer has marked it.
        LockedError: Another writer has taken over.
    """
    storage.check_leases()
    if not storage.create(os.path.join(final, MARKER), _mark(storage, tmp)):
        raise errors.StepExistsError(f"{final} has appeared since this save began.", path=final)
    _remove_intent(storage, tmp)


def write_marker(storage: ObjectStorage, tmp: str) -> None:
    """Marks what was written below `tmp`, whose note is needed no more: it can be copied now."""
    storage.check_leases()
    storage.write(os.path.join(tmp, MARKER), _mark(storage, tmp))
    storage.remove(intent(tmp))


def _mark(storage: ObjectStorage, tmp: str) -> bytes:
    """The marker's content; the note's token tells whose it is."""
    try:
        token = plain_json.parse(storage.read(intent(tmp)))["token"]
    except (errors.StorageError, ValueError, KeyError, TypeError):
        token = ""
    return json.dumps({"writer": "functional_ckpt", "token": token}).encode()


def _remove_intent(storage: ObjectStorage, tmp: str) -> None:
    """The step is committed: a note that stays is no failure, the next writer takes it away."""
    try:
        storage.remove(tmp)
    except errors.StorageError as error:
        _log.warning("%s stays until the next writer opens the directory: %s", tmp, error)


def discard(storage: ObjectStorage, tmp: str, final: str) -> None:
    """Removes a step: the marker first, so that it is gone before it is not whole."""
    storage.check_leases()
    storage.write(intent(tmp), b"{}")
    storage.remove(final)
    storage.remove(tmp)


def abandon(storage: ObjectStorage, tmp: str, final: str) -> None:
    """Removes what a failed save wrote, though its marker may be there; never another's step."""
    try:
        if storage.exists(intent(tmp)):
            marker = os.path.join(final, MARKER)
            if not storage.exists(marker) or storage.read(marker) == _mark(storage, tmp):
                storage.remove(final)
        storage.remove(tmp)
    except errors.StorageError as error:
        _log.warning("%s stays until the next writer opens the directory: %s", tmp, error)


def clean_up(storage: ObjectStorage, tmp: str, final: str) -> bool:
    """Removes what a writer left that is dead, or failed and could not; a marked step stays.

    Returns:
        Whether there was anything.
    """
    if not storage.exists(tmp):
        return False
    if storage.exists(intent(tmp)) and not storage.is_committed(final):
        storage.remove(final)
    storage.remove(tmp)
    return True
