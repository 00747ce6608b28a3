"""One global structure out of what the ranks hold: pipeline stages, per-rank values, replicas. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from functional_ckpt import errors
from functional_ckpt.core import structure, walk
from functional_ckpt.core.placement import Sharding
from functional_ckpt.core.structure import BranchNode, Key, KeyPath, Node, ValueNode

__all__ = ["for_rank", "rank_key", "unite", "unite_shardings"]

_MAPPINGS = ("dict", "ordered_dict", "default_dict", "counter")
Parts: TypeAlias = "Sequence[tuple[int, Node]]"


def rank_key(rank: int) -> str:
    """The key under which a rank's own value is stored."""
    return f"rank_{rank}"


def unite(parts: Parts, *, item: str, path: KeyPath = ()) -> Node:
    """The structure of which every rank holds a part.

    Dicts are united key by key. Plain values that differ are kept for every rank. Arrays of one name must be
    the same on every rank.

    Raises:
        CoordinationError: Two ranks hold different things under one key path; names both.
    """
    first_rank, first = parts[0]
    others = [(rank, node) for rank, node in parts[1:] if node != first]
    if not others:
        return first
    parts = [(first_rank, first), *others]
    if all(isinstance(node, BranchNode) for _, node in parts):
        return _unite_branches([(r, n) for r, n in parts if isinstance(n, BranchNode)], item, path)
    if all(isinstance(node, ValueNode) for _, node in parts):
        return BranchNode(
            kind="per_rank",
            keys=tuple(Key(rank_key(rank)) for rank, _ in parts),
            children=tuple(node for _, node in parts),
        )
    if all(isinstance(node, structure.ArrayNode) for _, node in parts):
        for rank, node in others:
            if isinstance(node, structure.ArrayNode) and isinstance(first, structure.ArrayNode):
                if (node.spec, node.kind, node.tied_to) != (first.spec, first.kind, first.tied_to):
                    raise _conflict(item, path, (first_rank, first), (rank, node))
        return first
    raise _conflict(item, path, parts[0], parts[1])


def _unite_branches(parts: Sequence[tuple[int, BranchNode]], item: str, path: KeyPath) -> Node:
    first_rank, first = parts[0]
    for rank, node in parts[1:]:
        if node.kind != first.kind:
            raise _conflict(item, path, (first_rank, first), (rank, node))
        if first.kind not in _MAPPINGS and (node.keys, node.detail) != (first.keys, first.detail):
            raise _conflict(item, path, (first_rank, first), (rank, node))
    held: dict[Key, list[tuple[int, Node]]] = {}
    for rank, node in parts:
        for key, child in zip(node.keys, node.children, strict=True):
            held.setdefault(key, []).append((rank, child))
    children = tuple(
        unite(children, item=item, path=(*path, key)) for key, children in held.items()
    )
    return dataclasses.replace(first, keys=tuple(held), children=children)


def _conflict(
    item: str, path: KeyPath, first: tuple[int, Node], second: tuple[int, Node]
) -> errors.CoordinationError:
    where = structure.pretty(path, item)
    return errors.CoordinationError(
        f"{where}: rank {first[0]} holds {_describe(first[1])}, rank {second[0]} holds {_describe(second[1])}. "
        "Give them different names, or wrap what belongs to each rank in fc.PerRank.",
        ranks=(first[0], second[0]),
        key_path=where,
    )


def _describe(node: Node) -> str:
    if isinstance(node, structure.ArrayNode):
        return f"{node.kind} {node.spec}"
    if isinstance(node, ValueNode):
        return f"{node.kind} {node.value!r:.40}"
    return f"a {node.kind} of {len(node.children)}"


def unite_shardings(parts: Sequence[tuple[int, Sharding | None]]) -> Sharding:
    """Who holds what of an array that the ranks hold in different shardings, or plain.

    Meshes of one shape that have no rank in common are replicas of each other: FSDP2 shards what
    tensor parallelism leaves alone (norms) over another mesh on every tensor-parallel rank. Of
    shardings that do not fit together, that of the first rank counts; the others write nothing.

    Args:
        parts: `(rank, sharding)` of every rank that has the array; None where it is plain.
    """
    first = parts[0][1]
    if first is None:
        return Sharding.replicated(tuple(rank for rank, sharding in parts if sharding is None))
    replicas = [first]
    taken = set(first.ranks)
    for _, sharding in parts:
        if sharding is None or not taken.isdisjoint(sharding.ranks):
            continue
        if (sharding.mesh_shape, sharding.placements) == (first.mesh_shape, first.placements):
            replicas.append(sharding)
            taken.update(sharding.ranks)
    if len(replicas) == 1:
        return first
    return Sharding(
        (len(replicas), *first.mesh_shape),
        tuple(rank for replica in replicas for rank in replica.ranks),
        (None, *first.placements),
    )


def for_rank(root: Node, rank: int, num_ranks: int, dropped: list[str]) -> Node:
    """The structure as one rank restores it: its own of every value that was saved per rank.

    With another number of ranks, the values of rank 0 are taken; `dropped` is told their key paths.
    """

    def visit(place: tuple[Node, KeyPath]) -> walk.Visit[tuple[Node, KeyPath], Node]:
        node, path = place
        if not isinstance(node, BranchNode):
            return walk.leaf(node)
        if node.kind == "per_rank":
            own = {key.value: child for key, child in zip(node.keys, node.children, strict=True)}
            if len(own) == num_ranks and rank_key(rank) in own:
                return walk.leaf(own[rank_key(rank)])
            dropped.append(structure.pretty(path))
            return walk.leaf(node.children[0])
        pairs = zip(node.children, node.keys, strict=True)
        return [
            (child, (*path, key)) for child, key in pairs
        ], lambda children: dataclasses.replace(node, children=tuple(children))

    return walk.fold((root, ()), visit)
