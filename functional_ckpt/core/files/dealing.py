"""Deals files out to processes or nodes that work at the same time."""

from __future__ import annotations

import heapq
from collections.abc import Mapping


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
