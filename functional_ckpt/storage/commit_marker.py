"""The commit on an object store, which has no rename: a marker, written last.

    <root>/<step>/...                               the step being written, at its final path
    <root>/<step>/commit_success.txt                the marker: from now on it is a step
    <root>/<step>.orbax-checkpoint-tmp/.unfinished  the note that it is being written, or removed

The note is written before the first object, and removed after the marker is written, or after the
last object is removed; so a note without its marker identifies leftovers of a crash. A step that
replaces another is written below the note's folder, marked there, and copied within the store.

The note also prevents a conflict between a suspended writer and its successor, wherever the first
was stopped. The first writes its marker, then reads its note. The successor overwrites the note,
then reads the marker. So at least one of them sees the other's write. The first reports a step only
if its note is unchanged, else it removes its marker. The successor keeps a step only after it has
replaced the marker by its own, on condition that the marker was unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import uuid
from collections.abc import Generator, Iterable, Sequence
from typing import Any, ClassVar

from functional_ckpt import errors
from functional_ckpt.core.records import orbax
from functional_ckpt.core.tree import plain_json
from functional_ckpt.storage import replacement
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.commit_base import NOTE, CommitProtocol, noting, to_note
from functional_ckpt.storage.object_access import ConditionalObjects
from functional_ckpt.storage.queries import exists, read_optional
from functional_ckpt.storage.tmp_paths import final_path, tmp_path

_MARKER = orbax.COMMIT_FILE
_CHANGED = "changed"
_TAKEN_BACK = b'{"writer": "functional_ckpt", "taken_back": true}'
_log = logging.getLogger("functional_ckpt")


def _claim_lock(final: str) -> str:
    """Returns the path of the lease of the writer of a single checkpoint."""
    return f"{final}.functional_ckpt-lock"


class MarkerCommit(CommitProtocol):
    """Commits by writing a marker; see `CommitProtocol`."""

    verifies_uploads: ClassVar[bool] = True
    repeats_names: ClassVar[bool] = True

    def __init__(self, storage: Storage, root: str, objects: ConditionalObjects) -> None:
        super().__init__(storage, root)
        self._objects = objects

    def begin(self, final: str, token: str | None = None) -> str:
        """Notes that `final` is being written; returns `final`, or a copy's path if it exists.

        Raises:
            StorageError: There are foreign objects.
        """
        tmp = tmp_path(final)
        self._clean_up(tmp, final)
        is_taken = self.is_committed(final)
        if not is_taken and exists(self.storage, final):
            raise errors.StorageError(
                f"Cannot write {final}: it has objects, but no {_MARKER}. A copy of a step "
                "needs that file, written last; otherwise remove the objects.",
                errno=errno.ENOTEMPTY,
                path=final,
            )
        self._write_note(tmp, token or uuid.uuid4().hex)
        target = tmp if is_taken else final
        self.storage.make_directory(target)
        return target

    def publish(self, tmp: str, final: str, *, overwrite: bool = True) -> str | None:
        """See `CommitProtocol.publish`; if `tmp` is `final` its marker is all that is missing.

        Raises:
            LockedError: Another writer has taken over.
        """
        if tmp != final:
            self._write_marker(tmp)
            replaced = self._put_in_place(tmp, final, overwrite, self._replace_in_two)
            self._note_change()
            return replaced
        tmp = tmp_path(final)
        marker, content = os.path.join(final, _MARKER), self._own_marker(tmp)
        if not self._objects.create(marker, content):
            raise errors.StepExistsError(
                f"{final} was created by another process during this save.", path=final
            )
        try:
            self._check_note(tmp)
        except errors.LockedError:
            # Remove a marker that came too late, unless the next writer has made it its own.
            if self._objects.replace_exactly(marker, content, _TAKEN_BACK):
                self._objects.remove_exactly(marker, _TAKEN_BACK)
            raise
        self._remove_note(tmp)
        return None

    def _write_marker(self, tmp: str) -> None:
        """Writes the marker of the step below `tmp`, and removes its note."""
        is_noted = tmp in self._objects.notes  # else `begin` did not create it
        content = self._own_marker(tmp) if is_noted else _to_marker(uuid.uuid4().hex)
        self.storage.write(os.path.join(tmp, _MARKER), content)
        self.storage.remove(_note(tmp))

    def _own_marker(self, tmp: str) -> bytes:
        """Returns the content of this writer's marker; raises if another has taken over."""
        self._check_note(tmp)
        return _to_marker(self._objects.notes[tmp])

    def finish_overwrite(self) -> list[str]:
        """See `CommitProtocol.finish_overwrite`."""
        if done := super().finish_overwrite():
            self._note_change()
        return done

    # ---------------------------------------------------------------------------- the note

    def _write_note(self, tmp: str, token: str) -> None:
        self._objects.notes[tmp] = token
        self.storage.write(_note(tmp), to_note(token))

    def _noted(self, tmp: str) -> str | None:
        """Returns the token of the note; None without a note, "" for one without a token."""
        data = read_optional(self.storage, _note(tmp))
        if data is None:
            return None
        try:
            record: Any = plain_json.parse(data)
            return str(record["token"])
        except (ValueError, KeyError, TypeError):
            return ""

    def _check_note(self, tmp: str) -> None:
        token = self._objects.notes.get(tmp)
        if token is None or self._noted(tmp) != token:
            raise errors.LockedError(
                f"{_note(tmp)}, the note of this save, was removed or replaced: another writer has "
                "taken over the directory, and has removed or kept the step. Only one may write "
                "it.",
                path=tmp,
            )

    def _remove_note(self, tmp: str) -> None:
        """Removes the note of a committed step; on failure the next writer removes it."""
        self._objects.notes.pop(tmp, None)
        try:
            self.storage.remove(tmp)
        except (errors.StorageError, errors.LockedError) as error:
            _log.warning("Could not remove %s, the next writer will: %s", tmp, error)

    # ---------------------------------------------------------------------------- removal

    def remove(self, names: Sequence[str]) -> dict[str, errors.CheckpointError]:
        """See `CommitProtocol.remove`."""
        failures: dict[str, errors.CheckpointError] = {}
        for name in names:
            with noting(failures, name):
                self._remove(os.path.join(self.root, name))
        if names:
            self._note_change()
        return failures

    def _remove(self, final: str) -> None:
        """Removes a step: the marker first, so that an incomplete step is never visible.

        Before that the marker is overwritten, on condition that it is unchanged. Few stores have
        conditional deletion, and the next writer may have kept the step in the meantime.

        Raises:
            LockedError: Another writer has taken over.
        """
        tmp = tmp_path(final)
        self._write_note(tmp, uuid.uuid4().hex)
        marker = os.path.join(final, _MARKER)
        if (found := read_optional(self.storage, marker)) is not None:
            self._check_note(tmp)
            if not self._objects.replace_exactly(marker, found, _TAKEN_BACK):
                raise errors.LockedError(
                    f"{final} changed while it was being removed: another writer is active.",
                    path=final,
                )
        self.storage.remove(final)
        self.storage.remove(tmp)
        self._objects.notes.pop(tmp, None)

    def abandon(self, tmp: str) -> bool:
        """See `CommitProtocol.abandon`; never removes the step of another writer."""
        final = final_path(tmp)
        tmp = tmp_path(final)
        if self._is_left(tmp):
            return False
        token = self._objects.notes.pop(tmp, None)
        if token is None:
            return True  # it had not started
        try:
            found = self._noted(tmp)
            if found not in (None, token):
                return True  # another writer has started, and owns the objects
            marker = read_optional(self.storage, os.path.join(final, _MARKER))
            if found == token and marker in (None, _to_marker(token)):
                self.storage.remove(final)
            self.storage.remove(tmp)
        except (errors.StorageError, errors.LockedError) as error:
            _log.warning("Could not remove %s, the next writer will: %s", tmp, error)
        return True

    def _remove_unfinished(self, path: str) -> bool:
        """See `CommitProtocol`; keeps files that `fc.save` is writing under its own lease."""
        final = final_path(path)
        if exists(self.storage, _claim_lock(final)):
            return False
        if replacement.is_replaced(path):
            replacement.finish(self.storage, final, self._is_there)
        else:
            self._clean_up(tmp_path(final), final)
        return True

    def _clean_up(self, tmp: str, final: str) -> None:
        """Removes the leftovers of a writer that is dead, or failed; a marked step stays."""
        if not exists(self.storage, tmp):
            return
        if exists(self.storage, _note(tmp)):
            self._write_note(tmp, uuid.uuid4().hex)  # before the marker is read
            if not self._keep(final):
                self.storage.remove(final)
        self.storage.remove(tmp)
        self._objects.notes.pop(tmp, None)

    def _keep(self, final: str) -> bool:
        """Replaces a dead writer's marker by this writer's; returns False if there is none."""
        marker = os.path.join(final, _MARKER)
        while True:
            found = read_optional(self.storage, marker)
            if found is None or found == _TAKEN_BACK:
                return False
            if self._objects.replace_exactly(marker, found, _to_marker(uuid.uuid4().hex)):
                return True

    # ---------------------------------------------------------------------------- uploads

    def begin_upload(self, final: str, token: str) -> str:
        """See `CommitProtocol.begin_upload`."""
        tmp = tmp_path(final)
        if self._noted(tmp) != token:
            return self.begin(final, token)
        self._objects.notes[tmp] = token
        return tmp if self.is_committed(final) else final

    def end_uploads(self, final: str) -> None:
        """See `CommitProtocol.end_uploads`: a note whose removal was interrupted."""
        self.storage.remove(tmp_path(final))

    def publish_upload(
        self, folder: str, final: str, files: Iterable[str], *, overwrite: bool
    ) -> None:
        """See `CommitProtocol.publish_upload`."""
        self.drop(self.publish(folder, final, overwrite=overwrite))

    # ---------------------------------------------------------------------------- small files

    def replace(self, path: str, data: bytes) -> None:
        """See `CommitProtocol.replace`."""
        self._objects.overwrite(path, data)

    def replace_link(self, path: str, target: str) -> None:
        """See `CommitProtocol.replace_link`; the link is a small object."""
        self.storage.link(path, target)

    # ---------------------------------------------------------------------------- identity

    def commit_id(self, path: str) -> str | None:
        """Returns time, size and version of the marker."""
        return self._objects.commit_id(os.path.join(path, _MARKER))

    def change_id(self) -> bytes | None:
        """Returns the content of an object that is rewritten after each replacement and removal."""
        return read_optional(self.storage, os.path.join(self.hidden, _CHANGED)) or b""

    def _note_change(self) -> None:
        try:
            self.replace(os.path.join(self.hidden, _CHANGED), uuid.uuid4().hex.encode())
        except (errors.StorageError, errors.LockedError) as error:
            _log.warning(
                "%s: read-only managers may notice only after some looks that steps were replaced "
                "or removed: %s",
                self.root,
                error,
            )

    def is_committed(self, path: str) -> bool:
        """Returns whether there is a marker."""
        return self.commit_id(path) is not None

    def root_id(self) -> object:
        """Returns a constant: a directory is only a prefix."""
        return ""

    def _is_there(self, path: str) -> bool:
        return self.is_committed(path)

    # ---------------------------------------------------------------------- single checkpoints

    @contextlib.contextmanager
    def claimed(self, final: str) -> Generator[str]:
        """See `CommitProtocol.claimed`; a lease allows one writer."""
        lock = self.storage.lock(_claim_lock(final))
        tmp = tmp_path(final)
        try:
            replacement.finish(self.storage, final, self._is_there)
            tmp = self.begin(final)
            yield tmp
        except BaseException:
            self.abandon(tmp)
            raise
        finally:
            lock.release()

    def publish_claim(self, tmp: str, final: str, *, overwrite: bool) -> None:
        """See `CommitProtocol.publish_claim`."""
        if tmp == final:
            self.publish(tmp, final, overwrite=overwrite)
            return
        self._write_marker(tmp)
        replace = functools.partial(replacement.replace, self.storage)
        self.drop(self._put_in_place(tmp, final, overwrite, replace))

    def recover_claim(self, final: str) -> None:
        """Does nothing: `claimed` does it, under the lease."""


def _note(tmp: str) -> str:
    return os.path.join(tmp, NOTE)


def _to_marker(token: str) -> bytes:
    return json.dumps({"writer": "functional_ckpt", "token": token}).encode()
