"""Walking trees without recursion: their depth is a matter of memory, not of the stack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeAlias, TypeVar

_K = TypeVar("_K")
_T = TypeVar("_T")
_R = TypeVar("_R")

Visit: TypeAlias = tuple[Iterable[_T], Callable[[list[_R]], _R]] | tuple[None, _R]
"""The visit of a node: its children and the function that combines their results; or its result."""


class Trail(Generic[_K]):
    """The keys from the root to the node that `fold` is visiting.

    One list that grows and shrinks: a tuple for every level would be quadratic in the depth.
    """

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: list[_K] = []

    def enter(self, depth: int, key: _K | None) -> None:
        """Notes that the node being visited is at `depth`, under `key`; the root is at 0."""
        if key is not None:
            del self._keys[depth - 1 :]
            self._keys.append(key)

    def path(self) -> tuple[_K, ...]:
        """Returns the path of the node that was entered last."""
        return tuple(self._keys)


def leaf(result: _R) -> tuple[None, _R]:
    """Returns a node without children, whose result is known."""
    return None, result


def fold(root: _T, visit: Callable[[_T], Visit[_T, _R]]) -> _R:
    """Folds a tree: visits nodes from the root down, and combines their results upwards.

    Args:
        root: The first node.
        visit: Called once for every node, parents before children, in order.

    >>> fold([1, [2, 3]], lambda node: leaf(node) if isinstance(node, int) else (node, sum))
    6
    """
    found = visit(root)
    if found[0] is None:
        return found[1]
    stack: list[tuple[Iterator[_T], list[_R], Callable[[list[_R]], _R]]] = [
        (iter(found[0]), [], found[1])
    ]
    while True:
        remaining, results, build = stack[-1]
        for child in remaining:
            found = visit(child)
            if found[0] is None:
                results.append(found[1])
                continue
            stack.append((iter(found[0]), [], found[1]))
            break
        else:
            stack.pop()
            result = build(results)
            if not stack:
                return result
            stack[-1][1].append(result)
