"""Staging in the background: what only an optimizer's step changes is copied after `save`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from functional_ckpt.core.arrays import sharding
from functional_ckpt.format import database
from functional_ckpt.runtime import device_copies, host_memory, threads
from functional_ckpt.runtime.fence import (
    PendingCopy,
    UnfencedChanges,
    changes_between_steps,
    storage_of,
    storages_of,
)
from functional_ckpt.saving import overlap_check, stage
from functional_ckpt.saving.lower import LoweredItem, Source
from functional_ckpt.saving.plan import SavePlan

__all__ = ["stage_overlapped"]

Array: TypeAlias = "np.ndarray[Any, Any]"
_Later: TypeAlias = tuple[stage._Part, Array, str]
"""What is copied later, where to, and the leaf's name for people."""


def stage_overlapped(
    items: Sequence[LoweredItem],
    plan: SavePlan,
    room: stage.StagingMemory,
    step: int,
    unfenced: UnfencedChanges,
    *,
    is_checked: bool,
) -> tuple[tuple[stage.StagedItem, ...], PendingCopy]:
    """As `stage.stage`, but leaves to be copied what only a step of the items' optimizers changes.

    That is the memory of the parameters that they update, and their state; all else (buffers,
    learning rates, averages, generators, weights that a forward pass changes) is copied at once.

    Args:
        items: What to stage.
        plan: This rank's part.
        room: Where to.
        step: The step being saved.
        unfenced: Leaves that are to be copied at once, for something else changes them too.
        is_checked: Whether every byte of the copy is compared with what is there now.
    """
    database.check_process()
    optimizers = [optimizer for item in items for optimizer in item.optimizers]
    storages = storages_of(each for each in optimizers if not changes_between_steps(each))
    storages -= _changed_by_forward(items)
    now: list[tuple[stage._Part, Array]] = []
    later: list[_Later] = []
    with threads.gc_paused():
        parts = [list(stage._parts(item, plan[item.name])) for item in items]
        hosts = room.reserve([part for item_parts in parts for part in item_parts])
        staged = stage._staged(items, plan, parts, hosts)
        remaining = iter(hosts)
        for item, item_parts in zip(items, parts, strict=True):
            for part in item_parts:
                name = f"{item.name}.{part.source.node.name}"
                if _waits(item, part.source, storages) and name not in unfenced:
                    later.append((part, next(remaining), name))
                else:
                    now.append((part, next(remaining)))
    copies = [(part, host) for part, host, _ in later]
    transfers = stage._begin(copies, room)
    # Beside the forward pass, which keeps a core.
    num_threads = min(host_memory.NUM_THREADS, threads.num_spare_cores())
    copy = functools.partial(stage._start_copy, copies, transfers, num_threads)
    pending = PendingCopy(copy, optimizers, step, transfers, unfenced)
    _watch(pending, later, optimizers, is_checked=is_checked)
    stage._copy(now, room)
    return staged, pending


def _watch(
    pending: PendingCopy,
    later: Sequence[_Later],
    optimizers: Sequence[Any],
    *,
    is_checked: bool,
) -> None:
    """Has it noticed when something changes before it is copied."""
    owners: dict[int, str] = {}
    for part, _, name in later:
        tensor = part.source.tensor
        pending.watch(name, tensor)
        owners[storage_of(tensor)] = name
    for parameter in (p for o in optimizers for group in o.param_groups for p in group["params"]):
        if (name := owners.get(storage_of(parameter))) is not None:
            pending.watch(name, parameter, sharding.local_of(parameter))
    compared = later
    if not is_checked:  # a few bytes of a device's memory would be as slow to read as all
        on_host = [each for each in later if not device_copies.is_streamed(each[0].view)]
        compared = overlap_check.sampled(on_host)
    leaves = [
        overlap_check.CopiedLeaf(name, part.view, stage._dtype(part), host)
        for part, host, name in compared
    ]
    check = overlap_check.CopyCheck(leaves, is_whole=is_checked)
    pending.check(check.names_of_changed)


def _changed_by_forward(items: Sequence[LoweredItem]) -> frozenset[int]:
    """Where weights are that a forward pass changes: embeddings with `max_norm` shrink them."""
    return frozenset(
        storage_of(module.weight)
        for item in items
        if isinstance(item.value, torch.nn.Module)
        for module in item.value.modules()
        if getattr(module, "max_norm", None) is not None
        and isinstance(getattr(module, "weight", None), torch.Tensor)
    )


def _waits(item: LoweredItem, source: Source, storages: frozenset[int]) -> bool:
    """Whether only a step, or `load_state_dict`, of the items' optimizers changes a leaf."""
    tensor = source.tensor
    if not (tensor.is_cpu or device_copies.is_streamed(tensor)) or not tensor.numel():
        return False
    if item.optimizers:  # the learning rate is the scheduler's too
        is_state = source.node.name.startswith("state.")
        return is_state and not any(map(changes_between_steps, item.optimizers))
    return storage_of(source.tensor) in storages
