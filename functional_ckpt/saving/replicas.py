"""Samples of leaves that several ranks have, to detect differences between ranks.

Of a plain tensor, and of the replicas of a shard, one copy is saved: they must be equal on all
ranks that have them. Every rank hashes a few elements of each such leaf, and sends the digests with
its plan, without another round. All leaves are compared when the structure is new, and after 1, 2,
4, 8, ... saves of it; at the other saves a few leaves in host memory are compared, in turn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash

from functional_ckpt import errors
from functional_ckpt.core.arrays.sharding import Sharding
from functional_ckpt.core.records import records
from functional_ckpt.core.tree import encode
from functional_ckpt.saving.lower import Source

Groups: TypeAlias = "Mapping[str, Sequence[tuple[int, int]]]"
"""Who holds the same leaves -> these, as the numbers of item and source, in order of their names.

All ranks that hold them have this entry, and all compare the same leaves in the same order.
"""

# Up to this size a leaf is compared completely; of a larger one, about this many elements.
_MAX_WHOLE_BYTES = 4096
_MAX_ELEMENTS = 128
_LEAVES_PER_TURN = 64


def group(leaves: Iterable[tuple[str, tuple[int, int], Sharding, str]], rank: int) -> Groups:
    """Returns the leaves that other ranks hold too, grouped by these ranks.

    Args:
        leaves: Full name, numbers, sharding on all ranks, and a mark: leaves with different marks
            are in different groups.
        rank: This rank.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    keys: dict[tuple[str, tuple[int, ...]], str] = {}
    for _, numbers, sharding, mark in sorted(leaves, key=lambda leaf: leaf[0]):
        if sharding.num_replicas == 1:
            continue
        ranks = sharding.replicas(rank)
        if len(ranks) > 1:
            key = keys.get((mark, ranks)) or mark + records.digest_hex(repr(ranks).encode())
            groups.setdefault(keys.setdefault((mark, ranks), key), []).append(numbers)
    return groups


def samples(
    groups: Groups, sources: Sequence[Sequence[Source]], num_saves: int
) -> dict[str, list[Any]]:
    """Returns for each group the number of sampled leaves, and one digest of them."""
    found: dict[str, list[Any]] = {}
    for key, numbers in groups.items():
        due = [sources[item][index] for item, index in _turn(numbers, num_saves)]
        if not _is_due(num_saves):  # asking a device makes `save` wait for it
            due = [source for source in due if source.tensor.is_cpu]
        joint = np.array(digests(due), np.uint64).tobytes()
        found[key] = [len(due), records.digest_hex(joint)]
    return found


def differing(found: Sequence[Mapping[str, Sequence[Any]]]) -> set[str]:
    """Returns the groups for which samples of two ranks differ."""
    seen: dict[str, Sequence[Any]] = {}
    return {
        key
        for each in found
        for key, sample in each.items()
        if seen.setdefault(key, sample) != sample
    }


def digests(sources: Sequence[Source]) -> list[int]:
    """Returns a digest of a sample of each tensor; it does not depend on strides."""
    found = [0] * len(sources)
    on_device: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    for index, source in enumerate(sources):
        tensor = source.tensor
        if tensor.is_cpu:
            array = encode.host_view(tensor, source.node.spec.dtype)
            found[index] = _digest(array[_grid(array.shape, array.itemsize)])
        else:
            part = tensor[_grid(tuple(tensor.shape), tensor.itemsize)].reshape(-1)
            key = (tensor.device, tensor.dtype)
            on_device.setdefault(key, []).append((index, part))
    for parts in on_device.values():  # one copy, and one wait, for all leaves of a dtype
        joined = torch.cat([part for _, part in parts]).cpu()
        sizes = [part.numel() for _, part in parts]
        for (index, _), part in zip(parts, joined.split(sizes), strict=True):
            found[index] = _digest(encode.host_view(part, sources[index].node.spec.dtype))
    return found


def check_equal(leaves: Mapping[str, tuple[Sharding, Mapping[int, int]]]) -> None:
    """Raises `CoordinationError` if ranks hold different values of one leaf.

    Args:
        leaves: For each leaf its sharding on all ranks, and the digests by rank.
    """
    wrong: dict[str, list[list[int]]] = {}
    for name, (sharding, found) in leaves.items():
        for rank in sorted(found):
            alike: dict[int, list[int]] = {}
            for other in sharding.replicas(rank):
                if other in found:
                    alike.setdefault(found[other], []).append(other)
            if len(alike) > 1:
                wrong[name] = list(alike.values())
                break
    if not wrong:
        return
    first, parties = next(iter(wrong.items()))
    more = "" if len(wrong) == 1 else f" (and {len(wrong) - 1} more leaves)"
    raise errors.CoordinationError(
        f"{first}{more}: {_ranks(parties[0])} and {_ranks(parties[1])} hold different values under "
        "one name. One copy is saved of a plain tensor, and of the replicas of a DTensor, so they "
        "must be equal on all ranks that have them. If every rank has a part or a state of its own "
        "(tensor or expert parallelism without DTensors, FSDP1, counts that are not synchronised), "
        "make it a DTensor, give it another name on each rank, or save it for each rank: "
        "fc.Stateful(value, per_rank=True), fc.PyTree(tree, per_rank=True). If the first rank's is "
        "the one to keep, pass replicated='unchecked' to the item.",
        ranks=[rank for party in parties[1:] for rank in party],
        key_path=first,
    )


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _is_due(num_saves: int) -> bool:
    """Returns whether all leaves are compared: at the first save, and after 1, 2, 4, 8, ..."""
    return num_saves & (num_saves - 1) == 0


def _turn(numbers: Sequence[tuple[int, int]], num_saves: int) -> Sequence[tuple[int, int]]:
    if _is_due(num_saves):
        return numbers
    start = num_saves * _LEAVES_PER_TURN % len(numbers)
    return [*numbers[start:], *numbers[:start]][:_LEAVES_PER_TURN]


def _digest(sample: np.ndarray[Any, Any]) -> int:
    return xxhash.xxh3_64_intdigest(sample.tobytes())


@functools.lru_cache(maxsize=4096)
def _grid(shape: tuple[int, ...], itemsize: int) -> tuple[Any, ...]:
    """Returns an index expression for a grid of elements over the tensor; all if there are few."""
    if math.prod(shape) * itemsize <= _MAX_WHOLE_BYTES:
        return (...,)
    left = _MAX_ELEMENTS
    steps = [1] * len(shape)
    for position, dim in enumerate(sorted(range(len(shape)), key=lambda dim: shape[dim])):
        count = min(shape[dim], max(1, round(left ** (1 / (len(shape) - position)))))
        steps[dim] = -(-shape[dim] // count)
        left = max(1, left // count)
    return (*(slice(step // 2, None, step) for step in steps), ...)
