"""Tensors that share memory in the target and not in the checkpoint: one memory, two values.

Where both values are the same, nothing is wrong. Where they are not, the last one written would
win, so it is a mismatch, found before anything is touched.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.restore_plan import plan
from functional_ckpt.core.tree import memory, walk
from functional_ckpt.format.checkpoint_dir import OpenItem
from functional_ckpt.restoring import read as read_lib
from functional_ckpt.restoring.match import MatchedItem

__all__ = ["report_conflicts"]


class _Use(NamedTuple):
    """One leaf of one item that fills some memory."""

    item: MatchedItem
    filled: plan.Filled

    @property
    def source(self) -> tuple[str, str]:
        """The stored array: the same for leaves that are tied in the checkpoint."""
        return self.item.name, self.filled.read.node.stored_name

    @property
    def opened(self) -> OpenItem:
        """Where it is stored."""
        return cast("OpenItem", self.item.opened)


def report_conflicts(
    matched: Sequence[MatchedItem], verify: read_lib.Verify
) -> Sequence[MatchedItem]:
    """Returns the items, with leaves that would write different values to one memory as mismatches.

    Such leaves keep the target's values. Values are compared by their digests, else by reading
    them; nothing of the target is written.

    Args:
        matched: The matched items.
        verify: How bytes are checked that are read for the comparison.
    """
    uses: defaultdict[Hashable, list[_Use]] = defaultdict(list)
    for item in matched:
        for filled in item.filled:
            if (key := memory.tie_key(filled.read.like)) is not None:
                uses[key].append(_Use(item, filled))
    lines: defaultdict[str, list[str]] = defaultdict(list)
    refused: dict[int, Any] = {}
    for shared in uses.values():
        others = [use for use in shared[1:] if not _is_same(shared[0], use, verify)]
        for use in others:
            lines[use.item.name].append(
                f"{use.filled.where}: the target has one tensor for it and "
                f"{shared[0].filled.where}, the checkpoint has two that differ; untie them, or "
                "ignore one"
            )
        if others:
            refused |= {id(use.filled.read): use.filled.read.like for use in shared}
    if not refused:
        return matched
    return [_without(item, refused, lines[item.name]) for item in matched]


def _is_same(one: _Use, other: _Use, verify: read_lib.Verify) -> bool:
    if one.source == other.source:
        return True
    first, second = (use.filled.read.node for use in (one, other))
    if (first.spec, first.detail.get("dtype")) != (second.spec, second.detail.get("dtype")):
        return False
    mine, theirs = (use.opened.digests(use.filled.read.node) for use in (one, other))
    if mine is not None and theirs is not None and mine.grid == theirs.grid:
        return mine.text == theirs.text
    return torch.equal(*(_bytes_of(use, verify) for use in (one, other)))


def _bytes_of(use: _Use, verify: read_lib.Verify) -> torch.Tensor:
    """Returns the value to be written, in new memory; of a sharded tensor this rank's part."""
    read = dataclasses.replace(use.filled.read, form="tensor")
    touched = read_lib.TargetState()
    (value,) = read_lib.read_all([(use.opened, read)], verify=verify, touched=touched)
    local = cast("torch.Tensor", sharding.local_of(value)).detach()
    return local.contiguous().view(-1).view(torch.uint8)


def _without(item: MatchedItem, refused: Mapping[int, Any], lines: Sequence[str]) -> MatchedItem:
    """Returns an item whose refused reads are replaced by the target's values."""

    def visit(binding: plan.Binding) -> walk.Visit[plan.Binding, plan.Binding]:
        if isinstance(binding, plan.Build):
            return binding.children, lambda bound: dataclasses.replace(
                binding, children=tuple(bound)
            )
        own = isinstance(binding, plan.ReadArray) and id(binding) in refused
        return walk.leaf(plan.Given(refused[id(binding)]) if own else binding)

    report = plan.merge([item.report, plan.RestoreReport(mismatched=tuple(lines))])
    return dataclasses.replace(item, binding=walk.fold(item.binding, visit), report=report)
