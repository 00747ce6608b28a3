"""Leaves that are not selected: they keep the target's values.

The stored structure and the target's own tree are merged before anything is matched, so that
`only`, `ignore` and `key_map` mean the same for every handler: the handler sees the result of the
restore as the saved value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch

from functional_ckpt.core.restore_plan.select import OWN, Selects
from functional_ckpt.core.tree import composite, flatten, structure, walk
from functional_ckpt.core.tree.placeholders import AS_SAVED, NOTHING, Fill
from functional_ckpt.core.tree.structure import Key, Node

INCOMPLETE = "incomplete"
"""Detail of a container some of whose children are left out though it needs them all."""

_SEQUENCES = ("list", "tuple", "deque", "torch_size")
_NONE = structure.ValueNode(kind="none", value=None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Merged:
    """One subtree merged: its node, None for nothing; whether leaves were selected, and kept."""

    node: Node | None
    selected: bool
    kept: bool


_Entry: TypeAlias = tuple[Node | None, Any, Key | None, int]
"""Stored node (None if absent), the target's (`NOTHING` if absent), key and depth."""


def is_own(node: object) -> bool:
    """Returns whether a node stands for the target's own value."""
    return isinstance(node, structure.ValueNode) and node.kind == OWN


def keep_unselected(saved: Node, own: Any, selects: Selects) -> Node | None:
    """Returns the stored structure with unselected leaves replaced by the target's own values.

    A leaf that is not selected and that the target does not have is left out. The names of an
    optimizer's parameters give the rest its meaning and are always taken as stored.

    Args:
        saved: The stored structure.
        own: The target's own tree, as its handler lowers it; with a `Handled` for each value that
            has a handler of its own.
        selects: Which leaves are to be restored, by name; asked about every leaf of both.

    Returns:
        The structure; an `own` node for a tree of which nothing is selected; None for nothing.
    """
    trail: walk.Trail[Key] = walk.Trail()

    def visit(entry: _Entry) -> walk.Visit[_Entry, _Merged]:
        stored, live, key, depth = entry
        trail.enter(depth, key)
        children, lives = _children_of(stored), _own_children(structure.tree_of(live))
        is_stored_leaf = stored is not None and children is None
        if is_stored_leaf or (not children and not lives):
            selected = selects(structure.leaf_name(trail.path())) or structure.is_names(stored)
            return walk.leaf(_leaf(stored, live, selected))
        is_own_leaf = lives is None and live is not AS_SAVED and live is not NOTHING
        if is_own_leaf and not selects(structure.leaf_name(trail.path())):
            return walk.leaf(_leaf(stored, live, False))
        pairs = _pairs(children or {}, lives or {}, structure.tree_of(live))
        entries = [(one, other, at, depth + 1) for one, other, at in pairs]
        keys = [at for _, _, at in pairs]
        return entries, lambda merged: _branch(stored, live, keys, merged)

    return walk.fold((saved, own, None, 0), visit).node


def _children_of(node: Node | None) -> dict[str, tuple[Key, Node]] | None:
    """Returns the children by the text of their keys; None for a leaf."""
    if not isinstance(node, structure.BranchNode):
        return None
    if node.kind in composite.KINDS or structure.is_names(node):
        return None
    pairs = zip(node.keys, node.children, strict=True)
    return {str(key.value): (key, child) for key, child in pairs}


def _own_children(live: Any) -> dict[str, tuple[Key, Any]] | None:
    """Returns the children by the text of their keys; None for a leaf."""
    opened = None if isinstance(live, (Fill, torch.Tensor)) else flatten.flatten_one_level(live)
    if opened is None:
        return None
    pairs = zip(opened.keys, opened.children, strict=True)
    return {str(key.value): (key, child) for key, child in pairs}


def _pairs(
    stored: Mapping[str, tuple[Key, Node]], own: Mapping[str, tuple[Key, Any]], live: Any
) -> list[tuple[Node | None, Any, Key]]:
    absent = AS_SAVED if live is AS_SAVED else NOTHING
    found: list[tuple[Node | None, Any, Key]] = [
        (child, own[text][1] if text in own else absent, key)
        for text, (key, child) in stored.items()
    ]
    found += [(None, child, key) for text, (key, child) in own.items() if text not in stored]
    return found


def _leaf(stored: Node | None, live: Any, selected: bool) -> _Merged:
    if selected:
        return _Merged(stored, selected=True, kept=False)
    node = (
        None if live is NOTHING or live is AS_SAVED else structure.ValueNode(kind=OWN, value=live)
    )
    return _Merged(node, selected=False, kept=True)


def _branch(stored: Node | None, live: Any, keys: list[Key], merged: list[_Merged]) -> _Merged:
    selected = any(each.selected for each in merged)
    if not any(each.kept for each in merged):
        return _Merged(stored, selected=selected, kept=False)
    if not selected:
        return _leaf(stored, live, False)
    if stored is None:
        opened = cast("flatten.FlatNode", flatten.flatten_one_level(structure.tree_of(live)))
        stored = opened.node()
    branch = cast("structure.BranchNode", stored)
    pairs = [(key, each.node) for key, each in zip(keys, merged, strict=True)]
    if live is AS_SAVED and not branch.is_mapping:  # as where there is no target at all
        pairs = [(key, node or _NONE) for key, node in pairs]
    present = [(key, node) for key, node in pairs if node is not None]
    node = dataclasses.replace(
        branch, keys=tuple(key for key, _ in present), children=tuple(node for _, node in present)
    )
    if not branch.is_mapping and len(present) < len(pairs) and not _is_prefix(node):
        node = dataclasses.replace(node, detail={**node.detail, INCOMPLETE: True})
    return _Merged(node, selected=True, kept=True)


def _is_prefix(node: structure.BranchNode) -> bool:
    """Returns whether a sequence only lacks items at its end."""
    return node.kind in _SEQUENCES and [key.value for key in node.keys] == list(
        range(len(node.keys))
    )
