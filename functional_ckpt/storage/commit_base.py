"""Shared parts of both commit protocols: temporary names, journal of an overwrite, recovery.

<root>/<step>.orbax-checkpoint-tmp-*/    a step being written; hidden from every reader
<root>/<step>/                           a committed step
<root>/.functional_ckpt/lock             the live writer's lock
<root>/.functional_ckpt/trash/           steps being removed
<root>/.functional_ckpt/replacing.json   journal of an overwrite in two renames
<root>/.functional_ckpt/removing.json    journal of removals that take several renames
<root>/.functional_ckpt/metrics/         metrics recorded after their step was committed
<root>/.functional_ckpt/history.jsonl    a line for each step, for reports; see `steps.run_log`
<root>/.functional_ckpt/changed          renewed after steps are replaced or removed; object stores
"""

from __future__ import annotations

import abc
import contextlib
import errno
import json
import logging
import os
from collections.abc import Callable, Generator, Iterable, Sequence, Set
from typing import ClassVar

from functional_ckpt import errors
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.queries import age_seconds, exists, is_directory
from functional_ckpt.storage.removal import RemovalJournal, name_in_directory, read_journal
from functional_ckpt.storage.tmp_paths import TMP_SUFFIX, final_path

HIDDEN = ".functional_ckpt"
NOTE = ".unfinished"
"""The file in a temporary directory that names the step being written or uploaded."""
_JOURNAL = "replacing.json"
_REPLACED = ".replaced"
_STALE_SECONDS = 60.0
_log = logging.getLogger("functional_ckpt")


class CommitProtocol(abc.ABC):
    """Publishes, replaces and removes the directories below a root, atomically.

    Stateless except for the store; any number may exist for one root.

    Args:
        storage: The store.
        root: The directory of the steps, or the parent of a single checkpoint.

    Attributes:
        hidden: The bookkeeping directory in the root.
        removals: The journal of steps that are hidden and still to be removed.
        verifies_uploads: Whether the store compares the digest of every file it receives.
        repeats_names: Whether two saves of a step may write the same paths, so that names of data
            files need a token of the save.
    """

    verifies_uploads: ClassVar[bool] = False
    repeats_names: ClassVar[bool] = False

    def __init__(self, storage: Storage, root: str) -> None:
        self.storage = storage
        self.root = root
        self.hidden = os.path.join(root, HIDDEN)
        self.removals = RemovalJournal(storage, root, self.hidden, self.replace)

    # ---------------------------------------------------------------------------- each protocol's

    @abc.abstractmethod
    def begin(self, final: str) -> str:
        """Creates the empty directory in which a step is written until it is published as `final`.

        Its parent exists, and is not created again if it was moved away.
        """

    @abc.abstractmethod
    def publish(self, tmp: str, final: str, *, overwrite: bool = True) -> str | None:
        """Makes the complete, durable directory `tmp` visible as `final`; durable when it returns.

        Args:
            tmp: A directory whose content is durable, from `begin`.
            final: Its final path. An existing step is exchanged with it in one system call, or if
                that is impossible by two renames with a journal.
            overwrite: Whether to replace an existing step, which may be newer than the save.

        Returns:
            The directory of the replaced step, which the caller removes; None without one.

        Raises:
            StepExistsError, StorageError: Nothing has changed.
        """

    @abc.abstractmethod
    def abandon(self, tmp: str) -> bool:
        """Removes the files of a failed save; returns False if they remain for the next writer."""

    @abc.abstractmethod
    def remove(self, names: Sequence[str]) -> dict[str, errors.CheckpointError]:
        """Removes steps, in this order: hides each at once, then removes its files.

        Returns:
            Name -> the reason why it could not be removed; all others are removed.
        """

    @abc.abstractmethod
    def begin_upload(self, final: str, token: str) -> str:
        """Returns where to copy a step; resumes an upload that was started with this token."""

    @abc.abstractmethod
    def end_uploads(self, final: str) -> None:
        """Removes leftovers of uploads of a committed step."""

    @abc.abstractmethod
    def publish_upload(
        self, folder: str, final: str, files: Iterable[str], *, overwrite: bool
    ) -> None:
        """Makes a step that was copied to `folder` durable and visible."""

    @abc.abstractmethod
    def replace(self, path: str, data: bytes) -> None:
        """Writes a file atomically and durably."""

    @abc.abstractmethod
    def replace_link(self, path: str, target: str) -> None:
        """Points a link at `target`, a name in the same directory, atomically and durably."""

    @abc.abstractmethod
    def commit_id(self, path: str) -> str | None:
        """Returns an identity that differs between any two commits at `path`; None without one.

        A link is no commit.
        """

    @abc.abstractmethod
    def change_id(self) -> bytes | None:
        """Returns an identity that changes once a known name may refer to another commit.

        None if that is unknown: then compare the `commit_id` of each path, which is cheap.
        """

    @abc.abstractmethod
    def is_committed(self, path: str) -> bool:
        """Returns whether `path` is a completely written directory."""

    @abc.abstractmethod
    def root_id(self) -> object:
        """Returns an identity that differs between this root and a later one at its path."""

    @abc.abstractmethod
    def _remove_unfinished(self, path: str) -> bool:
        """Removes a temporary directory; returns False if its writer may be alive."""

    @abc.abstractmethod
    def _is_there(self, path: str) -> bool:
        """Returns whether a step exists, complete or not."""

    # ----------------------------------------------------------------------- single checkpoints

    @abc.abstractmethod
    def claimed(self, final: str) -> contextlib.AbstractContextManager[str]:
        """Yields a temporary directory to write `final` in, and removes it at the end.

        It is for processes without a lock on a directory of steps. Several may write one path at
        once; the last to publish wins. The parent of `final` is created if needed.

        Raises:
            LockedError: On an object store, which has no rename, another process writes `final`.
        """

    @abc.abstractmethod
    def publish_claim(self, tmp: str, final: str, *, overwrite: bool) -> None:
        """Publishes the content of a claim as `final`; durable when it returns.

        Raises:
            StepExistsError: The path exists, and `overwrite` is false.
        """

    @abc.abstractmethod
    def recover_claim(self, final: str) -> None:
        """Completes a replacement of `final` that a crash interrupted between its two renames."""

    # ---------------------------------------------------------------------------- shared parts

    def drop(self, replaced: str | None) -> None:
        """Removes the step that `publish` has replaced, if any."""
        if replaced is not None:
            self.storage.remove(replaced)

    def discard(self, path: str) -> None:
        """Removes a step: hides it at once, so that a crash leaves only trash."""
        for error in self.remove([os.path.basename(path)]).values():
            raise error

    def recover(self, *, keep: Set[str] = frozenset()) -> list[str]:
        """Completes or removes a dead writer's leftovers; only the holder of the lock may call it.

        Args:
            keep: Names of unfinished directories that are kept, or of the steps that they are of.

        Returns:
            The actions, one line each, for the log.
        """
        storage, hidden = self.storage, self.hidden
        done = self.finish_overwrite()
        for name in storage.list(self.root):
            if (
                TMP_SUFFIX in name
                and not name.startswith(".")
                and keep.isdisjoint((name, final_path(name)))
            ):
                path = os.path.join(self.root, name)
                if self._is_mid_swap(final_path(path)):
                    continue  # it, or the copy that it was to replace, is all that is left
                if self._remove_unfinished(path):
                    done.append(f"removed unfinished {name}")
        done += self._finish_removals()
        trash = os.path.join(hidden, "trash")
        for name in storage.list(trash):
            final = os.path.join(self.root, name.removesuffix(_REPLACED))
            if name.endswith(_REPLACED) and self._is_mid_swap(final):
                done.append(
                    f"kept {os.path.join(trash, name)}, a step that is not in the directory, and "
                    f"no journal says why: move it to {final}, or remove it"
                )
            else:
                storage.remove(os.path.join(trash, name))
        for name in storage.list(hidden):
            if name.endswith(".tmp"):
                storage.remove(os.path.join(hidden, name))
        metrics = os.path.join(hidden, "metrics")
        for name in storage.list(metrics):
            path = os.path.join(metrics, name)
            # An evaluator beside this writer may be about to rename a fresh one.
            if name.endswith(".tmp") and age_seconds(storage, path) > _STALE_SECONDS:
                storage.remove(path)
        return done

    def _finish_removals(self) -> list[str]:
        """Removes the journal's directories; those that cannot be removed stay hidden."""
        names = sorted(self.removals.hidden_names())
        there = [name for name in names if exists(self.storage, os.path.join(self.root, name))]
        failures = self.remove(there)
        self.removals.keep_only(failures)
        return [
            f"removed {name}, whose removal was interrupted"
            if name not in failures
            else f"{name} cannot be removed and stays out of sight: {failures[name]}"
            for name in there
        ]

    def _put_in_place(
        self, tmp: str, final: str, overwrite: bool, in_two: Callable[[str, str], str]
    ) -> str | None:
        """Renames `tmp` to `final`, or exchanges them: at once, or by `in_two` renames."""
        storage, parent = self.storage, os.path.dirname(final)
        if not exists(storage, final):
            storage.rename(tmp, final)
            with rollback(lambda: storage.rename(final, tmp)):
                storage.sync(parent)
            return None
        if not overwrite:
            raise errors.StepExistsError(
                f"{final} was created by another process during this save.", path=final
            )
        if not is_directory(storage, final):
            raise errors.StorageError(
                f"Cannot write {final}: the path is a file, not a checkpoint. Move it away.",
                errno=errno.ENOTDIR,
                path=final,
            )
        if storage.swap(tmp, final):
            with rollback(lambda: storage.swap(tmp, final)):
                storage.sync(parent)
            return tmp
        return in_two(tmp, final)

    def _replace_in_two(self, tmp: str, final: str) -> str:
        """Overwrites by two renames; the journal lets the next writer complete them."""
        storage, hidden, parent = self.storage, self.hidden, os.path.dirname(final)
        for folder in (hidden, os.path.join(hidden, "trash")):
            storage.make_directory(folder, parents=False)
        old = self._replaced(final)
        storage.remove(old)
        journal = os.path.join(hidden, _JOURNAL)
        record = {"tmp": os.path.basename(tmp), "final": os.path.basename(final)}
        self.replace(journal, json.dumps(record).encode())
        storage.rename(final, old)
        with rollback(lambda: storage.rename(old, final)):
            storage.rename(tmp, final)
            with rollback(lambda: storage.rename(final, tmp)):
                storage.sync(parent)
                storage.remove(journal)
                storage.sync(hidden)
        return old

    def finish_overwrite(self) -> list[str]:
        """Completes an interrupted overwrite in two renames; call it before anything is written.

        Between the renames both steps are complete: the old one is in the trash, and the directory
        has none. In any other state the overwrite is complete, or was rolled back.

        Returns:
            The actions, one line each, for the log.
        """
        storage, journal = self.storage, os.path.join(self.hidden, _JOURNAL)
        record = read_journal(storage, journal, "journal of an interrupted overwrite")
        if record is None:
            return []
        tmp, final = (name_in_directory(record.get(key), journal) for key in ("tmp", "final"))
        done: list[str] = []
        source, target = os.path.join(self.root, tmp), os.path.join(self.root, final)
        if self._is_mid_swap(target):
            if storage.objects is not None:
                storage.remove(target)  # an incomplete copy
            source = source if self._is_there(source) else self._replaced(target)
            storage.rename(source, target)
            storage.sync(self.root)
            done.append(f"finished the replacement of {final}")
        storage.remove(journal)
        return done

    def overwritten(self, final: str) -> str | None:
        """Returns where the old directory is moved by an overwrite in progress, or None."""
        journal = os.path.join(self.hidden, _JOURNAL)
        record = read_journal(self.storage, journal, "journal of an interrupted overwrite")
        is_named = record is not None and record.get("final") == os.path.basename(final)
        return self._replaced(final) if is_named else None

    def _is_mid_swap(self, final: str) -> bool:
        """Returns whether a step is hidden, between the two renames of its overwrite."""
        return self._is_there(self._replaced(final)) and not self._is_there(final)

    def _is_left(self, tmp: str) -> bool:
        """Returns whether a failed save's directory is needed to complete an overwrite."""
        is_needed = self._is_mid_swap(final_path(tmp))
        if is_needed:
            _log.warning("Leaving %s: the next save will complete the interrupted overwrite", tmp)
        return is_needed

    def _replaced(self, final: str) -> str:
        return os.path.join(self.hidden, "trash", f"{os.path.basename(final)}{_REPLACED}")


def to_note(token: str) -> bytes:
    """Returns the content of a note."""
    return json.dumps({"token": token}).encode()


@contextlib.contextmanager
def rollback(undo: Callable[[], object]) -> Generator[None]:
    """Reverts a rename if a later action fails: an unsynced step must not be visible.

    Otherwise the caller would remove `tmp` after the failure, which is the old step by then.
    """
    try:
        yield
    except Exception as error:
        try:
            undo()
        except errors.StorageError as failure:
            error.add_note(f"Undoing the rename failed too: {failure}")
        raise


@contextlib.contextmanager
def noting(failures: dict[str, errors.CheckpointError], name: str) -> Generator[None]:
    """Catches an error inside and appends it to the failures."""
    try:
        yield
    except errors.CheckpointError as error:
        failures[name] = error
