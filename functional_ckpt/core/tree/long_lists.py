"""Long lists of plain values: one leaf for each list, not one for each value. Free of torch.

Numbers of one type stay as they are, so that Orbax reads an array of them. All other lists of plain
values (strings, mixed numbers, dicts of a log) are JSON text: two texts are equal only where all
values and their types are.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeGuard, cast

from functional_ckpt import errors
from functional_ckpt.core.tree import plain_json, structure, walk
from functional_ckpt.core.tree.structure import NUMBERS, BranchNode, Key, Node, ValueNode

PLAIN_LIST = "plain_list"
"""Kind of a long list that is JSON text."""

# From this length on a list is one leaf.
_LONG = 128
# Python limits how many digits it reads, and JSON's readers how deep they go.
_MAX_INT_BITS, _MAX_DEPTH = 1024, 20
_LISTS = (list, tuple, collections.deque)
_SCALARS: Mapping[type, str] = MappingProxyType(
    {str: "str", bool: "bool", float: "float", int: "int", type(None): "none"}
)


def to_node(value: object) -> ValueNode | None:
    """Returns the node of a long list, tuple or deque of plain values; None for anything else."""
    if not _is_long_list(value):
        return None
    values = cast("list[object]", value)
    kind = f"{_SCALARS.get(type(values[0]))}s" if len(set(map(type, values))) == 1 else ""
    if kind in NUMBERS and (kind != "ints" or _fit_64_bits(cast("list[int]", value))):
        return ValueNode(kind=kind, value=_copy(values, values))
    if not _is_plain(values, _MAX_DEPTH):
        return None
    text = json.dumps(plain_json.pack(values, _tag_list), allow_nan=False, separators=(",", ":"))
    return ValueNode(kind=PLAIN_LIST, value=text)


def is_leaf(value: object) -> bool:
    """Returns whether a live value is a long list, which is one leaf."""
    return _is_long_list(value) and _is_plain(value, _MAX_DEPTH)


def is_long(node: object) -> TypeGuard[ValueNode]:
    """Returns whether a node is a long list."""
    return isinstance(node, ValueNode) and (node.kind in NUMBERS or node.kind == PLAIN_LIST)


def value_of(node: ValueNode) -> Any:
    """Returns the list of a node: a new one, which the caller may change.

    Raises:
        CorruptCheckpointError: The text is no list of plain values.
    """
    if node.kind != PLAIN_LIST:
        values = cast("Sequence[object]", node.value)
        return _copy(values, values)
    try:
        found = json.loads(str(node.value))
        is_tagged = plain_json.TYPE in str(node.value)
        if is_tagged:
            found = plain_json.unpack(found, _untag_list)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise errors.CorruptCheckpointError(
            f"Not the text of a list: {str(node.value)!r:.80}: {error}"
        ) from error
    # Without tags a text has JSON's own types only, which are plain.
    if type(found) not in _LISTS or (is_tagged and not _is_plain(found, _MAX_DEPTH)):
        raise errors.CorruptCheckpointError(f"Not a list of plain values: {node.value!r:.80}.")
    return found


def unpacked(node: Node) -> Node:
    """Returns a long list as a container with a leaf for each value; any other node unchanged."""
    return walk.fold(value_of(node), _visit_value) if is_long(node) else node


def with_unpacked(root: Node) -> Node:
    """Returns the structure with a leaf for each value of its long lists."""
    if not any(is_long(leaf) for _, leaf in structure.iter_leaves(root)):
        return root

    def visit(node: Node) -> walk.Visit[Node, Node]:
        if not isinstance(node, BranchNode):
            return walk.leaf(unpacked(node))
        return node.children, lambda built: dataclasses.replace(node, children=tuple(built))

    return walk.fold(root, visit)


def like(saved: ValueNode, target: Any) -> Any:
    """Returns the stored values in the containers of a target of the same shape; None for others.

    Numbers, booleans and None may stand for each other, as single leaves may.
    """
    if not _is_long_list(target):
        return None
    stored = value_of(saved)
    try:
        return _fitted(stored, target)
    except _UnlikeError:
        return None


class _UnlikeError(Exception):
    """A target has other keys, lengths or types than the stored value."""


def _is_long_list(value: object) -> TypeGuard[list[object] | tuple[object, ...]]:
    return type(value) in _LISTS and len(cast("list[object]", value)) >= _LONG


def _fit_64_bits(numbers: Sequence[int]) -> bool:
    return min(numbers) >= -(2**63) and max(numbers) < 2**63


def _copy(values: Sequence[object], kind: object) -> Any:
    """Returns the values in a container like another one."""
    if isinstance(kind, collections.deque):
        return collections.deque(values, cast("collections.deque[object]", kind).maxlen)
    return tuple(values) if isinstance(kind, tuple) else list(values)


def _is_plain(value: object, depth: int) -> bool:
    kind = type(value)
    parts = cast("Sequence[object]", value)
    if depth == 0:
        return False
    if kind is dict:
        entries = cast("dict[object, object]", value)
        if not set(map(type, entries)) <= {str}:
            return False
        parts = entries.values()
    elif kind not in _LISTS:
        return False
    kinds = set(map(type, parts))
    if int in kinds and not all(
        part.bit_length() <= _MAX_INT_BITS for part in parts if type(part) is int
    ):
        return False
    if kinds <= _SCALARS.keys():
        return True
    return all(type(part) in _SCALARS or _is_plain(part, depth - 1) for part in parts)


def _tag_list(value: object) -> tuple[str, Any] | None:
    if type(value) is tuple:
        return "tuple", plain_json.pack(list(cast("tuple[object, ...]", value)), _tag_list)
    if type(value) is collections.deque:
        queue = cast("collections.deque[object]", value)
        return "deque", [queue.maxlen, plain_json.pack(list(queue), _tag_list)]
    return None


def _untag_list(kind: str, payload: Any) -> Any:
    if kind == "tuple":
        return tuple(plain_json.unpack(part, _untag_list) for part in payload)
    if kind == "deque":
        maxlen, values = payload
        return collections.deque(plain_json.unpack(values, _untag_list), maxlen)
    return NotImplemented


def _visit_value(value: Any) -> walk.Visit[Any, Node]:
    if type(value) in _SCALARS:
        return walk.leaf(ValueNode(kind=_SCALARS[type(value)], value=value))
    keys: tuple[Key, ...]
    if type(value) is dict:
        kind, keys, children = "dict", tuple(map(Key, value)), list(value.values())
    else:
        kind, children = type(value).__name__, list(value)
        keys = tuple(Key(index, "index") for index in range(len(children)))
    detail = {"maxlen": value.maxlen} if isinstance(value, collections.deque) else {}
    return children, lambda nodes: BranchNode(
        kind=kind, keys=keys, children=tuple(nodes), detail=detail
    )


def _fitted(stored: Any, target: Any) -> Any:
    """Returns the stored values in the target's containers.

    Raises:
        _UnlikeError: The keys or lengths differ, or a string stands for another type.
    """
    kind = type(target)
    if kind in _LISTS:
        if type(stored) not in _LISTS or len(stored) != len(target):
            raise _UnlikeError
        if _are_alike(stored, target):
            return _copy(stored, target)
        return _copy(list(map(_fitted, stored, target)), target)
    if kind is dict:
        if type(stored) is not dict or stored.keys() != target.keys():
            raise _UnlikeError
        ordered = stored if list(stored) == list(target) else {key: stored[key] for key in target}
        if _are_alike(ordered.values(), target.values()):
            return dict(ordered)
        return {key: _fitted(ordered[key], part) for key, part in target.items()}
    if (
        type(stored) not in _SCALARS
        or kind not in _SCALARS
        or (type(stored) is str) != (kind is str)
    ):
        raise _UnlikeError
    return stored


def _are_alike(stored: Iterable[object], target: Iterable[object]) -> bool:
    """Returns whether all values are scalars: numbers for numbers, strings for strings."""
    found, wanted = list(map(type, stored)), list(map(type, target))
    kinds = {*found, *wanted}
    return kinds <= _SCALARS.keys() and (str not in kinds or found == wanted)
