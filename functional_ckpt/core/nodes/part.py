"""The part record: which node wrote which files of a step. It is equal on all nodes. Pure."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from functional_ckpt.core.records import file_list, records
from functional_ckpt.core.records.file_list import FileRecord, digest_hex
from functional_ckpt.core.tree.plain_json import string

PART_FILE = "functional_ckpt.part.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeFiles:
    """The files that the ranks of one node wrote.

    Attributes:
        name: The node, as it was called in that run.
        directory: The id of its directory: see `steps.node_inventory`. Nodes may be renamed.
        ranks: Its ranks, ascending; the first one is its head.
        files: Its data files, by path relative to the step's directory.
    """

    name: str
    directory: str
    ranks: tuple[int, ...]
    files: Mapping[str, FileRecord]

    @property
    def digest(self) -> str:
        """The digest of the node's list of files, with their sizes and digests."""
        return digest_hex(json.dumps(file_list.listed(self.files)).encode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartRecord:
    """Which parts a step has.

    Attributes:
        commit_id: Unique for each save. Parts are combined by it alone.
        step: The step.
        generation: That of the run which saved it; raised at every start and restore of a writer.
        serial: The number of this save within its run. Orders two saves of one step and generation.
        nodes: The nodes, in the order of their first ranks.
    """

    commit_id: str
    step: int
    generation: int
    serial: int = 0
    nodes: tuple[NodeFiles, ...]

    @functools.cached_property
    def files(self) -> Mapping[str, FileRecord]:
        """The data files of all nodes."""
        every = {name: file for node in self.nodes for name, file in node.files.items()}
        return MappingProxyType(every)

    @functools.cached_property
    def _owners(self) -> Mapping[str, str]:
        return {name: node.name for node in self.nodes for name in node.files}

    @property
    def order(self) -> tuple[int, int, int, str]:
        """The key by which commits are sorted, the newest last: generation, step, serial, id."""
        return (self.generation, self.step, self.serial, self.commit_id)

    def owner(self, file: str) -> str:
        """Returns the name of the node that wrote a file; `KeyError` if none did."""
        return self._owners[file]

    def node_of(self, rank: int) -> NodeFiles:
        """Returns the node of a rank of the run that saved; `KeyError` if it had no such rank."""
        for node in self.nodes:
            if rank in node.ranks:
                return node
        raise KeyError(rank)

    def to_json(self) -> bytes:
        """Returns the sealed text of the part record."""
        nodes = [
            {
                "name": node.name,
                "directory": node.directory,
                "ranks": list(node.ranks),
                **file_list.to_json(node.files),
            }
            for node in self.nodes
        ]
        return records.sealed(
            {
                "commit_id": self.commit_id,
                "step": self.step,
                "generation": self.generation,
                "serial": self.serial,
                "nodes": nodes,
            }
        )


def parse(data: bytes, path: object) -> PartRecord:
    """Returns the part record of a file, or raises `CorruptCheckpointError`."""
    record = records.verify_checksum(data, path)
    with records.parsing(path):
        nodes = tuple(_node(node) for node in record["nodes"])
        names = [name for node in nodes for name in node.files]
        ranks = [rank for node in nodes for rank in node.ranks]
        if not nodes or len({node.name for node in nodes}) != len(nodes):
            raise ValueError(f"nodes {[node.name for node in nodes]!r:.200}")
        if len(set(names)) != len(names) or sorted(ranks) != list(range(len(ranks))):
            raise ValueError("a file or rank of two nodes, or of none")
        return PartRecord(
            commit_id=commit_id(record["commit_id"]),
            step=records.natural(record["step"]),
            generation=records.natural(record["generation"]),
            serial=records.natural(record["serial"]),
            nodes=nodes,
        )


def _node(record: Any) -> NodeFiles:
    ranks = tuple(records.natural(rank) for rank in record["ranks"])
    if not ranks or list(ranks) != sorted(set(ranks)):
        raise ValueError(f"ranks {ranks!r:.200} of a node")
    return NodeFiles(
        name=string(record["name"]),
        directory=string(record["directory"]),
        ranks=ranks,
        files=file_list.from_json(record),
    )


def commit_id(value: Any) -> str:
    """Returns a commit id, which is a part of file names; `ValueError` for anything else."""
    text = string(value)
    if not text or len(text) > 64 or not text.isascii() or not text.replace("-", "").isalnum():
        raise ValueError(f"{value!r:.100} is not a commit id")
    return text
