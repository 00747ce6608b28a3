"""The shape of an item as data: nodes of a pytree whose leaves are values or array specs.

A *structure* describes a lowered item except for the bytes of its arrays: containers and their
types, keys and their types, plain values, and for each array its location. Restores are validated
against it, and records store it as JSON. Free of torch, so that the command line can read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Literal, TypeAlias, TypeGuard

from functional_ckpt.core.arrays import spec as spec_lib

__all__ = [
    "ROOT_NAME",
    "MERGED",
    "ArrayNode",
    "BranchNode",
    "Described",
    "Key",
    "KeyPath",
    "MergedNames",
    "Node",
    "ValueNode",
    "is_names",
    "is_unicode",
    "iter_leaves",
    "join",
    "key_prefix",
    "leaf_name",
    "pretty",
]

# The name on disk of an item that is one bare leaf.
ROOT_NAME = "value"
# Detail of a list of names.
MERGED = "united"


class MergedNames(list[str]):
    """A list of names of which ranks may hold different ones: they are united, like a dict's keys.

    They are the keys of the item's `state`: renamed as these are, and always restored. It comes
    back as a plain list.
    """

    __slots__ = ()


class Described(dict[Any, Any]):
    """A dict with details: its node carries them.

    It is restored as a plain dict. `Handler.target` receives it with these details.

    Attributes:
        detail: JSON values.
    """

    __slots__ = ("detail",)

    def __init__(self, content: Mapping[Any, Any], detail: Mapping[str, object]) -> None:
        super().__init__(content)
        self.detail = detail


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """One step from a container to a child.

    Attributes:
        value: The dict key, the index or the field name.
        kind: `index` for sequences, `key` for everything else.
    """

    value: Hashable
    kind: Literal["index", "key"] = "key"


KeyPath: TypeAlias = tuple[Key, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ValueNode:
    """A leaf whose value lives in the record itself.

    Attributes:
        kind: `none`, `bool`, `int`, `float`, `complex`, `str`, `torch_dtype`, `torch_device`.
        value: The value (a name, for the last two).
    """

    kind: str
    value: object


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArrayNode:
    """A leaf whose bytes are stored in chunks.

    Attributes:
        kind: Its type in memory: `tensor`, `ndarray`, `numpy_scalar`, `bytes`; or `number`, a
            Python number in a foreign checkpoint, stored as a 0-dim array.
        spec: Global shape and dtype on disk.
        name: The array's name on disk; for a tied leaf its own name, at which the same bytes are
            visible too.
        detail: Data of the kind beyond the spec (the torch dtype where it differs, `parameter`,
            `requires_grad`, `strides` ...): JSON values.
        tied_to: Name of the array that holds the bytes, for a leaf that shares another's memory.
    """

    kind: str
    spec: spec_lib.ArraySpec
    name: str
    detail: Mapping[str, object] = dataclasses.field(default_factory=dict)
    tied_to: str | None = None

    @property
    def stored_name(self) -> str:
        """Name of the array that holds the bytes."""
        return self.tied_to or self.name


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BranchNode:
    """A container.

    Attributes:
        kind: `dict`, `ordered_dict`, `default_dict`, `list`, `tuple`, `named_tuple`, `deque`,
            `torch_size`, `registered` (a registered pytree node), `per_rank` (a value that differs
            between ranks, one child for each), or a leaf made of parts:
            `sparse_coo`, `sparse_csr` and its kin, `quantized`, `subclass`.
        keys: One key per child.
        children: The children, in order.
        detail: Data for rebuilding the kind: JSON values.
    """

    kind: str
    keys: tuple[Key, ...]
    children: tuple[Node, ...]
    detail: Mapping[str, object] = dataclasses.field(default_factory=dict)


Node: TypeAlias = ValueNode | ArrayNode | BranchNode


def join(path: KeyPath) -> str:
    """Returns the name of a leaf on disk: its keys joined by dots (Orbax's rule)."""
    return ".".join([str(key.value) for key in path])


def leaf_name(path: KeyPath) -> str:
    """Returns the name on disk of the leaf at `path`.

    >>> leaf_name((Key("a"), Key(0, "index"))), leaf_name(())
    ('a.0', 'value')
    """
    return join(path) if path else ROOT_NAME


def is_unicode(name: str) -> bool:
    """Returns whether a name can be written: it has no lone surrogates."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def key_prefix(name: str) -> str:
    """Returns the prefix of an array's keys: TensorStore's rule, which is Orbax's.

    >>> key_prefix("a.b"), key_prefix("a/"), key_prefix("/")
    ('a.b/', 'a/', '')
    """
    if name in ("", "/"):
        return ""
    return name if name.endswith("/") else f"{name}/"


def pretty(path: KeyPath, root: str = "") -> str:
    """Returns the key path as a person would write it.

    >>> pretty((Key("state"), Key(0), Key(1, "index")), "optimizer")
    "optimizer['state'][0][1]"
    """
    return root + "".join(f"[{key.value!r}]" for key in path)


def is_names(node: object) -> TypeGuard[BranchNode]:
    """Returns whether a node is a list of names, as `Names` lowers to."""
    return isinstance(node, BranchNode) and bool(node.detail.get(MERGED))


def iter_leaves(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
    """Every leaf with its key path, depth first; an empty container counts as a leaf."""
    if not isinstance(node, BranchNode) or not node.children:
        yield path, node
        return
    # One path that grows and shrinks: a copy for every level would be quadratic in the depth.
    keys, todo = list(path), [_pairs(node)]
    while todo:
        for key, child in todo[-1]:
            if isinstance(child, BranchNode) and child.children:
                keys.append(key)
                todo.append(_pairs(child))
                break
            yield (*keys, key), child
        else:
            todo.pop()
            if todo:
                keys.pop()


def _pairs(node: BranchNode) -> Iterator[tuple[Key, Node]]:
    return zip(node.keys, node.children, strict=True)
