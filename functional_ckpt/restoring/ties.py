"""Finds tensors that share memory in the target, but not in the checkpoint.

They share all of it (tied tensors) or a part of it (views of one buffer). If the stored values
differ, the last write would win. That is a mismatch, found before any target is modified.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.restore_plan import plan
from functional_ckpt.core.tree import memory, walk
from functional_ckpt.format.checkpoint_dir import OpenItem
from functional_ckpt.restoring import read as read_lib
from functional_ckpt.restoring.match import MatchedItem

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        """The opened item with its arrays."""
        return cast("OpenItem", self.item.opened)


class _Extent(NamedTuple):
    """The addresses from a tensor's first byte to its last, with the gaps of a strided one."""

    start: int
    end: int
    local: torch.Tensor
    tied: Sequence[_Use]

    @property
    def where(self) -> str:
        """The name of the leaf, for reports."""
        return self.tied[0].filled.where

    def view(self, words: torch.Tensor, base: int, word: int) -> torch.Tensor:
        """Returns the tensor's part of `words`, a copy of the memory that starts at `base`."""
        num_words = self.local.element_size() // word
        return words.as_strided(
            (*self.local.shape, num_words),
            (*(step * num_words for step in self.local.stride()), 1),
            (self.start - base) // word,
        )


def report_conflicts(
    matched: Sequence[MatchedItem], verify: read_lib.Verify
) -> Sequence[MatchedItem]:
    """Returns the items; leaves that would write different values to one memory are mismatches.

    Such leaves keep the target's values. Values are compared by their digests, or read into new
    memory and compared; the target is not modified.
    """
    if _are_apart(matched):
        return matched
    uses: defaultdict[Hashable, list[_Use]] = defaultdict(list)
    for item in matched:
        for filled in item.filled:
            if (key := memory.tie_key(filled.read.like)) is not None:
                uses[key].append(_Use(item, filled))
    wrong: list[tuple[_Use, str]] = []
    refused: list[_Use] = []
    alike: list[Sequence[_Use]] = []
    for tied in uses.values():
        others = [use for use in tied[1:] if not _is_same(tied[0], use, verify)]
        wrong += [
            (
                use,
                f"the target has one tensor for it and {tied[0].filled.where}, the checkpoint has "
                "two that differ; untie them, or ignore one",
            )
            for use in others
        ]
        if others:
            refused += tied
        else:
            alike.append(tied)
    for cluster in _clusters(alike):
        if found := _conflicts(cluster, verify):
            wrong += found
            refused += [use for extent in cluster for use in extent.tied]
    if not refused:
        return matched
    kept = {id(use.filled.read): use.filled.read.like for use in refused}
    lines: defaultdict[str, list[str]] = defaultdict(list)
    for use, text in wrong:
        lines[use.item.name].append(f"{use.filled.where}: {text}")
    return [_without(item, kept, lines[item.name]) for item in matched]


# --------------------------------------------------------------------------- overlapping memory


def _are_apart(matched: Sequence[MatchedItem]) -> bool:
    """Returns whether each leaf fills contiguous host memory that no other leaf fills.

    Most targets are such; for these, no leaf needs a record.
    """
    extents: list[tuple[int, int]] = []
    for item in matched:
        for filled in item.filled:
            tensor = filled.read.like
            if not (memory.is_plain(tensor) and tensor.is_cpu and tensor.is_contiguous()):
                return False
            extents.append((tensor.data_ptr(), tensor.nbytes))
    extents.sort()
    end = 0
    for start, size_bytes in extents:
        if start < end:
            return False
        end = start + size_bytes
    return True


def _clusters(uses: Sequence[Sequence[_Use]]) -> Iterator[Sequence[_Extent]]:
    """Yields each group of tensors whose extents overlap, in order of their addresses."""
    extents: defaultdict[torch.device, list[_Extent]] = defaultdict(list)
    for tied in uses:
        local = cast("torch.Tensor", sharding.local_of(tied[0].filled.read.like))
        # A restore gives a tensor on the meta device memory of its own.
        if not local.is_meta and (num_bytes := _num_bytes(local)):
            start = local.data_ptr()
            extents[local.device].append(_Extent(start, start + num_bytes, local, tied))
    for of_device in extents.values():
        of_device.sort(key=operator.itemgetter(0))
        cluster: list[_Extent] = []
        end = 0
        for extent in of_device:
            if extent.start >= end:
                if len(cluster) > 1:
                    yield cluster
                cluster = []
            cluster.append(extent)
            end = max(end, extent.end)
        if len(cluster) > 1:
            yield cluster


def _num_bytes(tensor: torch.Tensor) -> int:
    """Returns the number of bytes from a tensor's first to its last."""
    if not tensor.numel() or tensor.is_contiguous():
        return tensor.nbytes
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _conflicts(cluster: Sequence[_Extent], verify: read_lib.Verify) -> Sequence[tuple[_Use, str]]:
    """Returns a line for each leaf but the first, if two write different values to one address.

    The values are written to new memory, at the same offsets as in the target.
    """
    base, end = cluster[0].start, max(extent.end for extent in cluster)
    word = math.gcd(8, *(n for e in cluster for n in (e.start - base, e.local.element_size())))
    written = torch.zeros((end - base) // word, dtype=torch.bool, device="cpu")
    if not _is_any_twice([extent.view(written, base, word) for extent in cluster]):
        return []
    written.zero_()
    values = torch.zeros(len(written), dtype=_WORDS[word], device="cpu")
    partners: dict[int, str] = {}
    for number, extent in enumerate(cluster):
        before, has_value = (extent.view(each, base, word) for each in (values, written))
        value = _bytes_of(extent.tied[0], verify).cpu().view(values.dtype).view(before.shape)
        differs = has_value & (before != value)
        if differs.any():
            at = torch.zeros_like(written)
            extent.view(at, base, word).copy_(differs)
            earlier = (each for each in cluster[:number] if each.view(at, base, word).any())
            partners[number] = next(earlier).where
        before.copy_(torch.where(has_value, before, value))
        has_value.fill_(True)
    if not partners:
        return []
    first = min(partners)
    texts = {
        number: f"its memory in the target overlaps that of {partner}, the checkpoint has values "
        "that differ there; give each its own memory, or ignore one"
        for number, partner in partners.items()
    }
    kept = cluster[first].where
    also = f"its memory in the target may overlap that of {kept}, which keeps its value"
    named = {partners[first], *(cluster[number].where for number in partners)}
    return [
        (use, texts.get(number, also))
        for number, extent in enumerate(cluster)
        for use in extent.tied
        if number in texts or use.filled.where not in named
    ]


def _is_any_twice(views: Sequence[torch.Tensor]) -> bool:
    """Returns whether two views have an element in common; marks elements."""
    for view in views:
        if view.any():
            return True
        view.fill_(True)
    return False


# --------------------------------------------------------------------------- values


def _is_same(one: _Use, other: _Use, verify: read_lib.Verify) -> bool:
    if one.source == other.source:
        return True
    first, second = (use.filled.read.node for use in (one, other))
    if (first.spec, first.detail.get("dtype")) != (second.spec, second.detail.get("dtype")):
        return False
    mine, theirs = (use.opened.digests(use.filled.read.node) for use in (one, other))
    if mine is not None and theirs is not None and mine.grid == theirs.grid:
        return mine.is_same(theirs)
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
