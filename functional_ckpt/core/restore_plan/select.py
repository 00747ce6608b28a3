"""Which items and leaves a restore is about: shell patterns on `item` or `item.leaf.name`."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import CARRIED_BY, STORAGE_DTYPES, ArraySpec
from functional_ckpt.core.tree import composite, encode, flatten, structure, walk

OWN = "own"
"""Kind of a node whose value is the target's own: in a restore only, never on disk."""
Selects: TypeAlias = Callable[[str], bool]
Ignored: TypeAlias = str | Sequence[str] | Selects
"""Leaves that a restore skips: patterns, or a function of a name."""


class Selection:
    """Selects leaves and records the matched patterns, so that typing errors are reported.

    Args:
        patterns: Shell patterns; a `*` also matches dots. None selects everything.
        ignored: Patterns, or a function, of leaves to skip; None skips nothing.
    """

    def __init__(self, patterns: Sequence[str] | None, ignored: Ignored | None = None) -> None:
        self._patterns = patterns
        self._ignored = (ignored,) if isinstance(ignored, str) else ignored
        self._used: set[str] = set()
        self._used_ignored: set[str] = set()
        self._found: set[str] = set()

    def includes_item(self, item: str) -> bool:
        """Returns whether a pattern names the item itself, and none ignores it."""
        if self._ignores(item):
            return False
        return self._patterns is None or self._is_matched(item, item)

    def is_partial(self, item: str) -> bool:
        """Returns whether some leaf of the item might not be selected."""
        if not self.includes_item(item):
            return True
        ignored = self._ignored
        if ignored is None or callable(ignored):
            return ignored is not None
        return any(_may_begin(pattern, f"{item}.") for pattern in ignored)

    def may_include(self, item: str) -> bool:
        """Returns whether a pattern names the item, or could name a leaf of it."""
        if self._ignores(item):
            return False
        if self._patterns is None or self.includes_item(item):
            return True
        return any(_may_begin(pattern, f"{item}.") for pattern in self._patterns)

    def leaves_of(self, item: str) -> Selects:
        """Returns the selected leaves of an item, by name."""
        if self.includes_item(item):
            if self._ignored is None:
                return lambda name: True
            return lambda name: not self._ignores(f"{item}.{name}")
        return lambda name: (
            not self._ignores(f"{item}.{name}") and self._is_matched(f"{item}.{name}", item)
        )

    def has_match(self, item: str) -> bool:
        """Returns whether the item, or a tested leaf of it, is selected."""
        return self._patterns is None or item in self._found

    def check_used(self) -> None:
        """Raises `UsageError` for a pattern without a match, after all leaves were tested."""
        unused = [pattern for pattern in self._patterns or () if pattern not in self._used]
        if unused or self._patterns == ():
            raise _matches_nothing("only", list(self._patterns or ()), unused)
        ignored = self._ignored
        if ignored is None:
            return
        if callable(ignored):
            if not self._used_ignored:
                raise _matches_nothing("ignore", ignored, ["it"])
            return
        unused = [pattern for pattern in ignored if pattern not in self._used_ignored]
        if unused or not ignored:
            raise _matches_nothing("ignore", list(ignored), unused)

    def _is_matched(self, name: str, item: str) -> bool:
        matching = [p for p in self._patterns or () if fnmatch.fnmatchcase(name, p)]
        self._used.update(matching)
        if matching:
            self._found.add(item)
        return bool(matching)

    def _ignores(self, name: str) -> bool:
        ignored = self._ignored
        if ignored is None:
            return False
        if callable(ignored):
            matching = [name] if ignored(name) else []
        else:
            matching = [p for p in ignored if fnmatch.fnmatchcase(name, p)]
        self._used_ignored.update(matching)
        return bool(matching)


def _may_begin(pattern: str, start: str) -> bool:
    """Returns whether a pattern may match a name with this prefix."""
    ends = range(1, len(pattern) + 1)
    return any(fnmatch.fnmatchcase(start, pattern[:end]) for end in ends)


def _matches_nothing(option: str, value: object, unused: Sequence[str]) -> errors.UsageError:
    named = ", ".join(each if each == "it" else repr(each) for each in unused) or "no pattern"
    return errors.UsageError(
        f"{option}={value!r}: {named} matches no item and no leaf. A pattern is matched against "
        "the item's name and against 'item.leaf.name'."
    )


_PARTS = composite.KINDS
_Entry: TypeAlias = tuple[structure.Node, structure.Key | None, int]


def specs(node: structure.Node) -> Any:
    """Returns the tree a structure describes, with an `ArraySpec` for every array.

    The tree of a handler is a `Handled`; a dict with a detail is a `Described`.
    """
    return walk.fold(node, _visit_specs)


def _visit_specs(node: structure.Node) -> walk.Visit[structure.Node, Any]:
    if isinstance(node, structure.ArrayNode):
        return walk.leaf(node.spec)
    if isinstance(node, structure.ValueNode):
        if node.kind == OWN:
            return walk.leaf(flatten.map_leaves(_spec_of, node.value))
        return walk.leaf(encode.plain_value(node))

    return node.children, functools.partial(_built_of_specs, node)


def _built_of_specs(node: structure.BranchNode, children: Sequence[Any]) -> Any:
    if structure.HANDLER in node.detail:
        tree = _built_of_specs(structure.without(node, structure.HANDLER), children)
        return structure.Handled(tree, node.detail)
    if node.kind in _PARTS or node.kind in ("registered", "per_rank"):  # not made of specs
        parts = dict(zip([key.value for key in node.keys], children, strict=True))
        # A single tensor differs from a dict.
        return structure.Described(parts, node.detail) if node.kind in _PARTS else parts
    built = flatten.unflatten_one_level(node, children)
    is_described = type(built) is dict and node.detail
    return structure.Described(built, node.detail) if is_described else built


def _spec_of(leaf: Any) -> Any:
    """Returns a leaf of a live tree as `specs` shows it."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    name = encode.torch_dtype_name(leaf.dtype)
    dtype = CARRIED_BY.get(name, name)
    return ArraySpec(tuple(leaf.shape), dtype) if dtype in STORAGE_DTYPES else leaf


def prune(node: structure.Node, keep: Callable[[str], bool]) -> structure.Node | None:
    """Returns the part of a structure whose leaf names `keep` accepts; None when nothing is left.

    A dict loses the keys that are left out; in a sequence, named tuple or registered node they
    become None.
    """
    trail: walk.Trail[structure.Key] = walk.Trail()

    def visit(entry: _Entry) -> walk.Visit[_Entry, structure.Node | None]:
        current, key, depth = entry
        trail.enter(depth, key)
        is_leaf = not isinstance(current, structure.BranchNode) or not current.children
        if is_leaf or current.kind in _PARTS:
            return walk.leaf(current if keep(structure.leaf_name(trail.path())) else None)
        branch = cast("structure.BranchNode", current)
        pairs = zip(branch.children, branch.keys, strict=True)
        children = [(child, key, depth + 1) for child, key in pairs]
        return children, functools.partial(_pruned, branch)

    return walk.fold((node, None, 0), visit)


def _pruned(
    node: structure.BranchNode, children: Sequence[structure.Node | None]
) -> structure.Node | None:
    if all(child is None for child in children):
        return None
    pairs = list(zip(node.keys, children, strict=True))
    if node.is_mapping:
        pairs = [(key, child) for key, child in pairs if child is not None]
    nothing = structure.ValueNode(kind="none", value=None)
    return dataclasses.replace(
        node,
        keys=tuple(key for key, _ in pairs),
        children=tuple(child or nothing for _, child in pairs),
    )
