"""Containers taken apart and put together again: the only user of `torch.utils._pytree`.

`flatten_one_level` and `unflatten_one_level` are the two halves; saving, matching against a target
and rebuilding all go through them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from torch.utils import _pytree

from functional_ckpt import errors
from functional_ckpt.core.tree import composite, plain_json, structure
from functional_ckpt.core.tree import context as context_lib
from functional_ckpt.core.tree.structure import Key

_PLAIN_KEYS = (str, int, bool, float, bytes, type(None))
# Python refuses to print longer integers, and keys are printed: they are part of names.
_MAX_KEY_BITS = 10_000
_FACTORIES: Mapping[str, Callable[[], object]] = MappingProxyType(
    {"list": list, "dict": dict, "int": int, "float": float, "str": str, "bool": bool, "set": set}
)
# Exceptions that foreign code raises for unexpected data.
_UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlatNode:
    """A flattened container: its `BranchNode` fields and its live children."""

    kind: str
    keys: tuple[Key, ...]
    children: tuple[Any, ...]
    detail: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def node(self, children: Sequence[structure.Node] = ()) -> structure.BranchNode:
        """Returns the node of this container, with the children's nodes."""
        return structure.BranchNode(
            kind=self.kind, keys=self.keys, children=tuple(children), detail=self.detail
        )


# ------------------------------------------------------------------------------------ opening


def flatten_one_level(value: object) -> FlatNode | None:
    """Takes a container or a tensor made of parts apart; None when `value` is a leaf.

    Raises:
        UnsupportedLeafError: A container that could not be built again.
    """
    if isinstance(value, torch.Tensor):
        return _open_tensor(value)
    kind = type(value)
    if kind is dict:
        return _open_mapping("dict", value)
    if kind is collections.OrderedDict or kind is collections.Counter:
        name = "counter" if kind is collections.Counter else "ordered_dict"
        return _open_mapping(name, value, _attributes(value))
    if kind is structure.Handled:
        return FlatNode(
            kind="handled",
            keys=(Key(structure.HANDLER),),
            children=(cast("structure.Handled", value).tree,),
        )
    if kind is structure.Described:
        return _open_mapping("dict", value, cast("structure.Described", value).detail)
    if kind is collections.defaultdict:
        factory = cast("collections.defaultdict[Any, Any]", value).default_factory
        name = getattr(factory, "__name__", None)
        if factory is not None and _FACTORIES.get(str(name)) is not factory:
            raise errors.UnsupportedLeafError(
                f"defaultdict with the factory {factory!r} cannot be built again; pass dict(value)"
            )
        return _open_mapping("default_dict", value, {"factory": name})
    if kind is list or kind is tuple or kind is torch.Size:
        name = "torch_size" if kind is torch.Size else kind.__name__
        return _open_sequence(name, cast("Sequence[Any]", value))
    if kind is structure.MergedNames:
        return _open_sequence("list", cast("Sequence[Any]", value), {structure.MERGED: True})
    if kind is collections.deque:
        queue = cast("collections.deque[Any]", value)
        return _open_sequence("deque", queue, {"maxlen": queue.maxlen})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _open_named_tuple(value)
    return _open_registered(value)


def _open_tensor(tensor: torch.Tensor) -> FlatNode | None:
    opened = composite.open_tensor(tensor)
    if opened is None:
        return None
    kind, children, detail = opened
    keys = tuple(Key(name) for name in children)
    return FlatNode(kind=kind, keys=keys, children=tuple(children.values()), detail=detail)


def _open_mapping(kind: str, value: Any, detail: Mapping[str, object] | None = None) -> FlatNode:
    mapping = cast("Mapping[Any, Any]", value)
    for key in mapping:
        _check_key(key)
    return FlatNode(
        kind=kind,
        keys=tuple(Key(key) for key in mapping),
        children=tuple(mapping.values()),
        detail=detail or {},
    )


def _attributes(value: object) -> dict[str, object]:
    """Attributes of a dict, such as `_metadata` of a module's state dict."""
    attributes = vars(value)
    if not attributes:
        return {}
    if not (plain_json.is_plain(attributes) or context_lib.is_storable(attributes)):
        raise errors.UnsupportedLeafError(
            f"{type(value).__name__} has attributes that are not plain data ({attributes!r:.80}) "
            f"and would be lost; pass {type(value).__name__}(value), which has none"
        )
    return {"attributes": context_lib.tag(attributes)}


def _check_key(key: object) -> None:
    if type(key) is int and key.bit_length() > _MAX_KEY_BITS:
        raise errors.UnsupportedLeafError(f"a dict key of {key.bit_length()} bits is too long")
    if type(key) in _PLAIN_KEYS:
        return
    if type(key) is tuple and plain_json.is_plain(key):
        for part in cast("tuple[object, ...]", key):
            _check_key(part)
        return
    raise errors.UnsupportedLeafError(
        f"dict key {key!r:.80} of type {type(key).__name__} cannot be stored; "
        "keys may be str, int, bool, float, bytes, None or tuples of these"
    )


def _open_sequence(
    kind: str, value: Iterable[Any], detail: Mapping[str, object] | None = None
) -> FlatNode:
    children = tuple(value)
    keys = tuple(Key(index, "index") for index in range(len(children)))
    return FlatNode(kind=kind, keys=keys, children=children, detail=detail or {})


def _open_named_tuple(value: tuple[Any, ...]) -> FlatNode:
    fields = cast("tuple[str, ...]", value._fields)  # pyright: ignore[reportAttributeAccessIssue]
    return FlatNode(
        kind="named_tuple",
        keys=tuple(Key(field) for field in fields),
        children=tuple(value),
        detail={"type": type(value).__name__},
    )


def _open_registered(value: object) -> FlatNode | None:
    definition = _pytree.SUPPORTED_NODES.get(type(value))
    if definition is None:
        return None
    flat, context = definition.flatten_fn(value)
    children = tuple(flat)
    keys = tuple(Key(index, "index") for index in range(len(children)))
    if definition.flatten_with_keys_fn is not None:
        # For the keys alone: the context that comes with them is not always the one that
        # unflatten_fn takes (torch's own register_dataclass is a case in point).
        pairs, _ = definition.flatten_with_keys_fn(value)
        keys = tuple(_entry_key(entry, index) for index, (entry, _) in enumerate(pairs))
    detail: dict[str, object] = {"type": _registered_name(type(value))}
    if context_lib.is_storable(context):
        detail["context"] = context_lib.tag(context)
    return FlatNode(kind="registered", keys=keys, children=children, detail=detail)


def _entry_key(entry: object, index: int) -> Key:
    if isinstance(entry, _pytree.SequenceKey):
        return Key(entry.idx, "index")
    if isinstance(entry, _pytree.MappingKey):
        _check_key(entry.key)
        return Key(entry.key)
    if isinstance(entry, _pytree.GetAttrKey):
        return Key(entry.name)
    return Key(index, "index")


def _registered_name(kind: type) -> str:
    """Returns the stored name of a registered node type; restores look it up, without an import."""
    serialized = _pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    name = serialized.serialized_type_name if serialized is not None else None
    if name in (None, _pytree.NO_SERIALIZED_TYPE_NAME_FOUND):
        return f"{kind.__module__}.{kind.__qualname__}"
    return str(name)


# ------------------------------------------------------------------------------------ closing


def unflatten_one_level(
    node: structure.BranchNode, children: Sequence[Any], like: object = None
) -> Any:
    """Builds a container again; the opposite of `flatten_one_level`.

    Args:
        node: The stored node.
        children: The restored children, one per key.
        like: A container of the wanted type, whose own type and context win over the stored ones;
            None to build the saved type. A registered or named-tuple type that this process does
            not know comes back as a dict of its fields and a fresh named tuple; the tree of a
            handler, as a `Handled`.

    Raises:
        CorruptCheckpointError: The stored parts do not make up the container.
    """
    if like is not None and not isinstance(like, torch.Tensor):
        return _close_like(node, children, like)
    if structure.HANDLER in node.detail:
        tree = unflatten_one_level(structure.without(node, structure.HANDLER), children)
        return structure.Handled(tree, node.detail)
    if structure.BARE in node.detail:
        return children[0]
    try:
        if node.kind in composite.KINDS:
            return composite.build_tensor(node, children, like)
        return _BUILDERS[node.kind](node, children)
    except _UNFIT as error:
        raise errors.CorruptCheckpointError(
            f"Cannot rebuild a stored {node.kind!r:.80}: {type(error).__name__}: {error}"
        ) from error


def _close_like(node: structure.BranchNode, children: Sequence[Any], like: object) -> Any:
    kind: Any = type(like)
    if isinstance(like, structure.Handled):
        return dataclasses.replace(like, tree=children[0])
    if isinstance(like, structure.Described):
        return structure.Described(_build_mapping(node, children), like.detail)
    if isinstance(like, dict):
        pairs = zip([key.value for key in node.keys], children, strict=True)
        if isinstance(like, collections.defaultdict):
            return collections.defaultdict(like.default_factory, pairs)
        if isinstance(like, collections.Counter):
            pairs = dict(pairs)  # a Counter of pairs would count the pairs
        return _with_attributes(kind(pairs), getattr(like, "__dict__", {}))
    if isinstance(like, tuple) and hasattr(like, "_fields"):
        return kind(*children)
    if isinstance(like, collections.deque):
        return collections.deque(children, like.maxlen)
    if isinstance(like, (list, tuple)):
        return kind(children)
    definition = _pytree.SUPPORTED_NODES[kind]
    _, context = definition.flatten_fn(like)
    return definition.unflatten_fn(list(children), context)


def _build_mapping(node: structure.BranchNode, children: Sequence[Any]) -> Any:
    pairs = zip([key.value for key in node.keys], children, strict=True)
    attributes = context_lib.untag(node.detail["attributes"]) if "attributes" in node.detail else {}
    if node.kind == "ordered_dict":
        return _with_attributes(collections.OrderedDict(pairs), attributes)
    if node.kind == "counter":
        return _with_attributes(collections.Counter(dict(pairs)), attributes)
    if node.kind == "default_dict":
        return collections.defaultdict(_FACTORIES.get(str(node.detail.get("factory"))), pairs)
    return dict(pairs)


def _with_attributes(value: Any, attributes: Mapping[str, Any]) -> Any:
    if attributes:
        vars(value).update(attributes)
    return value


def _build_sequence(node: structure.BranchNode, children: Sequence[Any]) -> Any:
    if node.kind == "deque":
        return collections.deque(children, cast("int | None", node.detail.get("maxlen")))
    kinds: dict[str, type] = {"list": list, "tuple": tuple, "torch_size": torch.Size}
    return kinds[node.kind](children)


def _build_named_tuple(node: structure.BranchNode, children: Sequence[Any]) -> Any:
    make: Any = collections.namedtuple  # its fields are data here
    return make(str(node.detail["type"]), [str(key.value) for key in node.keys])(*children)


def _build_registered(node: structure.BranchNode, children: Sequence[Any]) -> Any:
    for kind, definition in _pytree.SUPPORTED_NODES.items():
        if _registered_name(kind) == node.detail["type"] and "context" in node.detail:
            context = context_lib.untag(node.detail["context"])
            return definition.unflatten_fn(list(children), context)
    return dict(zip([key.value for key in node.keys], children, strict=True))


_BUILDERS: Mapping[str, Callable[[structure.BranchNode, Sequence[Any]], Any]] = MappingProxyType(
    {
        **dict.fromkeys(("dict", "ordered_dict", "default_dict", "counter"), _build_mapping),
        **dict.fromkeys(("list", "tuple", "torch_size", "deque"), _build_sequence),
        "named_tuple": _build_named_tuple,
        "registered": _build_registered,
    }
)


# ------------------------------------------------------------------------------------ records


def register_record(kind: type) -> None:
    """Registers a frozen dataclass as a node: its first field is the child, the others the context.

    It is rebuilt without its `__init__`: `tree_map` may replace the child by any value.
    """
    child, *options = (field.name for field in dataclasses.fields(kind))

    def flatten(record: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(record, child)], tuple(getattr(record, name) for name in options)

    def unflatten(children: Iterable[Any], context: Iterable[Any]) -> Any:
        record = object.__new__(kind)
        for name, value in zip((child, *options), (*children, *context), strict=True):
            object.__setattr__(record, name, value)
        return record

    def flatten_with_keys(record: Any) -> tuple[list[Any], tuple[Any, ...]]:
        (value,), context = flatten(record)
        return [(_pytree.GetAttrKey(child), value)], context

    _pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


def overlay(
    given: Any, other: Any, is_leaf: Callable[[Any], bool], combine: Callable[[Any, Any], Any]
) -> Any:
    """Returns `other` with `combine(leaf, part)` for every part where `given` has such a leaf."""
    leaves, spec = _pytree.tree_flatten(given, is_leaf=is_leaf)
    if not any(map(is_leaf, leaves)):
        return other
    parts = zip(leaves, spec.flatten_up_to(other), strict=True)
    combined = [combine(leaf, part) if is_leaf(leaf) else part for leaf, part in parts]
    return _pytree.tree_unflatten(combined, spec)


def is_equal(one: Any, other: Any) -> bool:
    """Returns whether two pytrees are equal; tensors and arrays by dtype, shape and content."""
    if one is other:
        return True
    (left, spec), (right, other_spec) = _pytree.tree_flatten(one), _pytree.tree_flatten(other)
    return spec == other_spec and all(map(_is_equal_leaf, left, right))


def _is_equal_leaf(one: Any, other: Any) -> bool:
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)
