"""Deals files out to processes or nodes that work at the same time."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def deal(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Returns the files of each of `count` workers: the largest first, each to the smallest share.

    >>> deal({"a": 3, "b": 2, "c": 2, "d": 1}, 2)
    [['a', 'd'], ['b', 'c']]
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        size_bytes, number = heap[0]
        shares[number].append(name)
        heapq.heapreplace(heap, (size_bytes + sizes[name], number))
    return shares


def deal_to_holders(
    sizes: Mapping[str, int], holders: Mapping[str, Sequence[int]]
) -> dict[int, list[str]]:
    """Returns the files of each worker, where not every worker has every file.

    The files with the fewest holders come first, of these the largest. Each goes to the smallest
    share of its holders; of equal ones, to the first. Files without a holder are left out.

    >>> deal_to_holders({"a": 3, "b": 2, "c": 2}, {"a": [0, 1], "b": [0], "c": []})
    {0: ['b'], 1: ['a']}
    """
    loads: dict[int, int] = {}
    shares: dict[int, list[str]] = {}
    for name in sorted(sizes, key=lambda name: (len(holders[name]), -sizes[name], name)):
        if holders[name]:
            chosen = min(holders[name], key=lambda worker: loads.get(worker, 0))
            loads[chosen] = loads.get(chosen, 0) + sizes[name]
            shares.setdefault(chosen, []).append(name)
    return shares
