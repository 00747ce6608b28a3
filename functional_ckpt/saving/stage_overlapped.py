"""Overlapped staging: copies values that only optimizer steps change after `save` returns."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from functional_ckpt.core.arrays import sharding
from functional_ckpt.runtime import device_copies, host_memory, threads
from functional_ckpt.runtime.fence import (
    Fence,
    PendingCopy,
    changes_between_steps,
    storage_of,
    storages_of,
)
from functional_ckpt.saving import overlap_check
from functional_ckpt.saving import parts as parts_lib
from functional_ckpt.saving.lower import LoweredItem, Source
from functional_ckpt.saving.parts import Array, Part

_Copies: TypeAlias = "list[tuple[Part, Array]]"


def stage(
    items: Sequence[LoweredItem],
    parts: Sequence[Sequence[Part]],
    memory: parts_lib.StagingMemory,
    fence: Fence,
    step: int | None,
    *,
    is_checked: bool,
) -> list[list[Array]]:
    """Copies now the parts that other code than an optimizer step may change, and the rest later.

    The parameters that the items' optimizers update, and the state of these optimizers, are copied
    later. Everything else (buffers, learning rates, averages, generators, weights that a forward
    pass changes) is copied before this returns. With `is_checked`, every byte of the copy is
    compared with its current value.

    Returns:
        The host arrays of each item's parts; those copied later are filled by `fence.copy`.
    """
    optimizers = [optimizer for item in items for optimizer in item.optimizers]
    storages = storages_of(each for each in optimizers if not changes_between_steps(each))
    storages -= _changed_by_forward(items)
    now: _Copies = []
    later: _Copies = []
    with threads.gc_paused():
        hosts = iter(memory.reserve([part for item_parts in parts for part in item_parts]))
        found: list[list[Array]] = []
        for item, item_parts in zip(items, parts, strict=True):
            found.append([next(hosts) for _ in item_parts])
            for part, host in zip(item_parts, found[-1], strict=True):
                is_later = _waits(item, part.source, storages) and part.name not in fence.unfenced
                (later if is_later else now).append((part, host))
    transfers = memory.begin(later)
    # One core is left to the forward pass that runs meanwhile.
    num_threads = min(host_memory.NUM_THREADS, threads.num_spare_cores())
    copy = functools.partial(parts_lib.start_copy, later, transfers, num_threads)
    pending = PendingCopy(copy, optimizers, step, transfers, fence.unfenced)
    _watch(pending, later, optimizers, is_checked=is_checked)
    parts_lib.copy(now, memory)
    values = [value for item in items for value in item.values]
    modules = [value for value in values if isinstance(value, torch.nn.Module)]
    fence.arm(pending, [*(each for module in modules for each in module.modules()), *optimizers])
    return found


def _watch(
    pending: PendingCopy, later: _Copies, optimizers: Sequence[Any], *, is_checked: bool
) -> None:
    """Starts the detection of changes before the copy."""
    owners: dict[int, str] = {}
    for part, _ in later:
        tensor = part.source.tensor
        pending.watch(part.name, tensor)
        owners[storage_of(tensor)] = part.name
    for parameter in (p for o in optimizers for group in o.param_groups for p in group["params"]):
        if (name := owners.get(storage_of(parameter))) is not None:
            pending.watch(name, parameter, sharding.local_of(parameter))
    compared: Sequence[tuple[Part, Array]] = later
    if not is_checked:  # a few bytes of a device's memory would be as slow to read as all
        on_host = [each for each in later if not device_copies.is_streamed(each[0].view)]
        compared = overlap_check.sampled(on_host)
    leaves = [
        overlap_check.CopiedLeaf(part.name, part.view, part.dtype, host) for part, host in compared
    ]
    pending.check(overlap_check.remember(leaves, is_whole=is_checked))


def _changed_by_forward(items: Sequence[LoweredItem]) -> frozenset[int]:
    """Returns the storages of weights that a forward pass changes: embeddings with `max_norm`."""
    return frozenset(
        storage_of(module.weight)
        for item in items
        for value in item.values
        if isinstance(value, torch.nn.Module)
        for module in value.modules()
        if getattr(module, "max_norm", None) is not None
        and isinstance(getattr(module, "weight", None), torch.Tensor)
    )


def _waits(item: LoweredItem, source: Source, storages: frozenset[int]) -> bool:
    """Returns whether only a step or `load_state_dict` of the optimizers may change a leaf."""
    tensor = source.tensor
    if not (tensor.is_cpu or device_copies.is_streamed(tensor)) or not tensor.numel():
        return False
    if item.optimizers:  # the learning rate is the scheduler's too
        is_state = source.node.name.startswith("state.")
        return is_state and not any(map(changes_between_steps, item.optimizers))
    return storage_of(source.tensor) in storages
