from __future__ import annotations

from typing import Any

from functional_ckpt.core.tree import walk


def _visit(seen: list[Any]) -> Any:
    def visit(node: Any) -> walk.Visit[Any, Any]:
        seen.append(node)
        return (node, tuple) if isinstance(node, list) else walk.leaf(-node)

    return visit


def test_parents_before_children_and_results_in_order() -> None:
    seen: list[Any] = []
    tree = [1, [2, [3, 4]], [], 5]
    assert walk.fold(tree, _visit(seen)) == (-1, (-2, (-3, -4)), (), -5)
    assert seen == [tree, 1, [2, [3, 4]], 2, [3, 4], 3, 4, [], 5]


def test_walk_of_a_single_leaf() -> None:
    assert walk.fold(7, _visit([])) == -7


def test_depth_is_no_matter() -> None:
    tree: Any = 1
    for _ in range(100_000):
        tree = [tree]
    depth = walk.fold(
        tree, lambda node: (node, lambda r: r[0] + 1) if isinstance(node, list) else walk.leaf(0)
    )
    assert depth == 100_000
    while isinstance(tree, list):  # or its deletion would need a deep stack
        tree = tree.pop()
