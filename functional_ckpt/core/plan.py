"""What a restore will do, worked out and validated in full before anything is read into place.

`match` walks a stored structure and a target side by side and returns a *binding* for every leaf,
or collects what does not fit. Pure: nothing is read, nothing the caller passed is touched.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

from functional_ckpt.core import leaves, parts, structure, tree, walk
from functional_ckpt.core.bindings import Binding, Bound, Build, Given, ReadArray
from functional_ckpt.core.matching import match
from functional_ckpt.core.report import RestoreReport, raise_report
from functional_ckpt.core.structure import KeyPath

__all__ = [
    "Binding",
    "Bound",
    "Build",
    "Given",
    "ReadArray",
    "RestoreReport",
    "match",
    "prune",
    "raise_report",
    "specs",
]

_PARTS = parts.KINDS
_Place: TypeAlias = tuple[structure.Node, KeyPath]


def specs(node: structure.Node) -> Any:
    """The tree a structure describes, with an `ArraySpec` in place of every array."""
    return walk.fold(node, _visit_specs)


def _visit_specs(node: structure.Node) -> walk.Visit[structure.Node, Any]:
    if isinstance(node, structure.ArrayNode):
        return walk.leaf(node.spec)
    if isinstance(node, structure.ValueNode):
        return walk.leaf(leaves.plain_value(node))

    def build(children: list[Any]) -> Any:
        if node.kind in _PARTS or node.kind == "registered":  # neither is made of specs
            return dict(zip([key.value for key in node.keys], children, strict=True))
        return tree.close_container(node, children)

    return node.children, build


def prune(
    node: structure.Node, keep: Callable[[str], bool], path: KeyPath = ()
) -> structure.Node | None:
    """The part of a structure whose leaf names `keep` accepts; None when nothing is left.

    A dict loses the keys that are left out; in a sequence, named tuple or registered node None
    takes their place.
    """

    def visit(place: _Place) -> walk.Visit[_Place, structure.Node | None]:
        current, where = place
        is_leaf = not isinstance(current, structure.BranchNode) or not current.children
        if is_leaf or current.kind in _PARTS:
            return walk.leaf(current if keep(structure.leaf_name(where)) else None)
        branch = cast("structure.BranchNode", current)
        pairs = zip(branch.children, branch.keys, strict=True)
        return [(child, (*where, key)) for child, key in pairs], functools.partial(_pruned, branch)

    return walk.fold((node, path), visit)


def _pruned(
    node: structure.BranchNode, children: Sequence[structure.Node | None]
) -> structure.Node | None:
    if all(child is None for child in children):
        return None
    pairs = list(zip(node.keys, children, strict=True))
    if node.kind in ("dict", "ordered_dict", "default_dict", "counter"):
        pairs = [(key, child) for key, child in pairs if child is not None]
    nothing = structure.ValueNode(kind="none", value=None)
    return dataclasses.replace(
        node,
        keys=tuple(key for key, _ in pairs),
        children=tuple(child or nothing for _, child in pairs),
    )
