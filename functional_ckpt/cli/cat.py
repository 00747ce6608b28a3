"""`fckpt cat`: the value of an item or a leaf."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

from functional_ckpt import errors
from functional_ckpt.cli import output, targets
from functional_ckpt.core.arrays.spec import Box
from functional_ckpt.core.tree import structure
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.format.stored_arrays import OpenArrays, StoredArray

# Larger arrays are abridged, unless --json asks for every number.
_MAX_ELEMENTS = 1000


def run(arguments: argparse.Namespace) -> int:
    """Prints one value; JSON items as JSON, arrays as NumPy prints them."""
    checkpoint = targets.checkpoint_of(
        arguments.checkpoint, arguments.step, arguments.prefix, opens_foreign=True
    )
    opened = checkpoint.open()
    item, leaf = _split(opened, arguments.name)
    if opened.items[item] == "json":
        value = _json_value(opened.json(item), leaf, arguments.name)
    else:
        value = _tree_value(opened.tree(item), leaf, arguments.name)
    if arguments.json:
        record = {"path": opened.path, "step": opened.step, "name": arguments.name}
        output.as_json({"schema": "fckpt.cat/1", **record, "value": _as_plain(value)})
    else:
        sys.stdout.write(f"{_as_text(value)}\n")
    return 0


def _split(opened: checkpoint_dir.OpenCheckpoint, name: str) -> tuple[str, str]:
    """Returns the item and the rest of `ITEM` or `ITEM.LEAF`; items' names may have dots."""
    for item in sorted(opened.items, key=len, reverse=True):
        if name == item or name.startswith(f"{item}."):
            return item, name[len(item) + 1 :]
    raise checkpoint_dir.missing_item(opened.path, name, opened.items)


def _json_value(value: Any, keys: str, name: str) -> Any:
    for key in keys.split(".") if keys else ():
        if isinstance(value, dict) and key in value:
            value = value[key]  # pyright: ignore[reportUnknownVariableType]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):  # pyright: ignore[reportUnknownArgumentType]
            value = value[int(key)]  # pyright: ignore[reportUnknownVariableType]
        else:
            raise errors.UsageError(f"There is no {name!r}; {key!r} is not in {_as_text(value)}.")
    return value  # pyright: ignore[reportUnknownVariableType]


def _tree_value(item: checkpoint_dir.OpenItem, leaf: str, name: str) -> Any:
    leaves = {structure.leaf_name(path): node for path, node in structure.iter_leaves(item.root)}
    node = leaves.get(leaf)
    if node is None:
        import difflib

        near = difflib.get_close_matches(leaf, leaves, n=3, cutoff=0.3) or list(leaves)[:3]
        raise errors.UsageError(
            f"There is no leaf {name!r}; the item has {len(leaves)}, such as {', '.join(near)}. "
            "fckpt show lists them."
        )
    if isinstance(node, structure.ArrayNode) and node.tied_to is not None:
        node = leaves[node.tied_to]
    if isinstance(node, structure.ArrayNode):
        with contextlib.ExitStack() as files:
            array = StoredArray(OpenArrays(item, files), node)
            return array.read(Box.whole(node.spec.shape))
    return node.value if isinstance(node, structure.ValueNode) else []


def _as_plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _as_text(value: Any) -> str:
    if hasattr(value, "tolist"):
        import numpy as np

        return np.array2string(value, threshold=_MAX_ELEMENTS, separator=", ")
    if isinstance(value, str):
        return output.printable(value)
    return output.printable(json.dumps(output.plain(value), ensure_ascii=False))
