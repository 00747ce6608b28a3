"""Flattens pytrees to a structure and its arrays, and maps them leaf by leaf."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from functional_ckpt import errors
from functional_ckpt.core.tree import encode, memory, structure, walk
from functional_ckpt.core.tree.containers import FlatNode, flatten_one_level, unflatten_one_level
from functional_ckpt.core.tree.structure import ROOT_NAME, Key, KeyPath, leaf_name

OpenLeaf: TypeAlias = Callable[[Any, Any], structure.Handled | None]
"""Returns the tree of a value's handler; None for a value without one.

The second argument is the item whose tree contains the value, None for the root item.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlatTree:
    """A value taken apart for saving.

    Attributes:
        root: The structure, with every array named.
        arrays: For each array that holds its own bytes: its name, node and live value, in tree
            order.
        tied: The others, which share the bytes of one of these.
        nested: Values with handlers of their own, each with the prefix of its leaves' names.
    """

    root: structure.Node
    arrays: tuple[tuple[structure.ArrayNode, object], ...]
    tied: tuple[structure.ArrayNode, ...] = ()
    nested: tuple[tuple[str, structure.Handled], ...] = ()


def flatten(
    value: object,
    *,
    item: str = "",
    open_leaf: OpenLeaf | None = None,
    ranks: tuple[int, int] | None = None,
) -> FlatTree:
    """Takes a value apart into a structure and the arrays it holds; copies nothing.

    Args:
        value: Any pytree.
        item: The item's name, for messages.
        open_leaf: Finds values with handlers.
        ranks: This rank and their number, for values that each rank has one of its own of; None
            where each has a tree of its own.

    Raises:
        UnsupportedLeafError: Naming every leaf that cannot be carried and the ways out.
        NameCollisionError: Leaves would share one name on disk; all of them are named.
    """
    state = _Flattening(item, open_leaf, ranks)
    root = walk.fold((value, None, 0, _Around()), state.visit)
    state.raise_problems()
    return FlatTree(
        root=root,
        arrays=tuple(state.arrays),
        tied=tuple(state.tied),
        nested=tuple(state.nested),
    )


# TensorStore's keys have up to 65,535 bytes, the last of which are the chunk's index.
_MAX_NAME_BYTES = 64_000

PLAIN_TYPES: frozenset[type] = frozenset(
    {dict, list, tuple, bytes, torch.Size, torch.Tensor, torch.nn.Parameter, np.ndarray}
    | {collections.OrderedDict, collections.Counter, collections.defaultdict, collections.deque}
    | {type(None), bool, int, float, complex, str, torch.dtype, torch.device}
    | {structure.Described, structure.MergedNames}
)
"""Types of plain data, about which no handler is asked where they stand in a tree."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Around:
    """The surroundings of a value.

    Attributes:
        item: The nearest value with a handler above it; None for the root.
        is_per_rank: Whether each rank has one of its own.
    """

    item: Any = None
    is_per_rank: bool = False


_Entry: TypeAlias = tuple[object, Key | None, int, _Around]
"""A value, its key (None for the root), its depth and its surroundings."""
_NOTHING = structure.ValueNode(kind="none", value=None)


class _Flattening:
    """The mutable state of one `flatten` call."""

    def __init__(
        self, item: str, open_leaf: OpenLeaf | None, ranks: tuple[int, int] | None
    ) -> None:
        self.item = item
        self.open_leaf = open_leaf
        self.ranks = ranks
        self.nested: list[tuple[str, structure.Handled]] = []
        self.arrays: list[tuple[structure.ArrayNode, object]] = []
        self.tied: list[structure.ArrayNode] = []
        self.problems: list[tuple[str, str]] = []
        self.collisions: list[tuple[str, str]] = []
        self.paths: dict[str, KeyPath] = {}
        self.owners: dict[Any, str] = {}
        self.open_ids: set[int] = set()
        self.trail: walk.Trail[Key] = walk.Trail()

    def visit(self, entry: _Entry) -> walk.Visit[_Entry, structure.Node]:
        value, key, depth, around = entry
        self.trail.enter(depth, key)
        if memory.is_contiguous_strided(value):
            return walk.leaf(self._ordinary(cast("torch.Tensor", value)))
        try:
            if (plain := encode.value_node(value)) is not None:
                self._take_name()
                return walk.leaf(plain)
            if (handled := self._handled(value, around)) is not None:
                return self._open_handled(handled, depth, around)
            if id(value) in self.open_ids:
                raise errors.UnsupportedLeafError(_CYCLE)
            if (opened := flatten_one_level(value)) is not None:
                return self._branch(value, opened, depth, around)
            if (array := encode.array_node(value, leaf_name(self.trail.path()))) is not None:
                self._take_name()
                return walk.leaf(self._array(array, value))
        except errors.UsageError as error:
            self._add_problem(error.message)
        else:
            self._add_problem(_why_unsupported(value))
        return walk.leaf(_NOTHING)

    def _ordinary(self, tensor: torch.Tensor) -> structure.Node:
        try:
            name = self._take_name()
            return self._array(encode.ordinary_node(tensor, name), tensor)
        except errors.UsageError as error:
            self._add_problem(error.message)
            return _NOTHING

    def _handled(self, value: object, around: _Around) -> structure.Handled | None:
        if type(value) is structure.Handled:
            return value
        if self.open_leaf is None or type(value) in PLAIN_TYPES:
            return None
        found = self.open_leaf(value, around.item)
        if found is not None:
            self.nested.append((leaf_name(self.trail.path()), found))
        return found

    def _open_handled(
        self, handled: structure.Handled, depth: int, around: _Around
    ) -> walk.Visit[_Entry, structure.Node]:
        """Returns the tree of a handler's value, for per-rank values below a key of this rank."""
        tree, detail = handled.tree, handled.detail
        if id(tree) in self.open_ids:
            raise errors.UnsupportedLeafError(_CYCLE)
        if handled.is_per_rank and self.ranks is not None and not around.is_per_rank:
            rank, num_ranks = self.ranks
            opened = FlatNode(
                kind="per_rank",
                keys=(Key(structure.rank_key(rank)),),
                children=(handled,),
                detail={**detail, "num_ranks": num_ranks},
            )
            return self._branch(opened, opened, depth, _Around(around.item, is_per_rank=True))
        opened = None if isinstance(tree, torch.Tensor) else flatten_one_level(tree)
        if opened is None:
            detail = {**detail, structure.BARE: True}
            opened = FlatNode(kind="dict", keys=(Key(ROOT_NAME),), children=(tree,))
        opened = dataclasses.replace(opened, detail={**opened.detail, **detail})
        return self._branch(tree, opened, depth, _Around(handled.item, around.is_per_rank))

    def _branch(
        self, value: object, opened: FlatNode, depth: int, around: _Around
    ) -> walk.Visit[_Entry, structure.Node]:
        if not opened.children:
            self._take_name()
        self._check_keys(opened.keys)
        self.open_ids.add(id(value))

        def build(children: list[structure.Node]) -> structure.Node:
            self.open_ids.discard(id(value))
            return opened.node(children)

        pairs = zip(opened.keys, opened.children, strict=True)
        return [(child, key, depth + 1, around) for key, child in pairs], build

    def _check_keys(self, keys: tuple[Key, ...]) -> None:
        """Two keys that read the same are two branches of one name, even if no leaf collides."""
        seen: dict[str, Key] = {}
        for key in keys:
            if (other := seen.setdefault(str(key.value), key)) is not key:
                path = self.trail.path()
                self._add_collision((*path, other), (*path, key))

    def _take_name(self) -> str:
        path = self.trail.path()
        name = leaf_name(path)
        if not structure.is_unicode(name):
            raise errors.UnsupportedLeafError(
                f"the name {name!r} is not valid Unicode (lone surrogate); rename the key"
            )
        if 4 * len(name) > _MAX_NAME_BYTES and len(name.encode()) > _MAX_NAME_BYTES:
            raise errors.UnsupportedLeafError(
                f"its name has {len(name.encode())} bytes, and at most {_MAX_NAME_BYTES} can be "
                "stored; use shorter keys"
            )
        if (other := self.paths.setdefault(structure.key_prefix(name), path)) is not path:
            self._add_collision(other, path)
        return name

    def _array(self, node: structure.ArrayNode, value: object) -> structure.ArrayNode:
        key = memory.storage_key(value)
        if key is not None and (owner := self.owners.setdefault(key, node.name)) != node.name:
            self.tied.append(dataclasses.replace(node, tied_to=owner))
            return self.tied[-1]
        self.arrays.append((node, value))
        return node

    def _add_problem(self, why: str) -> None:
        where = structure.pretty(self.trail.path(), self.item)
        self.problems.append((where or "the value", why))

    def _add_collision(self, first: KeyPath, second: KeyPath) -> None:
        where, other = (structure.pretty(path, self.item) for path in (second, first))
        why = f"would be stored as {leaf_name(second)!r}, as {other} would; rename one of the keys"
        if (where, why) not in self.collisions:
            self.collisions.append((where, why))

    def raise_problems(self) -> None:
        found = [*self.problems, *self.collisions]
        if not found:
            return
        kind = errors.UnsupportedLeafError if self.problems else errors.NameCollisionError
        lines = [f"  {where}: {why}" for where, why in found]
        plural = "leaf" if len(lines) == 1 else "leaves"
        raise kind(
            f"{len(lines)} {plural} cannot be saved:\n" + "\n".join(lines), key_path=found[0][0]
        )


_CYCLE = "the container contains itself"


def _why_unsupported(value: object) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, torch.utils.data.DataLoader):
        return (
            f"{kind} has no state to save; use torchdata.stateful_dataloader.StatefulDataLoader, "
            "or save the number of the batch and build the loader again after the restore"
        )
    if isinstance(value, torch.nn.Module) or hasattr(value, "state_dict"):
        return (
            f"{kind} is a stateful object in the state of another one; save it as an item of its "
            f"own, or {_REGISTER.format(type(value).__name__)}"
        )
    if isinstance(value, enum.Enum):
        return f"{kind} is an enum of a class that is not stored; pass value.name or value.value"
    if callable(value):
        return (
            f"{kind} is code, and code is never stored; leave it out and build it again after "
            "restore"
        )
    return (
        f"{kind} is not a tensor, array, plain value or container; convert it, register its class "
        f"as a pytree node (torch.utils._pytree), or {_REGISTER.format(type(value).__name__)}"
    )


_REGISTER = (
    "register a handler: pass registry=fc.handlers.default_registry().with_handler({}, handler) to "
    "save and to restore, with a fc.handlers.Handler that lowers it to plain data"
)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Returns a copy of the pytree with `function` applied to every leaf, also None and numbers.

    A `Handled` is a leaf.
    """

    def visit(current: Any) -> walk.Visit[Any, Any]:
        is_leaf = isinstance(current, (torch.Tensor, structure.Handled))
        opened = None if is_leaf else flatten_one_level(current)
        if opened is None:
            return walk.leaf(function(current))
        return opened.children, lambda children: unflatten_one_level(
            opened.node(), children, current
        )

    return walk.fold(value, visit)
