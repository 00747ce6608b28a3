"""A checkpoint in memory, to test handlers without storage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from functional_ckpt.core.tree import decode, encode, flatten, structure
from functional_ckpt.core.tree.placeholders import AS_SAVED, Fill
from functional_ckpt.handlers import Item, default_registry


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An item's structure and a copy of its bytes, taken when it was saved."""

    root: structure.Node
    arrays: dict[str, np.ndarray[Any, Any]]
    text: str | None = None

    def restore(self, item: Any) -> Any:
        """The result of `restore` for a target, or for None: the tree as saved."""
        if item is None:
            return self._fill(self.root, AS_SAVED, {})
        item = default_registry().bind(item)
        if self.text is not None:
            return item.handler.lift(item.value, json.loads(self.text))
        target = item.handler.target(item.value, self.saved())
        return item.handler.lift(item.value, self._fill(self.root, target, {}))

    def saved(self) -> Any:
        """The checkpoint's tree with specs for arrays."""
        return self._build(self.root, lambda node: node.spec)

    def _build(self, node: structure.Node, array: Callable[[structure.ArrayNode], Any]) -> Any:
        if isinstance(node, structure.ArrayNode):
            return array(node)
        if isinstance(node, structure.ValueNode):
            return encode.plain_value(node)
        return flatten.unflatten_one_level(
            node, [self._build(child, array) for child in node.children]
        )

    def _fill(
        self, node: structure.Node, target: Any, ties: dict[str, Any], *, strict: bool = True
    ) -> Any:
        if target is AS_SAVED:
            return self._build(node, lambda leaf: self._new(leaf, ties))
        if isinstance(node, structure.ArrayNode):
            return self._array(node, target)
        if isinstance(node, structure.ValueNode):
            return encode.plain_value(node)
        opened = flatten.flatten_one_level(target)
        assert opened is not None, f"expected a container for {node.keys}, got {target!r}"
        wanted = dict(zip([key.value for key in opened.keys], opened.children, strict=True))
        pairs = zip(node.keys, node.children, strict=True)
        stored = {key.value: (key, child) for key, child in pairs}
        assert stored.keys() >= wanted.keys()
        assert not strict or stored.keys() == wanted.keys()
        children = [
            self._fill(stored[key][1], child, ties, strict=strict) for key, child in wanted.items()
        ]
        node = dataclasses.replace(
            node, keys=tuple(stored[key][0] for key in wanted), children=tuple(children)
        )
        return flatten.unflatten_one_level(node, children, target)

    def _new(self, node: structure.ArrayNode, ties: dict[str, Any]) -> Any:
        if node.stored_name not in ties:
            destination = decode.allocate(node)
            destination.array[...] = self.arrays[node.stored_name]
            ties[node.stored_name] = destination.finish()
        return ties[node.stored_name]

    def _array(self, node: structure.ArrayNode, target: Any) -> Any:
        wanted = target.tensor if isinstance(target, Fill) else target
        assert tuple(wanted.shape) == node.spec.shape, (node.name, wanted.shape, node.spec)
        assert encode.torch_dtype_name(wanted.dtype) == node.spec.dtype, node.name
        if not isinstance(target, Fill):
            return self._new(node, {})
        view = encode.host_view(wanted, node.spec.dtype)
        view[...] = self.arrays[node.stored_name]
        return wanted


def _save(value: Any) -> Stored:
    item = default_registry().bind(value)
    assert isinstance(item, Item)
    lowered = item.handler.lower(item.value)
    if item.handler.format == "json":
        text = json.dumps(lowered, allow_nan=False)
        return Stored(root=structure.ValueNode(kind="none", value=None), arrays={}, text=text)
    flat = flatten.flatten(lowered)
    arrays = {
        node.name: encode.host_view(encode.source_of(value, node), node.spec.dtype).copy()
        for node, value in flat.arrays
    }
    return Stored(root=flat.root, arrays=arrays)


@pytest.fixture
def save() -> Callable[[Any], Stored]:
    """Captures an item's bytes, independent of later changes of the value."""
    return _save


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
