"""Encodes a rank's structures and leaves as bytes, and merges those of all ranks."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.arrays.sharding import DimShard, Sharding
from functional_ckpt.core.records import merge_ranks, structure_json
from functional_ckpt.core.tree import structure
from functional_ckpt.saving import replicas
from functional_ckpt.saving.lower import LoweredItem

EQUAL, FIRST_RANK, UNCHECKED = "=", "1", "?"
"""Marks: equal on all ranks that have it; the first rank's counts; that without a comparison."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A leaf as one rank holds it.

    Attributes:
        sharding: Its sharding; None for a plain one.
        spec: Kind, dtype and shape as text; empty for a plain number.
        mark: Whether the values of all ranks must be equal.
        digest: The digest of a sample; 0 if nothing is compared.
    """

    sharding: Sharding | None
    spec: str
    mark: str
    digest: int


def mark_of(item: LoweredItem, name: str) -> str:
    """Returns the mark of an array of an item."""
    if not item.is_checked:
        return UNCHECKED
    if name in item.first_rank:
        return FIRST_RANK if item.first_rank[name] else UNCHECKED
    return EQUAL


def leaves_of(items: Sequence[LoweredItem]) -> dict[str, Leaf]:
    """Returns `item/leaf` -> the leaf, for all leaves that this rank might write."""
    found: dict[str, Leaf] = {}
    for item in items:
        digests = replicas.digests(item.sources) if item.is_checked else [0] * len(item.sources)
        for source, digest in zip(item.sources, digests, strict=True):
            found[f"{item.name}/{source.node.name}"] = Leaf(
                sharding=source.sharding,
                spec=structure.describe(source.node),
                mark=mark_of(item, source.node.name),
                digest=digest,
            )
        for name, _, _ in item.scalars:
            found[f"{item.name}/{name}"] = Leaf(sharding=None, spec="", mark=UNCHECKED, digest=0)
    return found


def merge(values: Sequence[bytes]) -> bytes:
    """On the primary: returns one sharding for every leaf that any rank holds.

    Raises:
        CoordinationError: Two ranks hold arrays of different shapes, different values, or different
            containers, under one name.
    """
    held: dict[str, list[tuple[int, Leaf]]] = {}
    trees: dict[str, list[tuple[int, str]]] = {}
    for rank, value in enumerate(values):
        leaves, texts = _from_bytes(value)
        for name, leaf in leaves.items():
            held.setdefault(name, []).append((rank, leaf))
        for item, text in texts.items():
            trees.setdefault(item, []).append((rank, text))
    merged: dict[str, Leaf] = {}
    compared: dict[str, tuple[Sharding, dict[int, int]]] = {}
    for name, found in held.items():
        _check_alike(name, found)
        first = found[0][1]
        sharding = merge_ranks.merge_shardings([(rank, leaf.sharding) for rank, leaf in found])
        merged[name] = dataclasses.replace(first, sharding=sharding, digest=0)
        if first.mark == EQUAL and sharding.num_replicas > 1:
            digests = {rank: leaf.digest for rank, leaf in found}
            compared[_shown(name)] = (sharding, digests)
    for item, texts_of_item in trees.items():
        roots = {text: structure_json.from_json(json.loads(text)) for _, text in texts_of_item}
        merge_ranks.merge_ranks([(rank, roots[text]) for rank, text in texts_of_item], item=item)
    replicas.check_equal(compared)
    return to_bytes(merged, ())


def shardings_of(merged: bytes) -> dict[str, Sharding]:
    """Decodes the result of `merge`: the sharding of every leaf."""
    found: dict[str, Sharding] = {}
    for name, leaf in _from_bytes(merged)[0].items():
        if leaf.sharding is not None:  # merged ones always have one
            found[name] = leaf.sharding
    return found


def _check_alike(name: str, found: Sequence[tuple[int, Leaf]]) -> None:
    """Raises unless all ranks that have a leaf describe it equally."""
    first_rank, first = found[0]
    for rank, leaf in found[1:]:
        if leaf.spec != first.spec:
            kinds = [each.spec or "a plain number" for each in (first, leaf)]
            raise errors.CoordinationError(
                f"{_shown(name)}: rank {first_rank} holds {kinds[0]}, rank {rank} holds "
                f"{kinds[1]}. Give them different names, or save each rank's value in a separate "
                "item (fc.Stateful(value, per_rank=True)).",
                ranks=(first_rank, rank),
                key_path=_shown(name),
            )
        if leaf.mark != first.mark:
            raise errors.CoordinationError(
                f"{_shown(name)}: ranks {first_rank} and {rank} give its item another "
                "replicated=...; it must be the same on all ranks.",
                ranks=(first_rank, rank),
                key_path=_shown(name),
            )


def _shown(name: str) -> str:
    """Returns the name of `item/leaf` for messages."""
    return name.replace("/", ".", 1)


# ------------------------------------------------------------------------------------ bytes


def to_bytes(leaves: Mapping[str, Leaf], items: Sequence[LoweredItem]) -> bytes:
    """Returns JSON of the leaves and the items' structures; equal shardings are stored once."""
    shardings: dict[Sharding | None, int] = {}
    specs: dict[tuple[str, str], int] = {}
    rows = [
        (
            shardings.setdefault(leaf.sharding, len(shardings)),
            specs.setdefault((leaf.spec, leaf.mark), len(specs)),
            leaf.digest,
        )
        for leaf in leaves.values()
    ]
    record = {
        "shardings": [None if each is None else dataclasses.astuple(each) for each in shardings],
        "specs": list(specs),
        "names": list(leaves),
        "rows": rows,
        "trees": {
            item.name: json.dumps(structure_json.to_json(item.root))
            for item in items
            if item.root is not None
        },
    }
    return zlib.compress(json.dumps(record).encode(), 1)


def _from_bytes(value: bytes) -> tuple[dict[str, Leaf], dict[str, str]]:
    """Returns the leaves, and the JSON of each item's structure."""
    record: dict[str, Any] = json.loads(zlib.decompress(value))
    shardings = [None if each is None else _sharding(*each) for each in record["shardings"]]
    found: dict[str, Leaf] = {}
    for name, (sharding, number, digest) in zip(record["names"], record["rows"], strict=True):
        spec, mark = record["specs"][number]
        found[name] = Leaf(sharding=shardings[sharding], spec=spec, mark=mark, digest=digest)
    return found, record["trees"]


def _sharding(mesh_shape: list[int], ranks: list[int], placements: list[Any]) -> Sharding:
    cuts = (None if cut is None else DimShard(*cut) for cut in placements)
    return Sharding(tuple(mesh_shape), tuple(ranks), tuple(cuts))
