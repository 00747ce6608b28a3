"""The structure of an item as rows to print, and as records for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from functional_ckpt.core.tree import long_lists, structure

_MAX_VALUE_CHARS = 60


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a tree.

    Attributes:
        is_last: For every level down to this row, whether it is the last of its siblings; the
            guides are drawn from it.
        key: The last key, as text; empty for the root.
        node: Its node.
        is_summary: Whether its children are left out.
    """

    is_last: tuple[bool, ...]
    key: str
    node: structure.Node
    is_summary: bool


def rows(root: structure.Node, max_depth: int | None = None) -> Iterator[Row]:
    """Yields every node below the root, depth first, parents before children."""
    todo: list[tuple[tuple[bool, ...], str, structure.Node]] = [((), "", root)]
    while todo:
        is_last, key, node = todo.pop()
        children = node.children if isinstance(node, structure.BranchNode) else ()
        is_summary = bool(children) and max_depth is not None and len(is_last) >= max_depth
        if is_last or not children:
            yield Row(is_last=is_last, key=key, node=node, is_summary=is_summary)
        if isinstance(node, structure.BranchNode) and not is_summary:
            pairs = list(zip(node.keys, node.children, strict=True))
            for position, (child_key, child) in reversed(list(enumerate(pairs))):
                shown = f"[{child_key.value}]" if child_key.kind == "index" else _key(child_key)
                todo.append(((*is_last, position == len(pairs) - 1), shown, child))


def _key(key: structure.Key) -> str:
    """Strings unchanged, unless they look like keys of other types."""
    text = key.value
    is_clear = isinstance(text, str) and text and not text.lstrip("-").isdigit()
    return str(text) if is_clear else repr(text)


def totals(root: structure.Node) -> tuple[int, int]:
    """Returns the number of arrays with bytes of their own below a node, and of their bytes."""
    arrays = [
        leaf
        for _, leaf in structure.iter_leaves(root)
        if isinstance(leaf, structure.ArrayNode) and leaf.tied_to is None
    ]
    return len(arrays), sum(leaf.spec.size_bytes for leaf in arrays)


def describe(node: structure.Node) -> str:
    """Returns a node in a few words."""
    if isinstance(node, structure.ValueNode):
        if node.kind == "none":
            return "None"
        text = repr(node.value)
        return text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 3]}..."
    return structure.describe(node).removeprefix("a ")


def leaf_records(root: structure.Node) -> list[dict[str, Any]]:
    """Returns every leaf as a record: the output of `fckpt show --json`."""
    return [
        {
            "name": structure.leaf_name(path),
            "path": [
                key.value if isinstance(key.value, (str, int)) else repr(key.value) for key in path
            ],
            **_leaf_record(leaf),
        }
        for path, leaf in structure.iter_leaves(root)
    ]


def _leaf_record(leaf: structure.Node) -> dict[str, Any]:
    if isinstance(leaf, structure.ArrayNode):
        return {
            "kind": leaf.kind,
            "dtype": leaf.dtype,
            "shape": list(leaf.spec.shape),
            "size_bytes": 0 if leaf.tied_to is not None else leaf.spec.size_bytes,
            "tied_to": leaf.tied_to,
            "detail": dict(leaf.detail),
        }
    if isinstance(leaf, structure.ValueNode):
        value = json.loads(str(leaf.value)) if leaf.kind == long_lists.PLAIN_LIST else leaf.value
        return {"kind": leaf.kind, "value": value}
    return {"kind": leaf.kind, "detail": dict(leaf.detail)}  # an empty container
