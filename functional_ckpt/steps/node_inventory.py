"""The inventory of one node: its parts and votes, its generation, and the commits it removes.

    <root>/<step>/functional_ckpt.part.json                       a renamed part
    <root>/<step>.orbax-checkpoint-tmp-*/functional_ckpt.part.json   a vote
    <root>/.functional_ckpt/aside/<step>.<commit id>/             a part that made way for another
    <root>/.functional_ckpt/directory                             the id of this directory
    <root>/.functional_ckpt/generation                            the highest generation known here
    <root>/.functional_ckpt/retired.json                          commits whose parts are removed

Steps without a part record are not in the inventory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import uuid
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.nodes import part as part_lib
from functional_ckpt.core.nodes.rules import HeldPart
from functional_ckpt.core.records import records
from functional_ckpt.core.tree.plain_json import integer, string
from functional_ckpt.format.parts import (
    DIRECTORY_FILE,
    REPLICATED_FILE,
    present_files,
    read_directory_id,
    read_part,
)
from functional_ckpt.steps.names import NameFormat
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.base import Storage

ASIDE = os.path.join(commit.HIDDEN, "aside")
_GENERATION = "generation"
_RETIRED = "retired.json"
_MAX_RETIRED = 1000
_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The inventory of one node, as the nodes exchange it.

    Attributes:
        directory: The id of its directory; empty if it has none yet.
        parts: Its parts and votes.
        generation: The highest generation that the node knows.
        retired: Commit ids of which it has removed its part, or was about to.
    """

    directory: str = ""
    parts: tuple[HeldPart, ...] = ()
    generation: int = 0
    retired: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Returns the inventory as a message."""
        message = {
            "directory": self.directory,
            "parts": [_part_to_json(part) for part in self.parts],
            "generation": self.generation,
            "retired": list(self.retired),
        }
        return zlib.compress(json.dumps(message).encode(), 1)


def from_bytes(data: bytes, node: str) -> Inventory:
    """Returns the inventory that a node sent; `CorruptCheckpointError` for anything else."""
    path = f"<the inventory of node {node}>"
    with records.parsing(path):
        message = json.loads(zlib.decompress(data))
        return Inventory(
            directory=string(message["directory"]),
            parts=tuple(_part_from_json(part, path) for part in message["parts"]),
            generation=integer(message["generation"]),
            retired=tuple(string(each) for each in message["retired"]),
        )


def take(storage: Storage, root: str, names: NameFormat) -> Inventory:
    """Returns the inventory of a node's directory."""
    return Inventory(
        directory=read_directory_id(storage, root),
        parts=inventory(storage, root, names),
        generation=read_generation(storage, root),
        retired=read_retired(storage, root),
    )


def inventory(storage: Storage, root: str, names: NameFormat) -> tuple[HeldPart, ...]:
    """Returns the parts and votes in a node's directory, and the parts that are aside.

    A part record that is damaged is logged, and its directory is left out: it must not be removed.
    """
    places = [(name, name) for name in storage.list(root)]
    places += [
        (os.path.join(ASIDE, name), name) for name in storage.list(os.path.join(root, ASIDE))
    ]
    found: dict[str, HeldPart] = {}

    def look_at(path: str, name: str) -> None:
        final = commit.final_path(name.rpartition(".")[0] if path != name else name)
        if names.parse(final) is None:
            return
        try:
            record = read_part(storage, os.path.join(root, path))
        except errors.CorruptCheckpointError as error:
            _log.warning("%s; the part is not used, and stays", error.message)
            return
        if record is not None:
            found[path] = HeldPart(
                name=final,
                path=path,
                record=record,
                is_renamed=final == name or path != name,
                is_aside=path != name,
                files=present_files(storage, os.path.join(root, path), record),
            )

    queries.run_requests(storage, [functools.partial(look_at, *each) for each in places])
    return tuple(found[path] for path in sorted(found))


def aside_path(name: str, commit_id: str) -> str:
    """Returns where a part goes that makes way for another one, relative to the node's root."""
    return os.path.join(ASIDE, f"{name}.{commit_id}")


# ------------------------------------------------------------------------------------ bookkeeping


def make_directory_id(storage: Storage, root: str) -> str:
    """Returns the id of a node's directory, made at the first start; durable when it returns.

    It is how the nodes know whether a directory is here that may have renamed a part: nodes may
    have other names in another run, or an empty disk under the same name.
    """
    if not (known := read_directory_id(storage, root)):
        known = uuid.uuid4().hex
        _replace(storage, root, DIRECTORY_FILE, {"id": known})
    return known


def read_generation(storage: Storage, root: str) -> int:
    """Returns the highest generation that was written here; 0 if none was."""
    record = _read(storage, root, _GENERATION)
    return 0 if record is None else records.natural(record["generation"])


def write_generation(storage: Storage, root: str, generation: int) -> None:
    """Writes the generation of the following saves; durable when it returns."""
    _replace(storage, root, _GENERATION, {"generation": generation})


def read_retired(storage: Storage, root: str) -> tuple[str, ...]:
    """Returns the commits whose parts this node has removed, or was about to remove."""
    record = _read(storage, root, _RETIRED)
    return () if record is None else tuple(map(part_lib.commit_id, record["retired"]))


def retire(storage: Storage, root: str, commit_ids: Iterable[str]) -> None:
    """Notes commits whose parts will be removed next; durable when it returns.

    If the removal is interrupted on one node, every node completes it at the next start.
    """
    known = read_retired(storage, root)
    new = tuple(each for each in dict.fromkeys(commit_ids) if each not in known)
    if new:
        _replace(storage, root, _RETIRED, {"retired": (known + new)[-_MAX_RETIRED:]})


def write_replicated(storage: Storage, root: str, commit_ids: Iterable[str]) -> None:
    """Notes which commits are replicated: commands show it, and no decision depends on it."""
    _replace(storage, root, REPLICATED_FILE, {"commits": sorted(commit_ids)})


def _read(storage: Storage, root: str, name: str) -> dict[str, Any] | None:
    path = os.path.join(root, commit.HIDDEN, name)
    data = queries.read_optional(storage, path)
    return None if data is None else records.verify_checksum(data, path)


def _replace(storage: Storage, root: str, name: str, record: dict[str, Any]) -> None:
    commits = commit.protocol(storage, root)
    storage.make_directory(commits.hidden)
    commits.replace(os.path.join(commits.hidden, name), records.sealed(record))


# ---------------------------------------------------------------------------------------- messages


def _part_to_json(part: HeldPart) -> dict[str, Any]:
    whole = [node.name for node in part.record.nodes if node.files.keys() <= part.files]
    rest = part.files.difference(*(node.files for node in part.record.nodes if node.name in whole))
    return {
        "name": part.name,
        "path": part.path,
        "record": part.record.to_json().decode(),
        "is_renamed": part.is_renamed,
        "is_aside": part.is_aside,
        "nodes": whole,
        "files": sorted(rest),
    }


def _part_from_json(message: dict[str, Any], path: str) -> HeldPart:
    record = part_lib.parse(string(message["record"]).encode(), path)
    whole: Sequence[str] = message["nodes"]
    files = {file for node in record.nodes if node.name in whole for file in node.files}
    return HeldPart(
        name=string(message["name"]),
        path=string(message["path"]),
        record=record,
        is_renamed=message["is_renamed"] is True,
        is_aside=message["is_aside"] is True,
        files=frozenset(files.union(message["files"])),
    )
