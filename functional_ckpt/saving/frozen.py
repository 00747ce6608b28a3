"""Parameters that no optimizer trains: they have files of their own, which steps share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.tree import memory

if TYPE_CHECKING:
    from functional_ckpt.saving.lower import LoweredItem


def with_frozen(items: Iterable[LoweredItem]) -> tuple[LoweredItem, ...]:
    """Returns the items with the names of their frozen parameters."""
    given = tuple(items)
    frozen = {
        address
        for item in given
        for parameter in _frozen(item)
        for address in _addresses(parameter)
    }
    if not frozen:
        return given
    # One whose gradient is switched off for a while has a state all the same.
    optimizers = [optimizer for item in given for optimizer in item.optimizers]
    trained = (each for optimizer in optimizers for each in getattr(optimizer, "state", ()))
    frozen -= {
        address
        for each in trained
        if isinstance(each, torch.Tensor)
        for address in _addresses(each)
    }
    return tuple(
        dataclasses.replace(
            item,
            frozen=frozenset(
                source.node.name
                for source in item.sources
                if not frozen.isdisjoint(_addresses(source.tensor))
            ),
        )
        for item in given
    )


def _frozen(item: LoweredItem) -> Iterator[torch.Tensor]:
    """Yields the parameters without a gradient, of an item's modules and among its leaves."""
    for value in item.values:
        if isinstance(value, torch.nn.Module):
            yield from (each for each in value.parameters() if not each.requires_grad)
    for source in item.sources:
        if source.node.detail.get("requires_grad") is False:
            yield source.tensor


def _addresses(tensor: Any) -> Sequence[int]:
    """Returns where the memory of a tensor starts, or of this rank's part of it."""
    local = sharding.local_of(tensor)
    if memory.is_wrapper(local):
        names = local.__tensor_flatten__()[0] if hasattr(local, "__tensor_flatten__") else ()
        return [address for name in names for address in _addresses(getattr(local, name))]
    if local.is_meta or local.layout is not torch.strided or not local.numel():
        return ()
    return (local.data_ptr(),)
