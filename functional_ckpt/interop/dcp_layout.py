"""How the state dicts of `torch.distributed.checkpoint` are items of a step, and the reverse.

A state dict is flattened by its planner: `{"model": {"w": t}}` has the name `model.w`. The names
below an item are those of its leaves on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from functional_ckpt import errors
from functional_ckpt.core.tree import structure
from functional_ckpt.core.tree.structure import ArrayNode, BranchNode, Key, Node
from functional_ckpt.saving import lower

RECORD = "torch.distributed.checkpoint"
"""Key of a step's custom metadata: how its state dict was laid out."""

Path: TypeAlias = tuple[str | int, ...]
"""The keys of an entry in the nested state dict: an int is the index of a list."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The items of a state dict.

    Attributes:
        item: The item that holds all of it; None where each of its keys is an item.
        objects: Names of entries that are containers, which another planner would open.
    """

    item: str | None = None
    objects: tuple[str, ...] = ()

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Layout:
        """Returns the layout of a state dict with these entries."""
        known = list(paths)
        names = {str(path[0]) for path in known}
        is_nested = any(len(path) > 1 for path in known) and all(map(_is_item, names))
        return cls(item=None if is_nested else "state")

    @classmethod
    def from_json(cls, record: Any) -> Layout:
        """Returns the layout that `to_json` recorded; the default where there is none."""
        if not isinstance(record, Mapping):
            return cls()
        return cls(item=record.get("item"), objects=tuple(record.get("objects", ())))

    def to_json(self) -> dict[str, Any]:
        """Returns the layout as custom metadata; empty for the default."""
        if self == Layout():
            return {}
        return {RECORD: {"item": self.item, "objects": list(self.objects)}}

    def locate(self, path: Path) -> tuple[str, Path]:
        """Returns the item of an entry, and the path of its leaf there."""
        return (str(path[0]), path[1:]) if self.item is None else (self.item, path)

    def entries(self, item: str, root: Node) -> Iterator[tuple[Path, Node]]:
        """Yields the entries of an item: a path, and an array or the node of an object."""
        start: Path = () if item == self.item else (item,)
        todo: list[tuple[Path, Node]] = [(start, root)]
        while todo:
            path, node = todo.pop()
            is_whole = bool(path) and name_of(path) in self.objects
            if is_whole or not isinstance(node, BranchNode) or not is_opened(node):
                yield path, node
                continue
            is_list = node.kind == "list"
            keys = [i if is_list else str(key.value) for i, key in enumerate(node.keys)]
            pairs = zip(keys, node.children, strict=True)
            todo += reversed([((*path, key), child) for key, child in pairs])


def _is_item(name: str) -> bool:
    try:
        lower.check_item_name(name)
    except errors.UsageError:
        return False
    return "." not in name


def name_of(path: Path) -> str:
    """Returns the name of an entry."""
    return ".".join(map(str, path))


def path_of(name: str, mapping: Any) -> Path:
    """Returns the path of an entry from a planner's mapping of names to paths.

    It is the name itself where the planner has no mapping, or has renamed the entry.
    """
    path = mapping.get(name) if isinstance(mapping, Mapping) else None
    return tuple(path) if path is not None and name_of(tuple(path)) == name else (name,)


def is_tensor(node: Node) -> bool:
    """Returns whether an entry is a tensor: anything else is an object."""
    return isinstance(node, ArrayNode) and node.kind == "tensor"


def is_opened(node: Node) -> bool:
    """Returns whether PyTorch's planner makes entries of a container's values.

    It opens mappings, and lists that contain tensors or mappings.
    """
    if not isinstance(node, BranchNode):
        return False
    if node.is_mapping or node.kind == "per_rank":
        return True
    return node.kind == "list" and any(is_tensor(each) or is_opened(each) for each in node.children)


def tree_of(leaves: Mapping[Path, Node], item: str) -> Node:
    """Returns the structure of an item from its leaves."""
    if () in leaves and len(leaves) > 1:
        raise _collision(item)
    if () in leaves:
        return leaves[()]
    below: dict[str | int, dict[Path, Node]] = {}
    for path, node in leaves.items():
        below.setdefault(path[0], {})[path[1:]] = node
    children = [tree_of(nodes, f"{item}.{key}") for key, nodes in below.items()]
    if set(below) == set(range(len(below))):
        ordered = [children[list(below).index(i)] for i in range(len(below))]
        return _branch("list", range(len(below)), ordered)
    if len({*map(str, below)}) != len(below):
        raise _collision(item)
    return _branch("dict", map(str, below), children)


def _branch(kind: str, keys: Iterable[str | int], children: Sequence[Node]) -> BranchNode:
    of_kind = "index" if kind == "list" else "key"
    made = tuple(Key(key, of_kind) for key in keys)
    return BranchNode(kind=kind, keys=made, children=tuple(children))


def _collision(item: str) -> errors.UsageError:
    return errors.NameCollisionError(
        f"{item} is an entry of the state dict, and the name of others in it; rename one of them.",
        key_path=item,
    )


def leaf_name(path: Path) -> str:
    """Returns the name on disk of the leaf at a path in its item."""
    return name_of(path) if path else structure.ROOT_NAME
