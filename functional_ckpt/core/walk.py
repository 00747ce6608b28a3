"""Walking trees without recursion: their depth is a matter of memory, not of the stack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

__all__ = ["Visit", "fold", "leaf"]

T = TypeVar("T")
R = TypeVar("R")

Visit: TypeAlias = tuple[Iterable[T], Callable[[list[R]], R]]
"""What becomes of a node: its children, and how their results are put together."""


def leaf(result: Any) -> Visit[Any, Any]:
    """A node without children, whose result is known."""
    return (), lambda _: result


def fold(root: T, visit: Callable[[T], Visit[T, R]]) -> R:
    """The result for a whole tree: nodes are visited from the root down, and put together upwards.

    Args:
        root: The first node.
        visit: Called once for every node, parents before children, in order.

    >>> fold([1, [2, 3]], lambda node: leaf(node) if isinstance(node, int) else (node, sum))
    6
    """
    children, build = visit(root)
    stack: list[tuple[Iterator[T], list[R], Callable[[list[R]], R]]] = [(iter(children), [], build)]
    while True:
        remaining, results, build = stack[-1]
        for child in remaining:
            children, build_child = visit(child)
            if children == ():  # most nodes are leaves, which need no place on the stack
                results.append(build_child([]))
                continue
            stack.append((iter(children), [], build_child))
            break
        else:
            stack.pop()
            result = build(results)
            if not stack:
                return result
            stack[-1][1].append(result)
