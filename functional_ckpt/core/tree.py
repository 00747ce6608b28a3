"""Pytrees to structures and back: the only user of `torch.utils._pytree`.

Containers are opened by one function (`open_container`) and closed by one (`close_container`);
saving, matching against a target and rebuilding all go through these two.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch.utils import _pytree

from functional_ckpt import errors
from functional_ckpt.core import leaves, structure
from functional_ckpt.core.structure import Key, KeyPath

__all__ = [
    "ROOT_NAME",
    "FlatTree",
    "Opened",
    "close_container",
    "flatten",
    "leaf_name",
    "map_leaves",
    "open_container",
]

# The name of an item that is one bare leaf.
ROOT_NAME = "value"

_PLAIN_KEYS = (str, int, bool, float, bytes, type(None))
_FACTORIES: Mapping[str, Callable[[], object]] = MappingProxyType(
    {"list": list, "dict": dict, "int": int, "float": float, "str": str, "bool": bool, "set": set}
)
_COMPRESSED = {
    torch.sparse_csr: ("sparse_csr", "crow_indices", "col_indices"),
    torch.sparse_csc: ("sparse_csc", "ccol_indices", "row_indices"),
    torch.sparse_bsr: ("sparse_bsr", "crow_indices", "col_indices"),
    torch.sparse_bsc: ("sparse_bsc", "ccol_indices", "row_indices"),
}
_COMPRESSED_LAYOUTS = {names[0]: layout for layout, names in _COMPRESSED.items()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A container taken apart: what a `BranchNode` says of it, and its live children."""

    kind: str
    keys: tuple[Key, ...]
    children: tuple[Any, ...]
    detail: Mapping[str, object] = dataclasses.field(default_factory=dict)


def leaf_name(path: KeyPath) -> str:
    """The name on disk of the leaf at `path`."""
    return structure.join(path) if path else ROOT_NAME


# ------------------------------------------------------------------------------------ opening


def open_container(value: object) -> Opened | None:
    """Takes a container or a tensor made of parts apart; None when `value` is a leaf.

    Raises:
        UnsupportedLeafError: A container that could not be built again.
    """
    if isinstance(value, torch.Tensor):
        return _open_tensor(value)
    kind = type(value)
    if kind is dict or kind is collections.OrderedDict:
        return _open_mapping("dict" if kind is dict else "ordered_dict", value)
    if kind is collections.Counter:
        return _open_mapping("counter", value)
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
    if kind is collections.deque:
        queue = cast("collections.deque[Any]", value)
        return _open_sequence("deque", queue, {"maxlen": queue.maxlen})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _open_named_tuple(value)
    return _open_registered(value)


def _open_mapping(kind: str, value: Any, detail: Mapping[str, object] | None = None) -> Opened:
    mapping = cast("Mapping[Any, Any]", value)
    for key in mapping:
        _check_key(key)
    return Opened(
        kind=kind,
        keys=tuple(Key(key) for key in mapping),
        children=tuple(mapping.values()),
        detail=detail or {},
    )


def _check_key(key: object) -> None:
    if type(key) in _PLAIN_KEYS:
        return
    if type(key) is tuple:
        for part in cast("tuple[object, ...]", key):
            _check_key(part)
        return
    raise errors.UnsupportedLeafError(
        f"dict key {key!r} of type {type(key).__name__} cannot be stored; "
        "keys may be str, int, bool, float, bytes, None or tuples of these"
    )


def _open_sequence(
    kind: str, value: Iterable[Any], detail: Mapping[str, object] | None = None
) -> Opened:
    children = tuple(value)
    keys = tuple(Key(index, "index") for index in range(len(children)))
    return Opened(kind=kind, keys=keys, children=children, detail=detail or {})


def _open_named_tuple(value: tuple[Any, ...]) -> Opened:
    fields = cast("tuple[str, ...]", value._fields)  # pyright: ignore[reportAttributeAccessIssue]
    return Opened(
        kind="named_tuple",
        keys=tuple(Key(field) for field in fields),
        children=tuple(value),
        detail={"type": type(value).__name__},
    )


def _open_registered(value: object) -> Opened | None:
    definition = _pytree.SUPPORTED_NODES.get(type(value))
    if definition is None:
        return None
    if definition.flatten_with_keys_fn is not None:
        pairs, context = definition.flatten_with_keys_fn(value)
        entries = [(_entry_key(entry, index), child) for index, (entry, child) in enumerate(pairs)]
    else:
        children, context = definition.flatten_fn(value)
        entries = [(Key(index, "index"), child) for index, child in enumerate(children)]
    detail: dict[str, object] = {"type": registered_name(type(value))}
    if _is_json(context):
        detail["context"] = context
    return Opened(
        kind="registered",
        keys=tuple(key for key, _ in entries),
        children=tuple(child for _, child in entries),
        detail=detail,
    )


def _entry_key(entry: object, index: int) -> Key:
    if isinstance(entry, _pytree.SequenceKey):
        return Key(entry.idx, "index")
    if isinstance(entry, _pytree.MappingKey):
        _check_key(entry.key)
        return Key(entry.key)
    if isinstance(entry, _pytree.GetAttrKey):
        return Key(entry.name)
    return Key(index, "index")


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, cast("list[object]", value)))
    if isinstance(value, dict):
        items = cast("dict[object, object]", value).items()
        return all(type(key) is str and _is_json(item) for key, item in items)
    return value is None or type(value) in (bool, int, float, str)


def registered_name(kind: type) -> str:
    """The identifier a registered node type is stored under; it is looked up at restore, never imported."""
    serialized = _pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    name = serialized.serialized_type_name if serialized is not None else None
    if name in (None, _pytree.NO_SERIALIZED_TYPE_NAME_FOUND):
        return f"{kind.__module__}.{kind.__qualname__}"
    return str(name)


def _open_tensor(tensor: torch.Tensor) -> Opened | None:
    if tensor.is_meta:
        raise errors.UnsupportedLeafError(
            "a meta tensor has a shape but no data; materialise it first (module.to_empty(device=...) and "
            "its initialisation), or restore into it instead"
        )
    if tensor.is_quantized:
        return _open_quantized(tensor)
    if tensor.layout == torch.sparse_coo:
        parts = {"indices": tensor.detach()._indices(), "values": tensor.detach()._values()}
        detail = {"shape": list(tensor.shape), "coalesced": tensor.is_coalesced()}
        return _parts("sparse_coo", parts, detail)
    if tensor.layout in _COMPRESSED:
        kind, *index_names = _COMPRESSED[tensor.layout]
        plain = tensor.detach()
        parts = {name: getattr(plain, name)() for name in index_names}
        return _parts(kind, {**parts, "values": plain.values()}, {"shape": list(tensor.shape)})
    if tensor.layout != torch.strided:
        raise errors.UnsupportedLeafError(f"tensors of layout {tensor.layout} cannot be stored")
    if hasattr(tensor, "__tensor_flatten__"):
        return _open_subclass(tensor)
    return None


def _parts(kind: str, parts: Mapping[str, object], detail: Mapping[str, object]) -> Opened:
    keys = tuple(Key(name) for name in parts)
    return Opened(kind=kind, keys=keys, children=tuple(parts.values()), detail=detail)


def _open_quantized(tensor: torch.Tensor) -> Opened:
    if tensor.dtype not in (torch.qint8, torch.quint8, torch.qint32):
        raise errors.UnsupportedLeafError(f"quantized dtype {tensor.dtype} cannot be stored")
    parts: dict[str, object] = {"int_repr": tensor.int_repr()}
    if tensor.qscheme() == torch.per_tensor_affine:
        parts |= {"scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
        return _parts("quantized", parts, {})
    parts |= {
        "scales": tensor.q_per_channel_scales(),
        "zero_points": tensor.q_per_channel_zero_points(),
    }
    return _parts("quantized", parts, {"axis": tensor.q_per_channel_axis()})


def _open_subclass(tensor: Any) -> Opened:
    names, context = tensor.__tensor_flatten__()
    if not _is_json(context):
        raise errors.UnsupportedLeafError(
            f"tensor subclass {type(tensor).__name__} has a context that is not plain data ({context!r}); "
            "register a handler for it (registry.with_handler)"
        )
    return _parts(
        "subclass",
        {name: getattr(tensor, name) for name in names},
        {
            "type": type(tensor).__name__,
            "context": context,
            "shape": list(tensor.shape),
            "strides": list(tensor.stride()),
        },
    )


# ------------------------------------------------------------------------------------ closing


def close_container(
    node: structure.BranchNode, children: Sequence[Any], like: object = None
) -> Any:
    """Builds a container again; the opposite of `open_container`.

    Args:
        node: What was stored.
        children: The restored children, one per key.
        like: A container of the wanted type, whose own type and context win over the stored ones;
            None to build what was saved. A registered or named-tuple type that this process does
            not know comes back as a dict of its fields and a fresh named tuple.
    """
    if like is not None and not isinstance(like, torch.Tensor):
        return _close_like(node, children, like)
    builder = _BUILDERS.get(node.kind)
    if builder is None:
        raise errors.CorruptCheckpointError(f"Unknown kind of container {node.kind!r}.")
    return (
        builder(node, children)
        if node.kind != "subclass"
        else _build_subclass(node, children, like)
    )


def _close_like(node: structure.BranchNode, children: Sequence[Any], like: object) -> Any:
    kind = type(like)
    if isinstance(like, dict):
        pairs = zip([key.value for key in node.keys], children, strict=True)
        if isinstance(like, collections.defaultdict):
            return collections.defaultdict(like.default_factory, pairs)
        if isinstance(like, collections.Counter):
            return kind(dict(pairs))  # a Counter of pairs would count the pairs
        return kind(pairs)
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
    if node.kind == "ordered_dict":
        return collections.OrderedDict(pairs)
    if node.kind == "counter":
        return collections.Counter(dict(pairs))
    if node.kind == "default_dict":
        return collections.defaultdict(_FACTORIES.get(str(node.detail.get("factory"))), pairs)
    return dict(pairs)


def _build_sequence(node: structure.BranchNode, children: Sequence[Any]) -> Any:
    if node.kind == "deque":
        return collections.deque(children, cast("int | None", node.detail.get("maxlen")))
    kinds: dict[str, type] = {"list": list, "tuple": tuple, "torch_size": torch.Size}
    return kinds[node.kind](children)


def _build_named_tuple(node: structure.BranchNode, children: Sequence[Any]) -> Any:
    fields = [str(key.value) for key in node.keys]
    return collections.namedtuple(str(node.detail["type"]), fields, rename=True)(*children)


def _build_registered(node: structure.BranchNode, children: Sequence[Any]) -> Any:
    for kind, definition in _pytree.SUPPORTED_NODES.items():
        if registered_name(kind) == node.detail["type"] and "context" in node.detail:
            return definition.unflatten_fn(list(children), node.detail["context"])
    return dict(zip([key.value for key in node.keys], children, strict=True))


def _build_sparse(node: structure.BranchNode, children: Sequence[Any]) -> torch.Tensor:
    shape = cast("list[int]", node.detail["shape"])
    if node.kind == "sparse_coo":
        indices, values = children
        return torch.sparse_coo_tensor(
            indices,
            values,
            shape,
            is_coalesced=bool(node.detail["coalesced"]),
            check_invariants=True,
        )
    compressed, plain, values = children
    return torch.sparse_compressed_tensor(
        compressed,
        plain,
        values,
        shape,
        layout=_COMPRESSED_LAYOUTS[node.kind],
        check_invariants=True,
    )


def _build_quantized(node: structure.BranchNode, children: Sequence[Any]) -> torch.Tensor:
    if "axis" in node.detail:
        return torch._make_per_channel_quantized_tensor(*children, node.detail["axis"])
    return torch._make_per_tensor_quantized_tensor(*children)


def _build_subclass(node: structure.BranchNode, children: Sequence[Any], like: object) -> Any:
    inner = {str(key.value): child for key, child in zip(node.keys, children, strict=True)}
    if not hasattr(like, "__tensor_unflatten__"):
        return inner  # the class is not named on disk; without a target its parts are what there is
    detail = node.detail
    return cast("Any", type(like)).__tensor_unflatten__(
        inner,
        detail["context"],
        torch.Size(cast("list[int]", detail["shape"])),
        tuple(cast("list[int]", detail["strides"])),
    )


_BUILDERS: Mapping[str, Callable[[structure.BranchNode, Sequence[Any]], Any]] = MappingProxyType(
    {
        **dict.fromkeys(("dict", "ordered_dict", "default_dict", "counter"), _build_mapping),
        **dict.fromkeys(("list", "tuple", "torch_size", "deque"), _build_sequence),
        "named_tuple": _build_named_tuple,
        "registered": _build_registered,
        **dict.fromkeys(("sparse_coo", *_COMPRESSED_LAYOUTS), _build_sparse),
        "quantized": _build_quantized,
        "subclass": _build_sequence,
    }
)


# ------------------------------------------------------------------------------------ whole trees


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlatTree:
    """A value taken apart for saving.

    Attributes:
        root: The structure, with every array named.
        arrays: For each array that holds its own bytes: its name, node and live value, in tree
            order.
    """

    root: structure.Node
    arrays: tuple[tuple[structure.ArrayNode, object], ...]


def flatten(value: object, *, item: str = "") -> FlatTree:
    """Takes a value apart into a structure and the arrays it holds; copies nothing.

    Args:
        value: Any pytree.
        item: The item's name, for messages.

    Raises:
        UnsupportedLeafError: Naming every leaf that cannot be carried and the ways out.
        NameCollisionError: Two leaves would share one name on disk.
    """
    state = _Flattening(item)
    root = state.node(value, ())
    state.raise_problems()
    return FlatTree(root=root, arrays=tuple(state.arrays))


class _Flattening:
    """The mutable state of one `flatten` call."""

    def __init__(self, item: str) -> None:
        self.item = item
        self.arrays: list[tuple[structure.ArrayNode, object]] = []
        self.problems: list[tuple[str, str]] = []
        self.paths: dict[str, KeyPath] = {}
        self.owners: dict[Any, str] = {}
        self.containers: set[int] = set()

    def node(self, value: object, path: KeyPath) -> structure.Node:
        try:
            if (plain := leaves.value_node(value)) is not None:
                return self._leaf(plain, path)
            if (opened := open_container(value)) is not None:
                return self._branch(value, opened, path)
            if (array := leaves.array_node(value, leaf_name(path))) is not None:
                return self._array(array, value, path)
        except errors.UnsupportedLeafError as error:
            return self._problem(path, error.message)
        return self._problem(path, _why_unsupported(value))

    def _leaf(self, node: Any, path: KeyPath) -> Any:
        name = leaf_name(path)
        if (other := self.paths.setdefault(structure.key_prefix(name), path)) is not path:
            raise errors.NameCollisionError(
                f"{structure.pretty(other, self.item)} and {structure.pretty(path, self.item)} would both be "
                f"stored as {name!r}; rename one of the keys.",
                key_path=structure.pretty(path, self.item),
            )
        return node

    def _branch(self, value: object, opened: Opened, path: KeyPath) -> structure.BranchNode:
        if id(value) in self.containers:
            raise errors.UnsupportedLeafError("the container contains itself")
        self.containers.add(id(value))
        if not opened.children:
            self._leaf(None, path)
        children = tuple(
            self.node(child, (*path, key))
            for key, child in zip(opened.keys, opened.children, strict=True)
        )
        self.containers.discard(id(value))
        return structure.BranchNode(
            kind=opened.kind, keys=opened.keys, children=children, detail=opened.detail
        )

    def _array(
        self, node: structure.ArrayNode, value: object, path: KeyPath
    ) -> structure.ArrayNode:
        _check_name(node.name)
        self._leaf(node, path)
        key = leaves.identity(value)
        if key is not None and (owner := self.owners.setdefault(key, node.name)) != node.name:
            return dataclasses.replace(node, tied_to=owner)
        self.arrays.append((node, value))
        return node

    def _problem(self, path: KeyPath, why: str) -> structure.Node:
        self.problems.append((structure.pretty(path, self.item), why))
        return structure.ValueNode(kind="none", value=None)

    def raise_problems(self) -> None:
        if not self.problems:
            return
        lines = [f"  {where or 'the value'}: {why}" for where, why in self.problems]
        plural = "leaf" if len(lines) == 1 else "leaves"
        raise errors.UnsupportedLeafError(
            f"{len(lines)} {plural} cannot be saved:\n" + "\n".join(lines),
            key_path=self.problems[0][0],
        )


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise errors.UnsupportedLeafError(
            f"the key path {name!r} is not valid Unicode (lone surrogate); rename the key"
        ) from None


def _why_unsupported(value: object) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, torch.nn.Module) or hasattr(value, "state_dict"):
        return f"{kind} is a stateful object; give it as an item of its own, not inside a pytree"
    if isinstance(value, (set, frozenset)):
        return f"{kind} has no order; pass sorted(value) as a list"
    if callable(value):
        return f"{kind} is code, and code is never stored; leave it out and build it again after restore"
    return (
        f"{kind} is not a tensor, array, plain value or container; convert it, register its class as a pytree "
        "node (torch.utils._pytree), or register a handler (registry.with_handler)"
    )


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """A copy of the pytree with `function` applied to every leaf (None and plain values included)."""
    opened = None if isinstance(value, torch.Tensor) else open_container(value)
    if opened is None:
        return function(value)
    node = structure.BranchNode(
        kind=opened.kind, keys=opened.keys, children=(), detail=opened.detail
    )
    children = [map_leaves(function, child) for child in opened.children]
    return close_container(node, children, value)
