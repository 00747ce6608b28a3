"""Who reads which chunk where files are on nodes: a rank of a node that holds the chunk's file.

Sources are numbers: the nodes from 0 on, then the remote tiers, which every rank can read. A part
comes from its rank's own node if that holds the file, else from the holder with the least to read,
else from the next tier. Pure: every rank computes the same plan from the same lists.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from functional_ckpt.core.arrays.share_plan import (
    Budget,
    Region,
    Share,
    StoredArray,
    is_read_twice,
    wanted_chunks,
)


class Chunk(NamedTuple):
    """A chunk: its array, and its index there."""

    array: str
    at: tuple[int, ...]


class Copy(NamedTuple):
    """A chunk as one source has it."""

    chunk: Chunk
    source: int


class Part(NamedTuple):
    """The part of a chunk that a rank wants: the rank, the number of its want, and the index."""

    rank: int
    want: int
    at: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holders:
    """Where each chunk can be read.

    Attributes:
        node_of: The node of each rank.
        files: Array -> position of a chunk -> its file. Chunks without a file are in the index, and
            so on every node.
        nodes_of: File -> the nodes that hold it.
        num_nodes: The number of nodes.
        num_tiers: The number of remote tiers; they hold all files.
    """

    node_of: Sequence[int]
    files: Mapping[str, Mapping[int, str]]
    nodes_of: Mapping[str, Collection[int]]
    num_nodes: int
    num_tiers: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeChunk:
    """A chunk that one rank reads for itself and others.

    Attributes:
        chunk: The chunk.
        source: Where it is read: a node, which is the reader's, or a tier.
        reader: The rank that reads it.
        parts: The parts that ranks get.
    """

    chunk: Chunk
    source: int
    reader: int
    parts: tuple[Share, ...]

    @property
    def copy(self) -> Copy:
        """The copy that is read."""
        return Copy(self.chunk, self.source)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """The reads of each rank.

    Attributes:
        alone: The parts that ranks read from their own nodes for themselves, with their sizes in
            bytes.
        rounds: The chunks that are read for several ranks, or for a rank of another node.
        lost: The chunks that no source has.
    """

    alone: Mapping[Part, tuple[Chunk, int]]
    rounds: Sequence[Sequence[NodeChunk]]
    lost: Sequence[Chunk]


def plan_node_reads(
    arrays: Mapping[str, StoredArray],
    wants: Sequence[Sequence[Region]],
    holders: Holders,
    *,
    round_bytes: int,
    done: Collection[Part] = (),
    damaged: Collection[Copy] = (),
    shares: bool = True,
) -> NodePlan:
    """Returns who reads each part that is wanted.

    Args:
        arrays: Every array that is wanted.
        wants: The regions, in order of rank.
        holders: Where chunks can be read.
        round_bytes: How much a rank reads, and how much it gets, in one round at most; a single
            chunk may be more.
        done: The parts that need not be read any more.
        damaged: The copies that cannot be read.
        shares: Whether ranks of one node read a chunk once if they would read it twice.
    """
    ranks_of: dict[int, list[int]] = collections.defaultdict(list)
    for rank, node in enumerate(holders.node_of):
        ranks_of[node].append(rank)
    loads = [0] * len(wants)
    alone: dict[Part, tuple[Chunk, int]] = {}
    rounds: list[list[NodeChunk]] = []
    lost: list[Chunk] = []
    budget = Budget(len(wants), round_bytes)
    for name, index, every_part in wanted_chunks(arrays, wants):
        parts = [each for each in every_part if Part(each.rank, each.want, index) not in done]
        array, chunk = arrays[name], Chunk(name, index)
        itemsize = array.spec.itemsize_bytes
        size_bytes = array.grid.box(index).num_elements * itemsize
        for source, group in _by_source(chunk, array, parts, holders, damaged, loads).items():
            if source is None:
                lost.append(chunk)
                continue
            is_own = all(holders.node_of[part.rank] == source for part in group)
            if is_own and not (shares and is_read_twice(array, index, group)):
                for part in group:
                    num_bytes = part.box.num_elements * itemsize
                    alone[Part(part.rank, part.want, index)] = (chunk, num_bytes)
                    loads[part.rank] += num_bytes
                continue
            readers = ranks_of.get(source) or [part.rank for part in group]
            reader = min(readers, key=lambda rank: (loads[rank], rank))
            loads[reader] += size_bytes
            got = [(part.rank, part.box.num_elements * itemsize) for part in group]
            if budget.must_close(reader, size_bytes, got) or not rounds:
                rounds.append([])
            rounds[-1].append(
                NodeChunk(chunk=chunk, source=source, reader=reader, parts=tuple(group))
            )
    return NodePlan(alone=alone, rounds=rounds, lost=lost)


def _by_source(
    chunk: Chunk,
    array: StoredArray,
    parts: Sequence[Share],
    holders: Holders,
    damaged: Collection[Copy],
    loads: Sequence[int],
) -> dict[int | None, list[Share]]:
    """Returns the parts by the source that they come from; None for parts that no source has."""
    file = holders.files.get(chunk.array, {}).get(array.grid.position(chunk.at))
    present = set(holders.node_of)
    held = present if file is None else present & set(holders.nodes_of.get(file, ()))
    nodes = {node for node in held if Copy(chunk, node) not in damaged}
    groups: dict[int | None, list[Share]] = {}
    other: int | None = None
    for part in parts:
        source: int | None = holders.node_of[part.rank]
        if source not in nodes:
            if other is None:
                other = _elsewhere(chunk, nodes, holders, damaged, loads)
            source = other
        groups.setdefault(source, []).append(part)
    return groups


def _elsewhere(
    chunk: Chunk,
    nodes: Collection[int],
    holders: Holders,
    damaged: Collection[Copy],
    loads: Sequence[int],
) -> int | None:
    """Returns the node with the least to read, else the next tier."""
    if nodes:
        least = {
            node: min(loads[rank] for rank, of in enumerate(holders.node_of) if of == node)
            for node in nodes
        }
        return min(nodes, key=lambda node: (least[node], node))
    for number in range(holders.num_tiers):
        tier = holders.num_nodes + number
        if Copy(chunk, tier) not in damaged:
            return tier
    return None
