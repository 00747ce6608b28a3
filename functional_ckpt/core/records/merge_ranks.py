"""Merges the ranks' structures: pipeline stages, per-rank values, replicas. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

from functional_ckpt import errors
from functional_ckpt.core.arrays.sharding import Sharding
from functional_ckpt.core.tree import long_lists, plain_json, structure, walk
from functional_ckpt.core.tree.structure import ArrayNode, BranchNode, Key, KeyPath, Node, ValueNode

_Parts: TypeAlias = "Sequence[tuple[int, Node]]"


def merge_ranks(parts: _Parts, *, item: str) -> Node:
    """Returns the structure of which every rank holds a part.

    Dicts are united key by key, lists of names name by name. Plain values that differ are kept for
    every rank that has one. Arrays of one name must be the same on every rank.

    Raises:
        CoordinationError: Two ranks hold different things under one key path; names both.
    """
    return _Uniting(item, len(parts)).unite([((rank,), node) for rank, node in parts], ())


_Held: TypeAlias = "list[tuple[tuple[int, ...], Node]]"
"""Groups of ranks with equal values, in order of their first rank."""
_Branches: TypeAlias = "list[tuple[tuple[int, ...], BranchNode]]"


@dataclasses.dataclass(frozen=True, slots=True)
class _Uniting:
    """Shared state of one `merge_ranks` call."""

    item: str
    num_ranks: int

    def unite(self, held: _Held, path: KeyPath) -> Node:
        first = held[0][1]
        alike: list[int] = []
        others: _Held = []
        for ranks, node in held:
            if node is first or node == first:
                alike += ranks
            else:
                others.append((ranks, node))
        if not others:
            return first
        held = [(tuple(sorted(alike)), first), *others]
        if any(isinstance(node, BranchNode) for _, node in held):
            held = [(ranks, long_lists.unpacked(node)) for ranks, node in held]
        nodes = [node for _, node in held]
        if all(isinstance(node, BranchNode) for node in nodes):
            return self._unite_branches(cast("_Branches", held), path)
        if all(isinstance(node, ValueNode) for node in nodes):
            return self._keep_all(held)
        for ranks, node in others:
            if not _is_same_array(first, node):
                raise self._conflict(path, held[0], (ranks, node))
        return first

    def _keep_all(self, held: _Held) -> Node:
        """Returns one value for each of the ranks that have one."""
        pairs = sorted((rank, number) for number, (ranks, _) in enumerate(held) for rank in ranks)
        return BranchNode(
            kind="per_rank",
            keys=tuple(Key(structure.rank_key(rank)) for rank, _ in pairs),
            children=tuple(held[number][1] for _, number in pairs),
            # Distinguishes ranks without a value from another number of ranks.
            detail={} if len(pairs) == self.num_ranks else {"num_ranks": self.num_ranks},
        )

    def _unite_branches(self, held: _Branches, path: KeyPath) -> Node:
        first = held[0][1]
        detail = first.detail
        for ranks, node in held[1:]:
            merged = _merge_details(detail, node.detail) if node.kind == first.kind else None
            if merged is None:
                raise self._conflict(path, held[0], (ranks, node))
            detail = merged
        if first.detail.get(structure.MERGED):
            return _merge_names(held)
        children: dict[Key, _Held] = {}
        for ranks, node in held:
            is_united = first.is_mapping or first.kind == "per_rank"
            if not is_united and node.keys != first.keys:
                raise self._conflict(path, held[0], (ranks, node))
            for key, child in zip(node.keys, node.children, strict=True):
                children.setdefault(key, []).append((ranks, child))
        united = tuple(self.unite(each, (*path, key)) for key, each in children.items())
        return dataclasses.replace(first, keys=tuple(children), children=united, detail=detail)

    def _conflict(
        self,
        path: KeyPath,
        first: tuple[tuple[int, ...], Node],
        second: tuple[tuple[int, ...], Node],
    ) -> errors.CoordinationError:
        where = structure.pretty(path, self.item)
        rank, other = first[0][0], second[0][0]
        return errors.CoordinationError(
            f"{where}: rank {rank} holds {_contrast(first[1], second[1])}, rank {other} holds "
            f"{_contrast(second[1], first[1])}. {_advice(path)}",
            ranks=(rank, other),
            key_path=where,
        )


def _merge_details(
    one: Mapping[str, object], other: Mapping[str, object]
) -> Mapping[str, object] | None:
    """Returns the detail of a container on two ranks; None where they contradict each other.

    Per-module attributes of a state dict (`_metadata`) are merged like its keys: each pipeline
    stage has its own modules.
    """
    if one == other:
        return one
    if structure.METADATA in {*one, *other}:
        return _merge_metadata(one, other)
    if {**one, "attributes": None} != {**other, "attributes": None}:
        return None
    if not ("attributes" in one and "attributes" in other):
        return None
    first, second = (
        cast("dict[str, Any]", plain_json.untag(detail["attributes"], _Opaque.of))
        for detail in (one, other)
    )
    united = {**first, **second}
    for name in first.keys() & second.keys():
        mine, theirs = first[name], second[name]
        if mine == theirs:
            continue
        if not (isinstance(mine, dict) and isinstance(theirs, dict)):
            return None
        if any(mine[key] != theirs[key] for key in mine.keys() & theirs.keys()):
            return None
        united[name] = type(mine)({**mine, **theirs})
    return {**one, "attributes": plain_json.tag(united, _Opaque.back)}


def _merge_metadata(
    one: Mapping[str, object], other: Mapping[str, object]
) -> Mapping[str, object] | None:
    """As `_merge_details`, for the tree of a module: each rank has that of its own modules."""
    rest, others = ({**detail, structure.METADATA: None} for detail in (one, other))
    first, second = (
        cast("dict[str, Any]", plain_json.untag(detail[structure.METADATA], _Opaque.of))
        if structure.METADATA in detail
        else {}
        for detail in (one, other)
    )
    if rest != others or any(first[key] != second[key] for key in first.keys() & second.keys()):
        return None
    return {**rest, structure.METADATA: plain_json.tag({**first, **second}, _Opaque.back)}


@dataclasses.dataclass(frozen=True, slots=True)
class _Opaque:
    """A value in attributes that only torch can make, such as a `torch.Size`."""

    kind: str
    payload: str

    @classmethod
    def of(cls, kind: str, payload: Any) -> Any:
        """Returns such a value; `NotImplemented` for a plain one."""
        return cls(kind, json.dumps(payload)) if kind in _OF_TORCH else NotImplemented

    @staticmethod
    def back(value: object) -> tuple[str, Any] | None:
        """Returns its kind and payload; None for any other value."""
        return (value.kind, json.loads(value.payload)) if isinstance(value, _Opaque) else None


_OF_TORCH = ("torch", "torch_device", "torch_size", "enum", "record")


def _contrast(node: Node, other: Node) -> str:
    """Returns a node in a few words, with the facts that differ if the other's are the same."""
    text = structure.describe(node)
    if text != structure.describe(other):
        return text
    mine, theirs = _facts(node), _facts(other)
    facts = {name: fact for name, fact in mine.items() if theirs.get(name) != fact}
    return f"{text} with {facts!r:.200}" if facts else text


def _facts(node: Node) -> Mapping[str, object]:
    if isinstance(node, ArrayNode):
        return {"tied to": node.tied_to}
    if isinstance(node, BranchNode):
        return {**node.detail, "keys": [key.value for key in node.keys]}
    return {}


def _advice(path: KeyPath) -> str:
    if path and path[-1].value == "param_groups":
        return (
            "Ranks whose optimizers update other parameters must have the same groups, in the same "
            "order: where a rank has no parameter for one, add an empty group "
            "({'params': [], ...} with the group's options)."
        )
    return (
        "Give them different names, or save each rank's value in a separate item "
        "(fc.Stateful(value, per_rank=True))."
    )


def _is_same_array(one: Node, other: Node) -> bool:
    if not isinstance(one, ArrayNode) or not isinstance(other, ArrayNode):
        return False
    return one.dtype == other.dtype and (
        (one.spec, one.kind, one.tied_to) == (other.spec, other.kind, other.tied_to)
    )


def _merge_names(held: _Branches) -> Node:
    """Returns the names of every rank, each once, in order of the ranks."""
    children: list[Node] = []
    known: set[object] = set()
    for child in itertools.chain(*(node.children for _, node in held)):
        value = child.value if isinstance(child, ValueNode) else None
        if value not in known:
            known.add(value)
            children.append(child)
    keys = tuple(Key(index, "index") for index in range(len(children)))
    return dataclasses.replace(held[0][1], keys=keys, children=tuple(children))


def merge_shardings(parts: Sequence[tuple[int, Sharding | None]]) -> Sharding:
    """Returns the sharding of an array that ranks hold in different shardings, or plain.

    Meshes of one shape that have no rank in common are replicas of each other: FSDP2 shards
    parameters without tensor parallelism (norms) over another mesh on every tensor-parallel rank.
    Of shardings that do not fit together, that of the first rank counts; the others write nothing.

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


def select_rank(root: Node, rank: int, num_ranks: int, dropped: list[str]) -> Node:
    """Returns the structure that one rank restores, with its own part of per-rank values.

    With another number of ranks, a value that has a handler comes with those of all ranks, in a
    dict; of plain values, those of rank 0 are taken. `dropped` receives the key paths of plain
    values of which rank 0's are taken.
    """
    trail: walk.Trail[Key] = walk.Trail()

    def visit(entry: tuple[Node, Key | None, int]) -> walk.Visit[Any, Node]:
        node, key, depth = entry
        trail.enter(depth, key)
        if not isinstance(node, BranchNode):
            return walk.leaf(node)
        if node.kind == "per_rank":
            own = {key.value: child for key, child in zip(node.keys, node.children, strict=True)}
            if node.detail.get("num_ranks", len(own)) == num_ranks:
                # A rank that had none, and asks for it all the same, takes the first one's.
                return walk.leaf(own.get(structure.rank_key(rank), node.children[0]))
            if structure.handler_of(node) is not None:
                return walk.leaf(_of_all_ranks(node, rank, num_ranks))
            dropped.append(structure.pretty(trail.path()))
            return walk.leaf(node.children[0])
        pairs = zip(node.children, node.keys, strict=True)
        return [
            (child, key, depth + 1) for child, key in pairs
        ], lambda children: dataclasses.replace(node, children=tuple(children))

    return walk.fold((root, None, 0), visit)


def _of_all_ranks(node: BranchNode, rank: int, num_ranks: int) -> BranchNode:
    """Returns the values of all ranks, for a handler that resizes."""
    children = (
        structure.without(child, structure.HANDLER) if isinstance(child, BranchNode) else child
        for child in node.children
    )
    detail = {**node.detail, structure.RESIZE: [rank, num_ranks]}
    return dataclasses.replace(node, kind="dict", children=tuple(children), detail=detail)
