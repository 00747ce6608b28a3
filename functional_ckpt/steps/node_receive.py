"""The receiving side of a copy between nodes: see `node_copy`.

A file arrives under another name, and is renamed once it is verified and durable. A node that has
nothing of the step gets its records too, and its part appears with one rename at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Generator, Sequence

import numpy as np
import xxhash

from functional_ckpt import errors
from functional_ckpt.core.nodes.part import PART_FILE
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.distributed.coordinator import Link, Transfer
from functional_ckpt.distributed.peer_link import receive_message, receive_stream, send_message
from functional_ckpt.steps import node_inventory
from functional_ckpt.steps.node_copy import (
    ANSWERS_TAG,
    DATA_TAG,
    HERE,
    INCOMING,
    NUM_AHEAD,
    CopiedStep,
    Outcome,
)
from functional_ckpt.steps.upload_step import files_of
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import NewFile, Stat, Storage
from functional_ckpt.storage.durable import makedirs_durable, sync_tree

_ENDING = ".part"

FindFile = Callable[[FileRecord], "tuple[str, Stat] | None"]
"""Returns a file with this content in another step of this node, if there is one."""
Renaming = contextlib.AbstractContextManager[object]


def receive(
    link: Link,
    rank: int,
    copied: CopiedStep,
    names: Sequence[str],
    find: FindFile,
    renaming: Renaming,
) -> Outcome:
    """Receives files, and puts them beside those that this node has of the step.

    Args:
        link: The link.
        rank: The sender, which calls `send`.
        copied: The step.
        names: The files that this node should hold.
        find: Finds files that another step of this node has.
        renaming: Held while a file gets its name in a part.
    """
    receiver = _Receiver(copied, renaming)
    try:
        receiver.run(link, rank, names, find)
    except (errors.StorageError, errors.CorruptCheckpointError) as error:
        receiver.outcome.fail(error)
    except Exception as error:  # noqa: BLE001 - reported; the sides may be out of step
        receiver.outcome.fail(error)
        receiver.outcome.is_lost = True
    return receiver.outcome


class _Receiver:
    """The receiving side of a copy."""

    def __init__(self, copied: CopiedStep, renaming: Renaming) -> None:
        self.outcome = Outcome()
        self._copied = copied
        self._storage = copied.storage
        self._renaming = renaming
        self._has_part = False
        self._identity: object = None
        self._target = copied.path

    def run(self, link: Link, rank: int, names: Sequence[str], find: FindFile) -> None:
        request: dict[str, object] = {"needs_records": False, "files": []}
        wanted: list[str] = []
        try:
            self._begin()
            wanted = self._lacking(names, find)
            request = {"needs_records": not self._has_part, "files": wanted}
        finally:
            send_message(link, rank, json.dumps(request).encode(), tag=ANSWERS_TAG)
        reply = receive_message(link, rank, tag=DATA_TAG)
        if not reply:
            raise errors.StorageError(
                f"The other node has no part of {self._copied.name} any more, or cannot read it.",
                path=self._copied.path,
            )
        goes_on = self._has_part or self._take_records(reply.removeprefix(HERE))
        answers: list[Transfer] = []
        num_taken, num_allowed = 0, min(NUM_AHEAD, len(wanted))
        while num_taken < num_allowed:
            name = wanted[num_taken]
            goes_on = self._take_file(link, rank, name) if goes_on else self._drop(link, rank, name)
            # Not waited for: the sender first sends the next file.
            answers.append(link.send(rank, np.array([goes_on], np.uint8), ANSWERS_TAG))
            num_taken += 1
            if goes_on:
                num_allowed = min(num_taken + NUM_AHEAD, len(wanted))
        for answer in answers:
            answer.wait()
        if self._has_part or goes_on:
            self._finish()

    def _begin(self) -> None:
        self._has_part = self._copied.is_here()
        makedirs_durable(self._storage, self._copied.incoming)
        if self._has_part:
            found = self._storage.stat(self._copied.path)
            self._identity = None if found is None else found.identity
        else:
            self._target = os.path.join(self._copied.incoming, "step")
            self._storage.make_directory(self._target)

    def _lacking(self, names: Sequence[str], find: FindFile) -> list[str]:
        """Returns the files that must be sent; links those that another step has."""
        sizes = queries.sizes(self._storage, self._target)
        files = self._copied.record.files
        lacking: list[str] = []
        for name in names:
            if sizes.get(name) == files[name].size_bytes:
                self.outcome.files.add(name)
            elif (found := find(files[name])) is None or not self._link(name, *found):
                lacking.append(name)
        return lacking

    def _link(self, name: str, source: str, status: Stat) -> bool:
        path = self._temporary(name)
        self._storage.remove(path)
        if not self._storage.share(path, source, status):
            return False
        self._put(path, name)
        self.outcome.linked_bytes += self._copied.record.files[name].size_bytes
        return True

    def _temporary(self, name: str) -> str:
        return os.path.join(self._copied.incoming, name.replace("/", "%") + _ENDING)

    def _take_file(self, link: Link, rank: int, name: str) -> bool:
        """Receives a file; returns whether the sender is to send more."""
        path, file = self._temporary(name), self._copied.record.files[name]
        new = _Arriving(self._storage, path, file)
        try:
            receive_stream(link, rank, file.size_bytes, new.take, tag=DATA_TAG)
            self.outcome.num_bytes += file.size_bytes
            if (failure := new.close()) is None:
                self._put(path, name)
        except errors.CoordinationError:
            new.close()
            raise
        except errors.StorageError as error:
            failure = error
        if failure is not None:
            self.outcome.fail(failure)
            with contextlib.suppress(errors.CheckpointError):
                self._storage.remove(path)
        # A damaged file says nothing of the next ones; a full disk does.
        return failure is None or isinstance(failure, errors.CorruptCheckpointError)

    def _drop(self, link: Link, rank: int, name: str) -> bool:
        """Receives a file that was sent before the sender knew that it stops; returns False."""
        size_bytes = self._copied.record.files[name].size_bytes
        receive_stream(link, rank, size_bytes, lambda piece, offset: None, tag=DATA_TAG)
        return False

    def _put(self, path: str, name: str) -> None:
        """Gives a verified, durable file its name, unless another commit has this path."""
        target = os.path.join(self._target, name)
        with self._renaming:
            if self._has_part:
                found = self._storage.stat(self._copied.path)
                if found is None or found.identity != self._identity:
                    raise errors.StorageError(
                        f"{self._copied.path} was replaced or removed while it was copied.",
                        path=self._copied.path,
                    )
            self._storage.make_directory(os.path.dirname(target))
            self._storage.rename(path, target)
        self.outcome.files.add(name)

    def _take_records(self, data: bytes) -> bool:
        """Writes all files of the step but its data files; returns whether that worked."""
        try:
            for name, content in _unpacked_records(data).items():
                path = os.path.join(self._target, name)
                self._storage.make_directory(os.path.dirname(path))
                self._storage.write(path, content)
        except errors.CheckpointError as error:
            self.outcome.fail(error)
            return False
        return True

    def _finish(self) -> None:
        """Makes the names of all files durable; publishes a part that was not here."""
        files = sorted(self.outcome.files)
        if self._has_part:
            for folder in {os.path.dirname(name) for name in files}:
                self._storage.sync(os.path.join(self._target, folder))
            self._storage.sync(self._target)
        else:
            self._check_records()
            sync_tree(self._storage, self._target, self._storage.walk(self._target))
            with self._renaming:
                if queries.exists(self._storage, self._copied.path):
                    self._join()
                else:
                    self._storage.rename(self._target, self._copied.path)
            self._storage.sync(self._copied.root)
        self._storage.remove(self._copied.incoming)

    def _join(self) -> None:
        """Moves the files into a part that has appeared: a restore has put the records there."""
        copied = self._copied
        if not copied.is_here():
            raise errors.StorageError(
                f"{copied.path} is another commit; the copy of {copied.name} is not put there.",
                path=copied.path,
            )
        folders = {copied.path}
        for name in sorted(self.outcome.files):
            path = os.path.join(copied.path, name)
            folders.add(os.path.dirname(path))
            self._storage.make_directory(os.path.dirname(path))
            self._storage.rename(os.path.join(self._target, name), path)
        for folder in sorted(folders, reverse=True):
            self._storage.sync(folder)

    def _check_records(self) -> None:
        """Raises unless the records are those of this commit, undamaged."""
        part = node_inventory.read_part(self._storage, self._target)
        if part is None or part.to_json() != self._copied.record.to_json():
            raise errors.CorruptCheckpointError(
                f"{os.path.join(self._target, PART_FILE)} is not the part record of "
                f"{self._copied.path}.",
                path=self._target,
            )
        for name, file in files_of(self._storage, self._target)[0].items():
            path = os.path.join(self._target, name)
            if name not in part.files and self._storage.checksum(path) != file:
                raise errors.CorruptCheckpointError(f"{path} was damaged.", path=path)


class _Arriving:
    """A file that is written and hashed piece by piece; after an error, pieces are dropped."""

    def __init__(self, storage: Storage, path: str, file: FileRecord) -> None:
        self._storage = storage
        self._path = path
        self._file = file
        self._digest = xxhash.xxh3_64()
        self._failure: errors.CheckpointError | None = None
        self._new: NewFile | None = None
        with self._noting():
            storage.remove(path)
            self._new = storage.create(path, file.size_bytes, is_direct=False)

    @contextlib.contextmanager
    def _noting(self) -> Generator[None]:
        try:
            yield
        except errors.CheckpointError as error:
            self._failure = self._failure or error

    def take(self, piece: memoryview, offset: int) -> None:
        """Writes and hashes a piece."""
        if self._failure is not None or self._new is None:
            return
        self._digest.update(piece)
        with self._noting():
            self._new.write([piece], offset)

    def close(self) -> errors.CheckpointError | None:
        """Makes the file durable; returns why it cannot be used, or None."""
        with self._noting():
            if self._new is not None:
                if self._failure is None:
                    self._new.finish(self._file.size_bytes)
                self._new.close()
        if self._failure is None and self._digest.hexdigest() != self._file.xxh3:
            self._failure = errors.CorruptCheckpointError(
                f"{self._path} has not the digest of its file: it was damaged on the other node, "
                "or in transit.",
                path=self._path,
            )
        with self._noting():
            if self._failure is None:
                self._storage.sync(self._path)
        return self._failure


def clear_incoming(storage: Storage, root: str, keep: Collection[str]) -> None:
    """Removes the files in transit of all commits but some."""
    folder = os.path.join(root, INCOMING)
    for name in storage.list(folder):
        if name not in keep:
            storage.remove(os.path.join(folder, name))


def _unpacked_records(data: bytes) -> dict[str, bytes]:
    offset = 8 + int.from_bytes(data[:8])
    found: dict[str, bytes] = {}
    for name, size in json.loads(data[8:offset]):
        if os.path.isabs(name) or ".." in name.split("/"):
            raise errors.CorruptCheckpointError(f"{name!r} is not a path inside a step.")
        found[name] = data[offset : offset + size]
        offset += size
    return found
