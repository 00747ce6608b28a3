"""One step on its way to one tier: what is missing is sent, all is verified, then published.

An upload that was cut goes on where it was: files that arrived whole are not sent again.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.records import records
from functional_ckpt.runtime import progress_bars
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.steps.directory import Steps
from functional_ckpt.storage import commit, commit_marker
from functional_ckpt.storage.object_store import ObjectStorage

__all__ = ["Upload"]

_NUM_FILES = 4


class _Sent:
    """How much of a step has arrived, shown to whoever looks at the terminal.

    Args:
        show: Told of every change.
        done_bytes: What had arrived before.
        total_bytes: Of the whole step.
    """

    def __init__(self, show: progress_bars.Shown, done_bytes: int, total_bytes: int) -> None:
        self._show = show
        self._done_bytes, self._total_bytes = done_bytes, total_bytes
        self._mutex = threading.Lock()
        show(done_bytes, total_bytes)

    def add(self, num_bytes: int) -> None:
        """So many more have arrived."""
        with self._mutex:
            self._done_bytes += num_bytes
            self._show(self._done_bytes, self._total_bytes)


class Upload:
    """One step on its way to one tier."""

    def __init__(self, local: Steps, remote: Steps, source: str, final: str, step: int) -> None:
        self._local, self._remote = local.storage, remote.storage
        self._hidden, self._remote_root = remote.hidden, remote.root
        self._source, self._final, self._step = source, final, step
        self._tmp = commit.tmp_path(final)
        self._place = final if isinstance(remote.storage, ObjectStorage) else self._tmp
        self._note = commit_marker.intent(self._tmp)

    def run(self) -> int:
        """Uploads what is missing and publishes the step.

        Returns:
            How many bytes were sent.

        Raises:
            StorageError: A store refused, or could not be reached.
            CorruptCheckpointError: The step in the first tier is not what was committed.
        """
        identity = self._identity(self._local, self._source)
        if self._remote.is_committed(self._final):
            if self._identity(self._remote, self._final) == identity:
                self._remote.remove(self._tmp)  # the note, where only its removal was cut
                return 0
            commit.discard(self._remote, self._final, self._hidden)  # that of a step since replaced
        self._begin(identity)
        sizes = self._local.sizes(self._source)
        present = self._remote.sizes(self._place)
        missing = [name for name, size in sizes.items() if present.get(name) != size]
        expected = self._expected()
        num_bytes, total_bytes = sum(sizes[name] for name in missing), sum(sizes.values())
        with progress_bars.bar(f"step {self._step} to {self._remote_root}") as show:
            sent = _Sent(show, total_bytes - num_bytes, total_bytes)

            def send(name: str) -> None:
                self._send(name, expected.get(name))
                sent.add(sizes[name])

            run_in_threads([functools.partial(send, name) for name in missing], _NUM_FILES)
        self._check_arrived(sizes, identity)
        self._publish()
        return num_bytes

    def _identity(self, storage: Any, path: str) -> str:
        """What tells this commit of the step from any other: its record names every digest."""
        return records.digest_hex(storage.read(os.path.join(path, records.EXTENSION_FILE)))

    def _begin(self, identity: str) -> None:
        """Goes on with what was begun of this very commit; clears away anything else."""
        token = json.dumps({"token": identity}).encode()
        if self._remote.exists(self._note) and self._remote.read(self._note) == token:
            return
        if isinstance(self._remote, ObjectStorage):
            commit_marker.begin(self._remote, self._tmp, self._final)
        else:
            self._remote.remove(self._tmp)
            self._remote.make_directory(self._tmp)
        self._remote.write(self._note, token)

    def _expected(self) -> dict[str, records.FileRecord]:
        """What the step's records say of its files."""
        path = os.path.join(self._source, records.EXTENSION_FILE)
        record = records.parse_step(self._local.read(path), path)
        found = dict(record.files)
        for item, kind in record.items.items():
            if kind == "tree":
                path = os.path.join(self._source, item, records.EXTENSION_FILE)
                files = records.parse_item(self._local.read(path), path).files
                found |= {f"{item}/{name}": file for name, file in files.items()}
        return found

    def _send(self, name: str, expected: records.FileRecord | None) -> None:
        source = os.path.join(self._source, name)
        if expected is not None and self._local.checksum(source) != expected:
            raise errors.CorruptCheckpointError(
                f"{source} has changed since it was committed; it is not copied.",
                path=source,
                step=self._step,
            )
        self._remote.put_file(source, os.path.join(self._place, name))

    def _check_arrived(self, sizes: dict[str, int], identity: str) -> None:
        arrived = self._remote.sizes(self._place)
        wrong = [name for name, size in sizes.items() if arrived.get(name) != size]
        if wrong or self._identity(self._local, self._source) != identity:
            raise errors.StorageError(
                f"{self._final}: {len(wrong)} files did not arrive as they were sent, or the step "
                "was replaced meanwhile; it is sent again.",
                path=self._final,
            )

    def _publish(self) -> None:
        if not isinstance(self._remote, ObjectStorage):
            self._remote.remove(self._note)
            commit.sync_tree(self._remote, self._tmp, self._remote.walk(self._tmp))
        commit.publish(self._remote, self._place, self._final, self._hidden, overwrite=False)
