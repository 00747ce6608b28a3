"""Uploads one step to one tier: sends missing files, verifies all, then publishes it.

An interrupted upload resumes: complete files are not sent again.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping

from functional_ckpt import errors
from functional_ckpt.core.records import records
from functional_ckpt.events import Tally
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.steps.upload_shares import NUM_FILES, Shares
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.commit_base import NOTE

# Data files of one save: with its token, or, in version 1, with a random name.
_UNIQUE_NAME = re.compile(r"-[0-9a-f]{12}\.[a-z]+$|(?:^|/)d/[0-9a-f]{32}$")


class Upload:
    """One step on its way to one tier.

    A commit that may be replaced stays until the new one is complete. Other nodes upload `shares`
    of it, if there are any.
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
    ) -> None:
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
            StepExistsError: The tier holds another commit of the step, and may not lose it.
        """
        self._commits.finish_overwrite()
        files, identity = files_of(self._local, self._source)
        if self._commits.is_committed(self._final):
            if _record_digest(self._remote, self._final) == identity:
                self._commits.end_uploads(self._final)
                return 0
            self._check_replaceable()
        place = self._commits.begin_upload(self._final, identity)
        missing = self._missing(place, files)
        total_bytes = sum(file.size_bytes for file in files.values())
        num_bytes = sum(files[name].size_bytes for name in missing)
        with self._events.bar(f"step {self._step} to {self._commits.root}") as show:
            sent = Tally(show, total_bytes - num_bytes, total_bytes)

            def send(name: str) -> None:
                self._send(name, files[name], place, identity)
                sent.add(files[name].size_bytes)

            self._send_all(place, {name: files[name] for name in missing}, send, sent)
        self._check_arrived(place, files, identity)
        self._tier.check_lock()
        self._commits.publish_upload(place, self._final, files, overwrite=self._may_replace)
        return num_bytes

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

        def send_from_here(names: Iterable[str]) -> None:
            run_in_threads([functools.partial(send, name) for name in names], NUM_FILES)

        if self._shares is None:
            send_from_here(files)
            return
        with self._shares.dealt(self._source, place, files) as own:
            send_from_here(own)
            self._shares.wait(sent.add)
        if dealt := {name: file for name, file in files.items() if name not in own}:
            send_from_here(self._missing(place, dealt))

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
            digest = _record_digest(self._local, self._source)
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

    def _check_arrived(
        self, place: str, files: Mapping[str, records.FileRecord], identity: str
    ) -> None:
        """Compares the uploaded files with the records; wrong ones are removed and sent again.

        On an object store only sizes are compared: the store has verified the digests.
        """
        arrived = queries.sizes(self._remote, place)
        wrong = [name for name, file in files.items() if arrived.get(name) != file.size_bytes]
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


def files_of(storage: Storage, path: str) -> tuple[dict[str, records.FileRecord], str]:
    """Returns a checkpoint's files by its own records, and the identity of its commit.

    A listing is not sufficient: a missed file would be missing in the copy. Files without a
    record, such as those of a foreign step, are described from their content.
    """
    file = os.path.join(path, records.EXTENSION_FILE)
    found: dict[str, records.FileRecord] = {}
    data = queries.read_optional(storage, file)
    identity = None
    if data is not None:
        identity = records.digest_hex(data)
        found = {records.EXTENSION_FILE: records.FileRecord(len(data), identity)}
        record = records.parse_step(data, file)
        found |= record.files
        for item, kind in record.items.items():
            if kind == "tree":
                file = os.path.join(path, item, records.EXTENSION_FILE)
                files = records.parse_item(storage.read(file), file).files
                found |= {f"{item}/{name}": file for name, file in files.items()}
    for name in storage.walk(path):
        file = os.path.join(path, name)
        if name not in found and queries.kind(storage, file) == "a file":
            found[name] = storage.checksum(file)
    return found, identity or _digest_of(found)


def _record_digest(storage: Storage, path: str) -> str | None:
    """Returns the identity of a commit: its record, which has every digest; None without one."""
    data = queries.read_optional(storage, os.path.join(path, records.EXTENSION_FILE))
    return None if data is None else records.digest_hex(data)


def _digest_of(files: Mapping[str, records.FileRecord]) -> str:
    listed = sorted((name, file.size_bytes, file.xxh3) for name, file in files.items())
    return records.digest_hex(json.dumps(listed).encode())
