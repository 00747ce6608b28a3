"""Uploads one step to one tier: sends missing files, verifies all, then publishes it.

An interrupted upload resumes: complete files are not sent again. An object store copies the files
that it has already.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from functional_ckpt import errors
from functional_ckpt.core.records import records
from functional_ckpt.events import Tally
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.steps.step_files import files_of, record_digest
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.steps.upload_shares import NUM_FILES, Shares
from functional_ckpt.steps.upload_unchanged import Arrived, copy_unchanged
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Stat
from functional_ckpt.storage.commit_base import NOTE

_log = logging.getLogger("functional_ckpt")
# Data files of one save: with its token, or, in version 1, with a random name.
_UNIQUE_NAME = re.compile(r"-[0-9a-f]{12}\.[a-z]+$|(?:^|/)d/[0-9a-f]{32}$")


class NotHeldError(Exception):
    """No node can send a file of a step now."""


class Upload:
    """One step on its way to one tier.

    A commit that may be replaced stays until the new one is complete. Other nodes upload `shares`
    of it, if there are any. An object store copies the files that `last`, a step of the tier, has.

    Attributes:
        arrived: The step of which an object store may copy files into the next; None if unknown.
    """

    def __init__(
        self,
        local: TierSteps,
        remote: TierSteps,
        source: str,
        final: str,
        step: int,
        *,
        may_replace: bool,
        shares: Shares | None,
        last: Arrived | None = None,
    ) -> None:
        self.arrived = last
        self._last = last
        self._shares = shares
        self._tier = remote
        self._local, self._remote = local.storage, remote.storage
        self._local_commits, self._commits = local.commits, remote.commits
        self._source, self._final, self._step = source, final, step
        self._may_replace = may_replace
        self._events = local.events

    def run(self) -> int:
        """Uploads missing files and publishes the step.

        Returns:
            How many bytes were sent.

        Raises:
            StorageError: A store refused, or could not be reached.
            CorruptCheckpointError: The step in the first tier is damaged.
            NotHeldError: Each node has files of its own, and none that answers holds one of them.
            StepExistsError: The tier holds another commit of the step, and may not lose it.
        """
        self._commits.finish_overwrite()
        files, identity = files_of(self._local, self._source)
        if self._commits.is_committed(self._final):
            if record_digest(self._remote, self._final) == identity:
                self._commits.end_uploads(self._final)
                return 0
            self._check_replaceable()
        place = self._commits.begin_upload(self._final, identity)
        missing = self._without_copied(place, files, self._missing(place, files))
        total_bytes = sum(file.size_bytes for file in files.values())
        num_bytes = sum(files[name].size_bytes for name in missing)
        with self._events.bar(f"step {self._step} to {self._commits.root}") as show:
            sent = Tally(show, total_bytes - num_bytes, total_bytes)

            def send(name: str) -> None:
                self._send(name, files[name], place, identity)
                sent.add(files[name].size_bytes)

            self._send_all(place, {name: files[name] for name in missing}, send, sent)
        statuses = self._check_arrived(place, files, identity)
        self._tier.check_lock()
        self._commits.publish_upload(place, self._final, files, overwrite=self._may_replace)
        is_known = place == self._final and self._remote.objects is not None
        self.arrived = Arrived(self._final, files, statuses) if is_known else None
        return num_bytes

    def _without_copied(
        self, place: str, files: Mapping[str, records.FileRecord], missing: Sequence[str]
    ) -> list[str]:
        """Has the store copy known files; returns the files that are to be sent."""
        if self._last is None:
            return [*missing]
        lacking = {name: files[name] for name in missing}
        copied = frozenset(copy_unchanged(self._remote, self._last, place, lacking))
        return [name for name in missing if name not in copied]

    def _missing(self, place: str, files: Mapping[str, records.FileRecord]) -> list[str]:
        """Returns the files that an earlier attempt, or another node, has not sent."""
        present = queries.sizes(self._remote, place)
        return [
            name
            for name, file in files.items()
            if present.get(name) != file.size_bytes or not self._is_resumed(place, name, file)
        ]

    def _send_all(
        self,
        place: str,
        files: Mapping[str, records.FileRecord],
        send: Callable[[str], None],
        sent: Tally,
    ) -> None:
        """Sends files together with other nodes, and those that the others have not sent."""
        if self._shares is None:
            _send_from_here(send, files)
            return
        shares, left, failures = self._shares, files, list[str]()
        is_apart = shares.is_apart(self._step)
        senders = shares.senders(self._step, files)
        while left:
            with shares.dealt(self._source, place, left, senders) as dealt:
                own = dealt.get(0, ())
                _send_from_here(functools.partial(self._try, send) if is_apart else send, own)
                failures += shares.wait(sent.add)
            tried = {name: rank for rank, names in dealt.items() for name in names}
            senders = {name: _others(senders[name], tried.get(name)) for name in left}
            lacking = {n: file for n, file in left.items() if is_apart or tried.get(n) != 0}
            missing = self._missing(place, lacking) if lacking else ()
            left = {name: files[name] for name in missing}
            self._check_senders(left, senders, failures)

    def _is_resumed(self, place: str, name: str, file: records.FileRecord) -> bool:
        """Returns whether a file of the right size is the one of an earlier attempt.

        Where uploads of two commits share a path, it may be a late one of the other.
        """
        is_own = not self._commits.verifies_uploads or _UNIQUE_NAME.search(name)
        return bool(is_own) or self._remote.checksum(os.path.join(place, name)) == file

    def _check_replaceable(self) -> None:
        if not self._may_replace:
            raise errors.StepExistsError(
                f"{self._final} is another commit of step {self._step}, and this manager does not "
                "overwrite. Give this run its own tier, move that step away, or pass "
                "overwrite=True to CheckpointManager to replace it.",
                step=self._step,
                path=self._final,
            )

    def _send(self, name: str, expected: records.FileRecord, place: str, identity: str) -> None:
        source = os.path.join(self._source, name)
        if not queries.exists(self._local, source) or self._local.checksum(source) != expected:
            digest = record_digest(self._local, self._source)
            if digest != identity and (
                digest is not None or not self._local_commits.is_committed(self._source)
            ):
                raise errors.StorageError(
                    f"{self._source} was replaced or removed during the upload.", path=self._source
                )
            raise errors.CorruptCheckpointError(
                f"{source} changed after it was committed; upload aborted.",
                path=source,
                step=self._step,
            )
        self._remote.put_file(source, os.path.join(place, name))

    def _try(self, send: Callable[[str], None], name: str) -> None:
        """Sends a file if it is here, undamaged; else another node may have it."""
        try:
            send(name)
        except errors.CorruptCheckpointError as error:
            _log.warning("%s; looking for a copy on another node", error.message)

    def _check_senders(
        self,
        left: Mapping[str, records.FileRecord],
        senders: Mapping[str, Sequence[int]],
        failures: Sequence[str],
    ) -> None:
        """Raises if there are files that no other rank can send."""
        lost = [name for name in left if not senders[name]]
        if lost and failures:
            raise errors.StorageError(
                f"{self._final}: {len(lost)} files were not sent: {'; '.join(failures)}",
                path=self._final,
            )
        if lost:
            raise NotHeldError(
                f"no node that answers holds {lost[0]}"
                + (f" and {len(lost) - 1} more files" if len(lost) > 1 else "")
            )

    def _check_arrived(
        self, place: str, files: Mapping[str, records.FileRecord], identity: str
    ) -> Mapping[str, Stat]:
        """Compares the uploaded files with the records; wrong ones are removed and sent again.

        On an object store only sizes are compared: the store has verified the digests.
        """
        arrived = self._remote.walk(place)
        wrong = [
            name
            for name, file in files.items()
            if name not in arrived or arrived[name].size_bytes != file.size_bytes
        ]
        if not self._commits.verifies_uploads:
            wrong += [
                name
                for name, file in files.items()
                if name not in wrong and self._remote.checksum(os.path.join(place, name)) != file
            ]
        for name in (*wrong, *(name for name in arrived if name not in files and name != NOTE)):
            self._remote.remove(os.path.join(place, name))
        if wrong or files_of(self._local, self._source)[1] != identity:
            raise errors.StorageError(
                f"{self._final}: {len(wrong)} files have the wrong size or digest after upload, or "
                "the step was overwritten during it; retrying.",
                path=self._final,
            )
        return arrived


def _send_from_here(send: Callable[[str], None], names: Iterable[str]) -> None:
    run_in_threads([functools.partial(send, name) for name in names], NUM_FILES)


def _others(ranks: Sequence[int], tried: int | None) -> tuple[int, ...]:
    """Returns which ranks may send a file that one has not sent; the primary if it can.

    None of them if no share had the file: no rank that can send it answers.
    """
    if tried is None:
        return ()
    left = tuple(rank for rank in ranks if rank != tried)
    return (0,) if 0 in left else left
