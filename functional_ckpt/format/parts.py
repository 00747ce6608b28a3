"""The parts of a step that was saved with `NodeLocal`: which of its files are in a directory."""

from __future__ import annotations

import dataclasses
import os

from functional_ckpt import errors
from functional_ckpt.core.nodes import part
from functional_ckpt.core.nodes.part import PART_FILE, PartRecord
from functional_ckpt.core.records import records
from functional_ckpt.core.tree.plain_json import string
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.commit_base import HIDDEN

DIRECTORY_FILE = "directory"
"""In the bookkeeping directory of a node's directory of steps: its id."""
REPLICATED_FILE = "replicated.json"
"""Beside it: the commit ids of the steps that were replicated when the head last noted them."""
ADVICE = (
    "Open it with fc.CheckpointManager(..., node_local=fc.NodeLocal()) on all of these nodes, or "
    "read the step from another tier that has it"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Missing:
    """The files of a step that are not in a directory, because other nodes wrote them.

    Attributes:
        record: The part record.
        nodes: Of the nodes in the record, the names of those whose files are missing.
        files: The missing files.
    """

    record: PartRecord
    nodes: tuple[str, ...]
    files: frozenset[str]

    @property
    def size_bytes(self) -> int:
        """The size of the missing files."""
        return sum(self.record.files[file].size_bytes for file in self.files)

    def __str__(self) -> str:
        nodes = self.record.nodes
        here = [str(k) for k, node in enumerate(nodes, 1) if node.name not in self.nodes]
        which = f"part {' and '.join(here)} of {len(nodes)} nodes" if here else "an incomplete part"
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return f"{which}: {count} of {', '.join(self.nodes)} not here"


def read_directory_id(storage: Storage, root: str) -> str:
    """Returns the id of a node's directory of steps; empty if it has none."""
    path = os.path.join(root, HIDDEN, DIRECTORY_FILE)
    data = queries.read_optional(storage, path)
    return "" if data is None else string(records.verify_checksum(data, path)["id"])


def read_replicated(storage: Storage, root: str) -> frozenset[str]:
    """Returns the commit ids of the steps in a node's directory that its run has replicated.

    Raises:
        CorruptCheckpointError: The file is damaged.
    """
    path = os.path.join(root, HIDDEN, REPLICATED_FILE)
    data = queries.read_optional(storage, path)
    if data is None:
        return frozenset()
    with records.parsing(path):
        return frozenset(map(part.commit_id, records.verify_checksum(data, path)["commits"]))


def read_part(storage: Storage, path: str) -> PartRecord | None:
    """Returns the part record of a step's directory; None if it has none.

    Raises:
        CorruptCheckpointError: It is damaged.
    """
    file = os.path.join(path, PART_FILE)
    data = queries.read_optional(storage, file)
    return None if data is None else part.parse(data, file)


def present_files(storage: Storage, path: str, record: PartRecord) -> frozenset[str]:
    """Returns the data files of a part that are in its directory in full size."""
    found = storage.walk(path)
    return frozenset(
        file
        for file, expected in record.files.items()
        if file in found
        and found[file].kind == "a file"
        and found[file].size_bytes == expected.size_bytes
    )


def missing(storage: Storage, path: str) -> Missing | None:
    """Returns the files that a part lacks; None for a complete one, and for any other directory.

    Object stores hold no parts: steps are published there as one.

    Raises:
        CorruptCheckpointError: The part record is damaged.
    """
    if storage.objects is not None or (record := read_part(storage, path)) is None:
        return None
    present = present_files(storage, path, record)
    absent = record.files.keys() - present
    nodes = tuple(node.name for node in record.nodes if not node.files.keys() <= present)
    return Missing(record, nodes, frozenset(absent)) if absent else None


def check_complete(storage: Storage, path: str, step: int | None = None) -> None:
    """Raises `StepNotFoundError` for a directory with a part of a step."""
    if (found := missing(storage, path)) is not None:
        raise incomplete(path, found, step)


def incomplete(path: str, found: Missing, step: int | None) -> errors.StepNotFoundError:
    """Returns the error for a part, which cannot be restored by itself."""
    return errors.StepNotFoundError(f"{path} is {found}. {ADVICE}.", path=path, step=step)
