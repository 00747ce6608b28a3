"""JSON items as structures, so that parts of them are selected and renamed like any leaves."""

from __future__ import annotations

from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.core.restore_plan.keep import INCOMPLETE
from functional_ckpt.core.tree import encode, plain_json, structure, walk
from functional_ckpt.core.tree.structure import BranchNode, Key, Node, ValueNode


def to_node(value: Any) -> Node:
    """Returns the structure of a JSON value; packed values and empty containers are leaves."""

    def visit(current: Any) -> walk.Visit[Any, Node]:
        if plain_json.is_packed(current):
            return walk.leaf(ValueNode(kind="json", value=current))
        if isinstance(current, dict):
            keys = tuple(map(Key, cast("dict[str, Any]", current)))
            values = list(cast("dict[str, Any]", current).values())
            return values, lambda nodes: BranchNode(kind="dict", keys=keys, children=tuple(nodes))
        if isinstance(current, list):
            items = cast("list[Any]", current)
            keys = tuple(Key(index, "index") for index in range(len(items)))
            return items, lambda nodes: BranchNode(kind="list", keys=keys, children=tuple(nodes))
        return walk.leaf(cast("Node", encode.value_node(current)))

    return walk.fold(value, visit)


def from_node(root: Node) -> Any:
    """Returns the JSON value of a structure.

    Raises:
        UsageError: Items are left out of a list that has others behind them.
    """

    def visit(node: Node) -> walk.Visit[Node, Any]:
        if isinstance(node, structure.ValueNode):
            return walk.leaf(node.value)
        branch = cast("BranchNode", node)
        if branch.detail.get(INCOMPLETE):
            raise errors.UsageError(
                "A list of a JSON item cannot be restored in part: the target has no values for "
                "the rest. Select or ignore all of it."
            )
        if branch.kind == "list":
            return branch.children, list
        keys = [key.value for key in branch.keys]
        return branch.children, lambda values: dict(zip(keys, values, strict=True))

    return walk.fold(root, visit)
