"""One node sends files of a step to another, which compares them with their digests.

The receiver lists the files that it lacks, and then answers after each file whether it takes more.
The sender waits for the answer to the last file but one. So both know which files are sent, also
after errors.

A file arrives under another name, and is renamed once it is verified and durable. A receiver that
has nothing of the step gets its records too, and the part appears with one rename at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable

import numpy as np

from functional_ckpt import errors
from functional_ckpt.core.nodes.part import PartRecord
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.distributed.coordinator import Link
from functional_ckpt.distributed.peer_link import (
    receive_message,
    send_message,
    send_stream,
)
from functional_ckpt.steps import node_inventory
from functional_ckpt.storage import commit
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local_files import read_into

INCOMING = os.path.join(commit.HIDDEN, "incoming")
DATA_TAG, ANSWERS_TAG = 0, 1
HERE = b"here"
NUM_AHEAD = 2
"""How many files are sent before the answer to the first of them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CopiedStep:
    """A step on this node.

    Attributes:
        storage: The store.
        root: The node's directory.
        name: The name of the step's directory.
        record: Its part record.
    """

    storage: Storage
    root: str
    name: str
    record: PartRecord

    @property
    def path(self) -> str:
        """The step's directory."""
        return os.path.join(self.root, self.name)

    @property
    def incoming(self) -> str:
        """The directory of its files in transit."""
        return os.path.join(self.root, INCOMING, self.record.commit_id)

    def is_here(self) -> bool:
        """Returns whether this node has a part of this commit."""
        found = node_inventory.read_part(self.storage, self.path)
        return found is not None and found.commit_id == self.record.commit_id


@dataclasses.dataclass(slots=True)
class Outcome:
    """How a copy went, on one of its sides.

    Attributes:
        files: The files that the receiver holds now, verified and durable.
        num_bytes: The bytes that were sent over the network.
        linked_bytes: The bytes of files that another step had, so that they were linked.
        error: Why files are missing; empty if none are.
        is_lost: Whether the other side is gone.
    """

    files: set[str] = dataclasses.field(default_factory=set[str])
    num_bytes: int = 0
    linked_bytes: int = 0
    error: str = ""
    is_lost: bool = False

    def fail(self, error: BaseException) -> None:
        """Notes the first error."""
        self.error = self.error or f"{type(error).__name__}: {error}"
        self.is_lost |= isinstance(error, errors.CoordinationError)


def send(link: Link, rank: int, copied: CopiedStep, before: Callable[[int], None]) -> Outcome:
    """Sends the files that a node asks for.

    Args:
        link: The link.
        rank: The receiver, which calls `receive`.
        copied: The step.
        before: Called with the size of each piece before it is sent; may wait.
    """
    outcome = Outcome()
    try:
        _send(link, rank, copied, before, outcome)
    except errors.StorageError as error:
        outcome.fail(error)
    except Exception as error:  # noqa: BLE001 - reported; the sides may be out of step
        outcome.fail(error)
        outcome.is_lost = True
    return outcome


def _send(
    link: Link, rank: int, copied: CopiedStep, before: Callable[[int], None], outcome: Outcome
) -> None:
    request = json.loads(receive_message(link, rank, tag=ANSWERS_TAG))
    reply = b""
    try:
        if not copied.is_here():
            raise errors.StorageError(f"{copied.path} was replaced or removed.", path=copied.path)
        reply = HERE + (_packed_records(copied) if request["needs_records"] else b"")
    finally:
        send_message(link, rank, reply, tag=DATA_TAG)
    names: list[str] = request["files"]
    num_sent = num_answers = 0
    for name in names:
        if num_sent - num_answers >= NUM_AHEAD:
            num_answers += 1
            if not _is_more_wanted(link, rank):
                break
        file = copied.record.files[name]
        _send_file(link, rank, os.path.join(copied.path, name), file, before, outcome)
        outcome.num_bytes += file.size_bytes
        num_sent += 1
    for _ in range(num_sent - num_answers):
        _is_more_wanted(link, rank)


def _is_more_wanted(link: Link, rank: int) -> bool:
    answer = np.zeros(1, np.uint8)
    link.receive(rank, answer, ANSWERS_TAG).wait()
    return bool(answer[0])


def _send_file(
    link: Link,
    rank: int,
    path: str,
    file: FileRecord,
    before: Callable[[int], None],
    outcome: Outcome,
) -> None:
    def fill(piece: memoryview, offset: int) -> None:
        try:
            count = read_into(path, piece, offset)
        except errors.CheckpointError as error:  # the receiver finds that its digest is wrong
            outcome.fail(error)
            count = 0
        piece[count:] = bytes(len(piece) - count)

    send_stream(link, rank, file.size_bytes, fill, tag=DATA_TAG, before=before)


def _packed_records(copied: CopiedStep) -> bytes:
    """Returns all files of a step but its data files: a list, and then their bytes."""
    storage, path = copied.storage, copied.path
    names = [name for name in storage.walk(path) if name not in copied.record.files]
    contents = [storage.read(os.path.join(path, name)) for name in names]
    listed = json.dumps([[n, len(data)] for n, data in zip(names, contents, strict=True)]).encode()
    return b"".join([len(listed).to_bytes(8), listed, *contents])
