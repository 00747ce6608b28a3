"""The shape of an item as data: nodes of a pytree whose leaves are values or array specs.

A *structure* describes a lowered item except for the bytes of its arrays: containers and their
types, keys and their types, plain values, and for each array its location. Restores are validated
against it, and records store it as JSON. Free of torch, so that the command line can read it.
"""

from __future__ import annotations

import collections
import dataclasses
import struct
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, TypeGuard, cast

from functional_ckpt.core.arrays import sharding as sharding_lib
from functional_ckpt.core.arrays import spec as spec_lib

# The name on disk of an item that is one bare leaf.
ROOT_NAME = "value"
# Detail of a list of names.
MERGED = "united"
# Detail of a module's dict: the metadata of its state dict, by the submodules' names.
METADATA = "metadata"
# Detail of a container: the name of the handler whose value stood there.
HANDLER = "handler"
# Detail of a container of one child: that handler made a bare leaf of the value.
BARE = "bare"
# Detail of a value that was saved for each of another number of ranks: [rank, number] here.
RESIZE = "resize"
# Keys of a rank's part of a DTensor over a tensor subclass.
LOCAL, SHARDING = "local", "sharding"
# Kind of a long list, tuple or deque of numbers -> the kind of each.
NUMBERS: Mapping[str, str] = MappingProxyType({"bools": "bool", "ints": "int", "floats": "float"})
_MAPPINGS = ("dict", "ordered_dict", "default_dict", "counter")


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
class Handled:
    """The tree of a value that has a handler of its own, within another tree.

    Attributes:
        tree: The handler's lowered tree, its target, or the restored tree.
        detail: The node's detail: `HANDLER`, and `BARE` or `RESIZE` where they apply.
        item: The value with its handler; None for a stored value without a live one.
        is_per_rank: Whether each rank has one of its own.
        is_kept: Whether the checkpoint has nothing for the live value, which stays as it is.
    """

    tree: Any
    detail: Mapping[str, object] = dataclasses.field(default_factory=dict[str, object])
    item: Any = None
    is_per_rank: bool = False
    is_kept: bool = False


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
        kind: `none`, `bool`, `int`, `float`, `complex`, `str`, `torch_dtype`, `torch_device`, or
            another kind that `plain_json.encode` knows (`path`, `timedelta`, `set` ...); of
            `NUMBERS`, for a long list or tuple of them; `plain_list`, for a long list of others.
        value: The value (a name, for `torch_dtype` and `torch_device`; JSON, for `plain_list`).
    """

    kind: str
    value: object

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ValueNode)
            and self.kind == other.kind
            and is_same(self.value, other.value)
        )


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

    @property
    def dtype(self) -> str:
        """The dtype in memory, where it differs from the one on disk too."""
        return str(self.detail.get("dtype", self.spec.dtype))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BranchNode:
    """A container.

    Attributes:
        kind: `dict`, `ordered_dict`, `default_dict`, `counter`, `list`, `tuple`, `named_tuple`,
            `deque`, `torch_size`, `registered` (a registered pytree node), `per_rank` (a value that
            differs between ranks, one child for each), or a leaf made of parts: `sparse_coo`,
            `sparse_csr` and its kin, `quantized`, `subclass`.
        keys: One key per child.
        children: The children, in order.
        detail: Data for rebuilding the kind: JSON values.
    """

    kind: str
    keys: tuple[Key, ...]
    children: tuple[Node, ...]
    detail: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def is_mapping(self) -> bool:
        """Whether it is a dict of some kind, which may lack some of its keys."""
        return self.kind in _MAPPINGS


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


def rank_key(rank: int) -> str:
    """Returns the key under which a rank's own value is stored."""
    return f"rank_{rank}"


def sharding_text(sharding: sharding_lib.Sharding | None, shape: tuple[int, ...]) -> str:
    """Returns a shape and how it is sharded, in words that two sides compare."""
    if sharding is None:
        return f"{list(shape)}, not sharded"
    cuts = [
        "replicated"
        if cut is None
        else f"dim {cut.dim}" + (f" in {cut.split_factor}" if cut.split_factor > 1 else "")
        for cut in sharding.placements
    ]
    return f"{list(shape)}, {', '.join(cuts)} on a mesh of {list(sharding.mesh_shape)}"


def describe(node: Node) -> str:
    """Returns a node in a few words."""
    if isinstance(node, ArrayNode):
        return f"{node.kind} {node.dtype}{list(node.spec.shape)}"
    if isinstance(node, BranchNode):
        return f"a {node.kind} of {len(node.children)}"
    if is_numbers(node):
        return f"a {type(node.value).__name__} of {len(numbers_of(node))} {node.kind}"
    return "None" if node.kind == "none" else f"{node.kind} {short(node.value)}"


def short(value: object) -> str:
    """Returns the first characters of a value's repr."""
    # Python refuses to print integers of more than 4,300 digits in decimal.
    return f"{hex(value) if type(value) is int and value.bit_length() > 128 else repr(value):.40}"


def tree_of(value: Any) -> Any:
    """Returns the tree of a `Handled`; any other value unchanged."""
    return value.tree if isinstance(value, Handled) else value


def without(node: BranchNode, key: str) -> BranchNode:
    """Returns the node without an entry of its detail."""
    detail = {name: entry for name, entry in node.detail.items() if name != key}
    return dataclasses.replace(node, detail=detail)


def handler_of(node: object) -> str | None:
    """Returns the name of the handler whose value stood at a node; None for plain data."""
    if not isinstance(node, BranchNode) or HANDLER not in node.detail:
        return None
    return str(node.detail[HANDLER])


def is_names(node: object) -> TypeGuard[BranchNode]:
    """Returns whether a node is a list of names, as `MergedNames` lowers to."""
    return isinstance(node, BranchNode) and bool(node.detail.get(MERGED))


def is_numbers(node: object) -> TypeGuard[ValueNode]:
    """Returns whether a node is a long list of numbers of one type."""
    return isinstance(node, ValueNode) and node.kind in NUMBERS


def numbers_of(node: ValueNode) -> Sequence[object]:
    """Returns the numbers of a long list."""
    return cast("Sequence[object]", node.value)


def is_same(a: object, b: object) -> bool:
    """Returns whether two plain values are equal to the bit: `-0.0` is not `0.0`, 1 not `True`."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex) and isinstance(b, complex):
        return is_same(a.real, b.real) and is_same(a.imag, b.imag)
    if isinstance(a, (list, tuple, collections.deque)):
        parts, others = cast("Sequence[object]", a), cast("Sequence[object]", b)
        return (
            len(parts) == len(others)
            and all(map(is_same, parts, others))
            and getattr(a, "maxlen", None) == getattr(b, "maxlen", None)
        )
    if a is None or isinstance(a, (int, str, set, frozenset)):
        return a == b
    return a == b and repr(a) == repr(b)  # equal decimals and times may be written differently


def iter_leaves(
    node: Node, path: KeyPath = (), leaf_kinds: Collection[str] = ()
) -> Iterator[tuple[KeyPath, Node]]:
    """Yields every leaf with its key path, depth first; an empty container counts as a leaf.

    Args:
        node: The structure.
        path: Its key path.
        leaf_kinds: Kinds of containers that count as leaves.
    """
    if not isinstance(node, BranchNode) or not node.children or node.kind in leaf_kinds:
        yield path, node
        return
    # One path that grows and shrinks: a copy for every level would be quadratic in the depth.
    keys, todo = list(path), [_pairs(node)]
    while todo:
        for key, child in todo[-1]:
            if isinstance(child, BranchNode) and child.children and child.kind not in leaf_kinds:
                keys.append(key)
                todo.append(_pairs(child))
                break
            yield (*keys, key), child
        else:
            todo.pop()
            if todo:
                keys.pop()


def iter_arrays(root: Node) -> Iterator[ArrayNode]:
    """Every array, in the order of `iter_leaves`."""
    todo = [root]
    while todo:
        node = todo.pop()
        if isinstance(node, ArrayNode):
            yield node
        elif isinstance(node, BranchNode):
            todo.extend(reversed(node.children))


def _pairs(node: BranchNode) -> Iterator[tuple[Key, Node]]:
    return zip(node.keys, node.children, strict=True)
