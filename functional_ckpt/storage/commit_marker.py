"""The commit where there is no rename: a marker, written last.

    <root>/<step>/...                               what is being written, where it will stay
    <root>/<step>/commit_success.txt                the marker: from now on it is a step
    <root>/<step>.orbax-checkpoint-tmp/.unfinished  the note that it is being written, or removed

The note comes before the first object and goes after the marker, or after the last object was
removed; so what a crash left is known from a note without its marker. A step that replaces another
is written below the note's folder, marked there, and copied within the store.

The note also keeps apart a writer that was suspended and the one that took over from it, whatever
moment the first was stopped at. It writes its marker, then reads its note; the other writes over
the note, then reads the marker. So at least one of them sees what the other did. The first reports
a step only if its note was untouched, else it takes its marker back; the second keeps a step only
after it has made the marker its own, on condition that it still was as it was seen.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import uuid
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.tree import plain_json
from functional_ckpt.storage.object_store import MARKER, ObjectStorage

__all__ = [
    "abandon",
    "begin",
    "clean_up",
    "discard",
    "intent",
    "publish",
    "resume",
    "write_marker",
]

_NOTE = ".unfinished"
_TAKEN_BACK = b'{"writer": "functional_ckpt", "taken_back": true}'
_log = logging.getLogger("functional_ckpt")


def intent(tmp: str) -> str:
    """The note that belongs to a temporary name."""
    return os.path.join(tmp, _NOTE)


def begin(storage: ObjectStorage, tmp: str, final: str, token: str | None = None) -> str:
    """Notes that `final` is being written, and says below what: `final`, or `tmp` if it is taken.

    Args:
        storage: The store.
        tmp: The note's folder.
        final: What the objects become part of.
        token: What the note says; None for a new one.

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
    _write_note(storage, tmp, token or uuid.uuid4().hex)
    place = tmp if is_taken else final
    storage.make_directory(place)
    return place


def resume(storage: ObjectStorage, tmp: str, final: str, token: str) -> str | None:
    """Where an upload goes on that was begun with this token; None if there is none."""
    if _noted(storage, tmp) != token:
        return None
    storage.notes[tmp] = token
    return tmp if storage.is_committed(final) else final


def publish(storage: ObjectStorage, tmp: str, final: str) -> None:
    """Marks what was written below `final`: the one request that makes it a step.

    Raises:
        StepExistsError: Another writer has marked it.
        LockedError: Another writer has taken over.
    """
    marker, content = os.path.join(final, MARKER), _own_marker(storage, tmp)
    if not storage.create(marker, content):
        raise errors.StepExistsError(
            f"{final} was created by another process during this save.", path=final
        )
    try:
        _check_note(storage, tmp)
    except errors.LockedError:
        _take_back(storage, marker, content)
        raise
    _remove_note(storage, tmp)


def write_marker(storage: ObjectStorage, tmp: str) -> None:
    """Marks what was written below `tmp`, whose note is needed no more: it can be copied now."""
    is_noted = tmp in storage.notes  # else it was not made by `begin`, and is nobody else's
    content = _own_marker(storage, tmp) if is_noted else _marker(uuid.uuid4().hex)
    storage.write(os.path.join(tmp, MARKER), content)
    storage.remove(intent(tmp))


def _own_marker(storage: ObjectStorage, tmp: str) -> bytes:
    """What a writer's marker says, once its note is known to be there.

    Raises:
        LockedError: Another writer has taken over.
    """
    _check_note(storage, tmp)
    return _marker(storage.notes[tmp])


def _marker(token: str) -> bytes:
    return json.dumps({"writer": "functional_ckpt", "token": token}).encode()


def _write_note(storage: ObjectStorage, tmp: str, token: str) -> None:
    storage.notes[tmp] = token
    storage.write(intent(tmp), json.dumps({"token": token}).encode())


def _noted(storage: ObjectStorage, tmp: str) -> str | None:
    """The token of the note that is there now; None without a note, "" for one without a token."""
    try:
        record: Any = plain_json.parse(storage.read(intent(tmp)))
        return str(record["token"])
    except errors.StorageError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    except (ValueError, KeyError, TypeError):
        return ""


def _check_note(storage: ObjectStorage, tmp: str) -> None:
    token = storage.notes.get(tmp)
    if token is None or _noted(storage, tmp) != token:
        raise errors.LockedError(
            f"{intent(tmp)}, the note of this save, is gone or another's: another writer has taken "
            "the directory over, and has removed or kept what was written. Only one may write it.",
            path=tmp,
        )


def _take_back(storage: ObjectStorage, marker: str, content: bytes) -> None:
    """Removes a marker that came too late, unless the next writer has made it its own."""
    if storage.replace_exactly(marker, content, _TAKEN_BACK):
        storage.remove_exactly(marker, _TAKEN_BACK)


def _keep(storage: ObjectStorage, final: str) -> bool:
    """Makes the marker of a writer that is gone this writer's; whether there is one."""
    marker = os.path.join(final, MARKER)
    while storage.is_committed(final):
        try:
            found = storage.read(marker)
        except errors.StorageError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        if found == _TAKEN_BACK:
            return False
        if storage.replace_exactly(marker, found, _marker(uuid.uuid4().hex)):
            return True
    return False


def _remove_note(storage: ObjectStorage, tmp: str) -> None:
    """The step is committed: a note that stays is no failure, the next writer takes it away."""
    storage.notes.pop(tmp, None)
    try:
        storage.remove(tmp)
    except (errors.StorageError, errors.LockedError) as error:
        _log.warning("Could not remove %s, the next writer will: %s", tmp, error)


def discard(storage: ObjectStorage, tmp: str, final: str) -> None:
    """Removes a step: the marker first, so that it is gone before it is not whole.

    Before that the marker is written over, on condition that nobody else has: few stores compare
    as they delete, and the next writer may have kept the step meanwhile.

    Raises:
        LockedError: Another writer has taken over.
    """
    _write_note(storage, tmp, uuid.uuid4().hex)
    marker = os.path.join(final, MARKER)
    if storage.exists(marker):
        found = storage.read(marker)
        _check_note(storage, tmp)
        if not storage.replace_exactly(marker, found, _TAKEN_BACK):
            raise errors.LockedError(
                f"{final} changed while it was being removed: another writer is active.",
                path=final,
            )
    storage.remove(final)
    storage.remove(tmp)
    storage.notes.pop(tmp, None)


def abandon(storage: ObjectStorage, tmp: str, final: str) -> None:
    """Removes what a failed save wrote, though its marker may be there; never another's step."""
    token = storage.notes.pop(tmp, None)
    if token is None:
        return  # it had not begun
    try:
        found = _noted(storage, tmp)
        if found not in (None, token):
            return  # another writer has begun, and what is there is its own
        marker, own = os.path.join(final, MARKER), _marker(token)
        if found == token and (not storage.exists(marker) or storage.read(marker) == own):
            storage.remove(final)
        storage.remove(tmp)
    except (errors.StorageError, errors.LockedError) as error:
        _log.warning("Could not remove %s, the next writer will: %s", tmp, error)


def clean_up(storage: ObjectStorage, tmp: str, final: str) -> bool:
    """Removes what a writer left that is dead, or failed and could not; a marked step stays.

    Returns:
        Whether there was anything.
    """
    if not storage.exists(tmp):
        return False
    if storage.exists(intent(tmp)):
        _write_note(storage, tmp, uuid.uuid4().hex)  # before the marker is looked for
        if not _keep(storage, final):
            storage.remove(final)
    storage.remove(tmp)
    storage.notes.pop(tmp, None)
    return True
