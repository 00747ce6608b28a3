"""Tensors made of parts: sparse, quantized, and subclasses with `__tensor_flatten__`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.tree import context as context_lib
from functional_ckpt.core.tree import decode, encode, memory, structure

Parts: TypeAlias = tuple[str, Mapping[str, Any], Mapping[str, object]]
"""Kind, parts by name, detail."""

_COMPRESSED = {
    torch.sparse_csr: ("sparse_csr", "crow_indices", "col_indices"),
    torch.sparse_csc: ("sparse_csc", "ccol_indices", "row_indices"),
    torch.sparse_bsr: ("sparse_bsr", "crow_indices", "col_indices"),
    torch.sparse_bsc: ("sparse_bsc", "ccol_indices", "row_indices"),
}
_LAYOUTS = {names[0]: layout for layout, names in _COMPRESSED.items()}
_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32)


def open_tensor(tensor: torch.Tensor) -> Parts | None:
    """Takes a tensor apart; None when it is one array.

    Raises:
        UnsupportedLeafError: It has no data, or parts that could not be put together again.
    """
    if memory.is_opaque(tensor):
        raise errors.UnsupportedLeafError(why_opaque(tensor))
    if tensor.is_meta:
        raise errors.UnsupportedLeafError(
            "a meta tensor has a shape but no data; materialise it first "
            "(module.to_empty(device=...) and its initialisation), or restore into it instead"
        )
    if sharding.sharding_of(tensor) is not None:
        return None  # one global array, of which this rank holds a part
    if tensor.is_quantized:
        kind, parts, detail = _open_quantized(tensor)
    elif tensor.layout == torch.sparse_coo:
        plain = tensor.detach()
        parts = {"indices": plain._indices(), "values": plain._values()}
        kind, detail = "sparse_coo", {"coalesced": plain.is_coalesced()}
    elif tensor.layout in _COMPRESSED:
        kind, *index_names = _COMPRESSED[tensor.layout]
        plain = tensor.detach()
        parts = {name: getattr(plain, name)() for name in index_names}
        parts["values"], detail = plain.values(), {}
    elif hasattr(tensor, "__tensor_flatten__"):
        kind, parts, detail = _open_subclass(tensor)
    elif tensor.layout != torch.strided:
        raise errors.UnsupportedLeafError(f"tensors of layout {tensor.layout} cannot be stored")
    else:
        return None
    # A jagged dim has a size that is a symbol, not a number; the parts know it.
    sizes = [size if type(size) is int else None for size in tensor.shape]
    return kind, parts, {"shape": sizes, **detail, **encode.tensor_role(tensor)}


def why_opaque(tensor: torch.Tensor) -> str:
    """Why a wrapper that cannot be taken apart is no leaf; see `memory.is_opaque`."""
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if memory.is_fake(tensor):
        return f"{kind} has no values; create it outside of FakeTensorMode"
    return (
        f"{kind} is a tensor subclass without memory of its own and without __tensor_flatten__; "
        "pass the plain tensors inside it"
    )


def _open_quantized(tensor: torch.Tensor) -> Parts:
    if tensor.dtype not in _QUANTIZED:
        raise errors.UnsupportedLeafError(
            f"quantized dtype {tensor.dtype} cannot be stored; convert it with dequantize()"
        )
    parts: dict[str, object] = {"int_repr": tensor.int_repr()}
    if tensor.qscheme() == torch.per_tensor_affine:
        parts |= {"scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
        return "quantized", parts, {}
    parts |= {
        "scales": tensor.q_per_channel_scales(),
        "zero_points": tensor.q_per_channel_zero_points(),
    }
    return "quantized", parts, {"axis": tensor.q_per_channel_axis()}


def _open_subclass(tensor: Any) -> Parts:
    names, context = tensor.__tensor_flatten__()
    if not context_lib.is_storable(context):
        raise errors.UnsupportedLeafError(
            f"tensor subclass {type(tensor).__name__} has a context that is not plain data "
            f"({context!r:.80}); register a handler for its class: pass registry=fc.handlers."
            f"default_registry().with_handler({type(tensor).__name__}, handler) to save and to "
            "restore"
        )
    strides = [stride if type(stride) is int else None for stride in tensor.stride()]
    parts = {name: getattr(tensor, name) for name in names}
    detail = {"class": class_name(type(tensor)), "context": context_lib.tag(context)}
    return "subclass", parts, {**detail, "strides": strides}


def class_name(kind: type) -> str:
    """Returns the stored name of a tensor's class; it is looked up at restore, never imported."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_known(node: structure.BranchNode) -> bool:
    """Returns whether this process has loaded the class of a stored tensor subclass."""
    return _known_class(node) is not None


def _known_class(node: structure.BranchNode) -> type | None:
    name, todo = node.detail.get("class"), [torch.Tensor]
    while todo:
        kind = todo.pop()
        if hasattr(kind, "__tensor_unflatten__") and class_name(kind) == name:
            return kind
        todo.extend(kind.__subclasses__())
    return None


# ------------------------------------------------------------------------------------ building


def build_tensor(node: structure.BranchNode, children: Sequence[Any], like: object = None) -> Any:
    """Puts a tensor together again; the opposite of `open_tensor`.

    Args:
        node: The stored node.
        children: Its parts.
        like: A tensor of the subclass wanted; None for the class that was stored. The parts of a
            subclass that this process does not know come back as a dict.
    """
    with warnings.catch_warnings():
        # That compressed tensors are in beta and quantized ones deprecated was said when they were
        # made; under `-W error` saying it again would keep a program from its own checkpoint.
        warnings.simplefilter("ignore")
        built = _BUILDERS[node.kind](node, children, like)
    return (
        decode.apply_tensor_role(built, node.detail) if isinstance(built, torch.Tensor) else built
    )


def _shape(node: structure.BranchNode) -> list[int]:
    return cast("list[int]", node.detail["shape"])


def _build_coo(node: structure.BranchNode, children: Sequence[Any], like: object) -> torch.Tensor:
    indices, values = children
    return torch.sparse_coo_tensor(
        indices,
        values,
        _shape(node),
        is_coalesced=bool(node.detail["coalesced"]),
        check_invariants=True,
        device=values.device,
    )


def _build_compressed(
    node: structure.BranchNode, children: Sequence[Any], like: object
) -> torch.Tensor:
    compressed, plain, values = children
    return torch.sparse_compressed_tensor(
        compressed,
        plain,
        values,
        _shape(node),
        layout=_LAYOUTS[node.kind],
        check_invariants=True,
        device=values.device,
    )


def _build_quantized(
    node: structure.BranchNode, children: Sequence[Any], like: object
) -> torch.Tensor:
    # No public function makes a quantized tensor out of the integers it holds.
    library: Any = torch
    if "axis" in node.detail:
        return library._make_per_channel_quantized_tensor(*children, node.detail["axis"])
    return library._make_per_tensor_quantized_tensor(*children)


def _build_subclass(node: structure.BranchNode, children: Sequence[Any], like: object) -> Any:
    parts = {str(key.value): child for key, child in zip(node.keys, children, strict=True)}
    kind: Any = type(like) if hasattr(like, "__tensor_unflatten__") else _known_class(node)
    if kind is None:
        return parts
    context = context_lib.untag(node.detail["context"])
    sizes = torch.Size(size or 0 for size in cast("list[int | None]", node.detail["shape"]))
    strides = tuple(stride or 0 for stride in cast("list[int | None]", node.detail["strides"]))
    return kind.__tensor_unflatten__(parts, context, sizes, strides)


_Builder: TypeAlias = Callable[[structure.BranchNode, Sequence[Any], object], Any]
_BUILDERS: Mapping[str, _Builder] = MappingProxyType(
    {
        "sparse_coo": _build_coo,
        **dict.fromkeys(_LAYOUTS, _build_compressed),
        "quantized": _build_quantized,
        "subclass": _build_subclass,
    }
)

KINDS = frozenset(_BUILDERS)
"""Every kind of branch that is one tensor."""
