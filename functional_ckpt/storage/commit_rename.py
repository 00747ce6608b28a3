"""The commit on a file system: a step becomes visible by one rename of a durable directory.

Single checkpoints are written by processes that hold no lock of a directory of steps. Each writes
into a temporary directory of its own (a claim), and one rename makes it visible: the last one wins,
or the first if nothing may be overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import uuid
from collections.abc import Generator, Iterable, Sequence

from functional_ckpt import errors
from functional_ckpt.storage import replacement, tmp_paths
from functional_ckpt.storage.commit_base import NOTE, CommitProtocol, noting, to_note
from functional_ckpt.storage.durable import makedirs_durable, sync_tree
from functional_ckpt.storage.paths import check_arrays_path
from functional_ckpt.storage.queries import exists, is_directory, read_optional
from functional_ckpt.storage.tmp_paths import TMP_SUFFIX, final_path, tmp_path

_NUM_TOKEN_CHARS = 12
_log = logging.getLogger("functional_ckpt")


class RenameCommit(CommitProtocol):
    """Commits by renaming; see `CommitProtocol`."""

    def begin(self, final: str) -> str:
        """See `CommitProtocol.begin`."""
        check_arrays_path(final)
        tmp = tmp_paths.unique_tmp_path(final)
        self.storage.make_directory(tmp, parents=False)
        return tmp

    def publish(self, tmp: str, final: str, *, overwrite: bool = True) -> str | None:
        """See `CommitProtocol.publish`."""
        return self._put_in_place(tmp, final, overwrite, self._replace_in_two)

    def abandon(self, tmp: str) -> bool:
        """See `CommitProtocol.abandon`."""
        if self._is_left(tmp):
            return False
        try:
            self.storage.remove(tmp)
        except errors.StorageError as error:
            _log.warning("Could not remove %s, the next writer will: %s", tmp, error)
            return False
        return True

    # -------------------------------------------------------------------------------- removal

    def remove(self, names: Sequence[str]) -> dict[str, errors.CheckpointError]:
        """See `CommitProtocol.remove`."""
        storage, failures = self.storage, dict[str, errors.CheckpointError]()
        trash = os.path.join(self.hidden, "trash")
        moved: list[tuple[str, str]] = []
        for name in names:
            with noting(failures, name):
                storage.make_directory(trash)
                # The old step of an interrupted overwrite would look like the only copy.
                storage.remove(self._replaced(name))
                target = os.path.join(trash, f"{name}.{uuid.uuid4().hex[:8]}")
                if self._move(name, target):
                    moved.append((name, target))
        if moved:
            # Else a power cut could bring the name back, with a part of the step.
            try:
                storage.sync(self.root)
            except errors.CheckpointError as error:  # the next writer empties the trash
                return failures | {name: error for name, _ in moved}
        for name, target in moved:
            with noting(failures, name):
                storage.remove(target)
        return failures

    def _move(self, name: str, target: str) -> bool:
        """Renames a directory into the trash; removes it where it is if that is impossible."""
        path = os.path.join(self.root, name)
        try:
            self.storage.rename(path, target)
        except errors.StorageError as error:
            if error.errno != errno.EXDEV:
                raise
        else:
            return True
        self.removals.hide([name])
        self.storage.remove(path)
        self.storage.sync(self.root)
        self.removals.unhide([name])
        return False

    def _remove_unfinished(self, path: str) -> bool:
        """See `CommitProtocol`; the holder of the lock knows that no manager is alive."""
        storage = self.storage
        if replacement.is_replaced(path):
            try:
                with tmp_paths.serialized(os.path.dirname(path), wait_seconds=0.0):
                    replacement.finish(storage, final_path(path), self._is_there)
            except errors.LockedError:
                return False
            return True
        if tmp_paths.is_claim(path):
            return tmp_paths.remove_if_dead(storage, path)
        # Hide it first: if its writer is alive after all, it publishes all of it or nothing.
        if exists(storage, self.hidden):
            target = os.path.join(self.hidden, f"{os.path.basename(path)}.tmp")
            storage.remove(target)
            storage.rename(path, target)
            path = target
        storage.remove(path)
        return True

    # -------------------------------------------------------------------------------- uploads

    def begin_upload(self, final: str, token: str) -> str:
        """See `CommitProtocol.begin_upload`."""
        # A suspended writer that lost the directory must not modify the files of the next.
        storage, tmp = self.storage, f"{tmp_path(final)}-{token[:_NUM_TOKEN_CHARS]}"
        self.end_uploads(final, but=tmp)
        note, content = os.path.join(tmp, NOTE), to_note(token)
        if read_optional(storage, note) != content:
            storage.remove(tmp)
            storage.make_directory(tmp)
            storage.write(note, content)
        return tmp

    def end_uploads(self, final: str, *, but: str = "") -> None:
        """See `CommitProtocol.end_uploads`."""
        for name in self.storage.list(self.root):
            path = os.path.join(self.root, name)
            is_upload = name.startswith(os.path.basename(final) + TMP_SUFFIX)
            if is_upload and path != but and not tmp_paths.is_claim(name):
                self._remove_unfinished(path)

    def publish_upload(
        self, folder: str, final: str, files: Iterable[str], *, overwrite: bool
    ) -> None:
        """See `CommitProtocol.publish_upload`."""
        self.storage.remove(os.path.join(folder, NOTE))
        sync_tree(self.storage, folder, files)
        self.drop(self.publish(folder, final, overwrite=overwrite))

    # ---------------------------------------------------------------------------- small files

    def replace(self, path: str, data: bytes) -> None:
        """See `CommitProtocol.replace`."""
        temporary = f"{path}.{uuid.uuid4().hex[:12]}.tmp"
        self.storage.write(temporary, data)
        self.storage.sync(temporary)
        self.storage.rename(temporary, path)
        self.storage.sync(os.path.dirname(path))

    def replace_link(self, path: str, target: str) -> None:
        """See `CommitProtocol.replace_link`."""
        temporary = os.path.join(self.hidden, f"{os.path.basename(path)}.tmp")
        self.storage.remove(temporary)
        self.storage.link(temporary, target)
        self.storage.rename(temporary, path)
        self.storage.sync(os.path.dirname(path))

    # -------------------------------------------------------------------------------- identity

    def commit_id(self, path: str) -> str | None:
        """Returns inode and time of a directory, one of which differs for another directory."""
        found = self.storage.stat(path)
        if found is None or found.kind != "a directory" or found.identity is None:
            return None
        return f"{found.identity[1]}.{found.modified_ns}"

    def change_id(self) -> bytes | None:
        """Returns None: one system call returns the identity of a commit."""
        return None

    def is_committed(self, path: str) -> bool:
        """Returns whether a directory is at `path`: it gets its name when it is complete."""
        return is_directory(self.storage, path)

    def root_id(self) -> object:
        """Returns device and inode."""
        found = self.storage.stat(self.root, follow=True)
        return None if found is None else found.identity

    def _is_there(self, path: str) -> bool:
        return exists(self.storage, path)

    # ----------------------------------------------------------------------- single checkpoints

    @contextlib.contextmanager
    def claimed(self, final: str) -> Generator[str]:
        """See `CommitProtocol.claimed`."""
        makedirs_durable(self.storage, os.path.dirname(final))
        claim = tmp_paths.claim(self.storage, final)
        try:
            yield claim.path
        finally:
            try:
                self.storage.remove(claim.path)  # absent if it was published
            except errors.StorageError as error:
                _log.warning(
                    "Could not remove %s, the next writer of %s will: %s", claim.path, final, error
                )
            finally:
                claim.release()

    def publish_claim(self, tmp: str, final: str, *, overwrite: bool) -> None:
        """See `CommitProtocol.publish_claim`."""
        replace = functools.partial(replacement.replace, self.storage)
        with tmp_paths.serialized(os.path.dirname(final)):
            replacement.finish(self.storage, final, self._is_there)
            replaced = self._put_in_place(tmp, final, overwrite, replace)
        self.drop(replaced)

    def recover_claim(self, final: str) -> None:
        """See `CommitProtocol.recover_claim`."""
        if replacement.is_under_way(self.storage, final):
            with tmp_paths.serialized(os.path.dirname(final)):
                replacement.finish(self.storage, final, self._is_there)
