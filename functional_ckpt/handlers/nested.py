"""Values with handlers inside the tree of an item: modules, records, generators, users' own types.

A pytree may hold any of them. The tree of another handler (a `state_dict`) may hold values of the
types that the user has registered a handler for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import torch

from functional_ckpt.core.tree import flatten, long_lists, structure, walk
from functional_ckpt.core.tree.placeholders import NOTHING, Fill, Refused
from functional_ckpt.core.tree.structure import Handled, KeyPath
from functional_ckpt.handlers import dtensor_parts
from functional_ckpt.handlers.base import Handler, Item, Registry

Make: TypeAlias = Callable[[Item, Any, KeyPath], Handled]
"""Returns the target of a value, given its stored tree (`NOTHING` for none)."""

_PLACEHOLDERS = (Fill, Refused, Handled)
_LEAVES = (torch.Tensor, *_PLACEHOLDERS)


def _item_at(registry: Registry, value: Any, around: Item) -> Item | None:
    """Returns the item of a value that stands in the tree of another one; None for plain data."""
    if isinstance(value, torch.Tensor) and (parts := dtensor_parts.parts_item(value)) is not None:
        return parts
    if not around.handler.holds_values:
        found = registry.find(value, is_own=True)
        return None if found is None or found.handler == around.handler else found
    found = value if isinstance(value, Item) else registry.find(value)
    if isinstance(value, Item):
        value.check()
    elif found is not None and found.handler.holds_values:
        return None
    return found


def lower(registry: Registry, value: Any, around: Item) -> Handled | None:
    """Returns the tree of a value's handler; None for plain data."""
    item = _item_at(registry, value, around)
    if item is None:
        return None
    return Handled(
        tree=item.handler.lower(item.value),
        detail={structure.HANDLER: _name_of(registry, item.handler)},
        item=item,
        is_per_rank=item.handler.per_rank,
    )


def _name_of(registry: Registry, handler: Handler) -> str:
    kind = type(handler)
    if kind.__module__.startswith("functional_ckpt."):
        return kind.__name__
    registered = (name for name, each in registry.named.items() if each == handler)
    return next(registered, f"{kind.__module__}.{kind.__qualname__}")


def lifts(registry: Registry, node: structure.BranchNode) -> bool | None:
    """Returns whether a registered handler restores a stored tree; None if it is missing.

    The handlers of this package need a live value. Without one, their trees are plain data, except
    a shard of a tensor.
    """
    name = structure.handler_of(node) or ""
    if name in registry.named:
        return True
    if name == dtensor_parts.DTensorPartsHandler.__name__:
        return None
    return None if "." in name or "[" in name else False


# ------------------------------------------------------------------------------------ targets


def place(registry: Registry, tree: Any, stored: Any, around: Item, make: Make) -> Any:
    """Returns the tree with `make`'s results instead of all values with handlers."""
    if not around.handler.holds_values:
        return tree

    def visit(at: tuple[Any, Any, KeyPath, Item]) -> walk.Visit[Any, Any]:
        value, stored, path, around = at
        if type(value) not in flatten.PLAIN_TYPES and not isinstance(value, _PLACEHOLDERS):
            item = _item_at(registry, value, around)
            if item is not None:
                made = make(item, stored, path)
                if not item.handler.holds_values:
                    return walk.leaf(made)
                inner = [(made.tree, structure.tree_of(stored), path, item)]
                return inner, lambda trees: dataclasses.replace(made, tree=trees[0])
        opened = _open(value)
        if opened is None:
            return walk.leaf(value)
        known = _children_of(stored)
        pairs = list(zip(opened.keys, opened.children, strict=True))
        children = [
            (child, known.get(str(key.value), NOTHING), (*path, key), around)
            for key, child in pairs
        ]
        return children, lambda new: _rebuilt(value, opened, new)

    return walk.fold((tree, stored, (), around), visit)


def _open(value: Any) -> flatten.FlatNode | None:
    """Returns the parts of a container that may hold values with handlers; None for a leaf."""
    if isinstance(value, _LEAVES) or long_lists.is_leaf(value):
        return None
    return flatten.flatten_one_level(value)


def _rebuilt(value: Any, opened: flatten.FlatNode, children: list[Any]) -> Any:
    """Returns the container with new children; itself if none has changed."""
    if all(new is old for new, old in zip(children, opened.children, strict=True)):
        return value
    return flatten.unflatten_one_level(opened.node(), children, value)


def _children_of(stored: Any) -> Mapping[str, Any]:
    """Returns the stored children of a container, by the text of their keys."""
    opened = flatten.flatten_one_level(structure.tree_of(stored))
    if opened is None:
        return {}
    pairs = zip(opened.keys, opened.children, strict=True)
    return {str(key.value): child for key, child in pairs}


def own(registry: Registry, item: Item) -> Any:
    """Returns the item's own tree, with the own trees of the values in it, each as a `Handled`."""

    def make(each: Item, _: Any, __: KeyPath) -> Handled:
        return Handled(_as_stored(each.handler.own(each.value)), item=each, is_kept=True)

    return place(registry, item.handler.own(item.value), NOTHING, item, make)


def _as_stored(tree: Any) -> Any:
    """Returns a handler's tree in the form that `flatten` gives it."""
    is_leaf = isinstance(tree, torch.Tensor) or flatten.flatten_one_level(tree) is None
    return {structure.ROOT_NAME: tree} if is_leaf else tree


def unchanged(registry: Registry, item: Item) -> Any:
    """Returns the result for an item that a restore does not change: the caller's values."""
    made = place(
        registry, item.value, NOTHING, item, lambda each, _, __: Handled(each.value, item=each)
    )
    return _map_handled(made, lambda _, tree: tree)


# ------------------------------------------------------------------------------------ lifting


def lift(registry: Registry, tree: Any, *, is_late: bool) -> Any:
    """Returns a restored tree with the values that handlers make of its parts.

    A value that the checkpoint has and the target only takes as saved is made by
    `lift(None, tree)`. `is_late` marks the second call, for optimizers: they need their modules.
    """

    def lifted(each: Handled, tree: Any) -> Any:
        if each.item is not None and not is_late and is_lifted_late(each.item):
            return dataclasses.replace(each, tree=tree)
        return _lift_one(registry, each, tree)

    return _map_handled(tree, lifted)


def is_lifted_late(item: Item) -> bool:
    """Returns whether an item is lifted after the others: an optimizer needs its parameters."""
    return bool(item.handler.optimizers(item.value))


def _lift_one(registry: Registry, handled: Handled, tree: Any) -> Any:
    item: Item | None = handled.item
    if handled.is_kept:
        return unchanged(registry, cast("Item", item))
    name = str(handled.detail.get(structure.HANDLER))
    handler = registry.named[name] if item is None else item.handler
    if structure.RESIZE in handled.detail:
        rank, num_ranks = cast("list[int]", handled.detail[structure.RESIZE])
        tree = handler.resize(list(tree.values()), rank, num_ranks)
    return handler.lift(None if item is None else item.value, tree)


def _map_handled(tree: Any, function: Callable[[Handled, Any], Any]) -> Any:
    """Returns the tree with `function` of every `Handled` and of its tree, from the leaves up."""

    def visit(value: Any) -> walk.Visit[Any, Any]:
        if isinstance(value, Handled):
            inner = [] if value.is_kept else [value.tree]
            return inner, lambda trees: function(value, trees[0] if trees else None)
        opened = _open(value)
        if opened is None:
            return walk.leaf(value)
        return opened.children, lambda new: _rebuilt(value, opened, new)

    return walk.fold(tree, visit)
