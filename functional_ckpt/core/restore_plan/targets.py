"""Questions about one value of a target: its own value, its dtype, its text in messages."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeGuard

import torch

from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.restore_plan.plan import Binding, Build, Given
from functional_ckpt.core.tree import composite, encode, flatten, memory, structure
from functional_ckpt.core.tree.placeholders import AS_SAVED, NOTHING, Fill, Refused
from functional_ckpt.core.tree.structure import KeyPath


def own_value(target: Any) -> Any:
    """Returns the value that a target keeps if the checkpoint has none."""
    return flatten.map_leaves(_own_leaf, target)


def _own_leaf(target: Any) -> Any:
    if isinstance(target, Fill):
        return target.tensor
    if isinstance(target, Refused):
        return target.own
    if isinstance(target, structure.Handled):
        return dataclasses.replace(target, is_kept=True)
    return None if target is AS_SAVED else target


def why_wrong(tensor: torch.Tensor) -> str | None:
    """Why nothing can be restored into a tensor of this class, or into a DTensor's part of it."""
    if memory.is_plain(tensor):
        return None
    if memory.is_opaque(tensor):
        return composite.why_opaque(tensor)
    placed = sharding.sharding_of(tensor)
    if placed is None:
        return None
    local = sharding.local_of(tensor)
    if memory.is_wrapper(local):
        return encode.why_wrapped(local)
    return sharding.wrong_local(tensor, placed, tuple(local.shape))


def is_filled_as_it_is(saved: structure.Node | None, tensor: Any) -> TypeGuard[structure.ArrayNode]:
    """Returns whether a leaf is an array whose bytes are those of an ordinary tensor."""
    return (
        isinstance(saved, structure.ArrayNode)
        and memory.is_contiguous_strided(tensor)
        and saved.spec.shape == tensor.shape
        and saved.dtype == encode.torch_dtype_name(tensor.dtype)
        and saved.kind not in ("bytes", "number")
    )


def dtype_of(part: object) -> str | None:
    """Returns the dtype of a part that is one tensor; None for numbers and composite parts."""
    if not isinstance(part, torch.Tensor) or flatten.flatten_one_level(part) is not None:
        return None
    return encode.torch_dtype_name(part.dtype)


def stored_dtype(node: structure.Node) -> str | None:
    """Returns the dtype of an array; None for other nodes."""
    return node.dtype if isinstance(node, structure.ArrayNode) else None


def describe(value: Any) -> str:
    """Returns the type and a short text of a value, for messages."""
    return "None" if value is None else f"{type(value).__name__} {structure.short(value)}"


def inside(saved: structure.Node, path: KeyPath) -> tuple[structure.Node, KeyPath]:
    """Returns the single leaf of a handler's value and its path; other nodes unchanged."""
    if isinstance(saved, structure.BranchNode) and structure.BARE in saved.detail:
        return saved.children[0], (*path, saved.keys[0])
    return saved, path


def built(opened: flatten.FlatNode, bound: list[Binding], target: Any) -> Build:
    """Returns a container like the target's, without the keys whose values are left out."""
    node = opened.node()
    if any(isinstance(each, Given) and each.value is NOTHING for each in bound):
        pairs = [
            (key, each)
            for key, each in zip(node.keys, bound, strict=True)
            if not (isinstance(each, Given) and each.value is NOTHING)
        ]
        node = dataclasses.replace(node, keys=tuple(key for key, _ in pairs))
        bound = [each for _, each in pairs]
    return Build(node=node, children=tuple(bound), like=target)
