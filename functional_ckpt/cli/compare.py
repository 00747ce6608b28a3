"""The differences between two items: structures, then digests, then bytes where those differ."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from functional_ckpt.cli import trees
from functional_ckpt.core.arrays.digests import Digests
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.tree import long_lists, structure
from functional_ckpt.format.checkpoint_dir import OpenItem
from functional_ckpt.format.stored_arrays import SLAB_BYTES, OpenArrays, StoredArray

if TYPE_CHECKING:
    import numpy as np

_Kind: TypeAlias = Literal["only in a", "only in b", "kind", "value", "data"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One leaf that differs.

    Attributes:
        leaf: Its name.
        kind: `only in a`, `only in b`; another `kind` of leaf, container, dtype or shape; another
            plain `value`; other `data` in an array.
        a: The first value as text; None if absent.
        b: The second value as text.
        num_different: For data, how many elements differ.
        num_elements: For data, how many there are.
        max_abs: For data, the largest absolute difference; NaN if one of two is not a number; None
            if the stored values are not numbers (raw bytes, packed dtypes).
    """

    leaf: str
    kind: _Kind
    a: str | None
    b: str | None
    num_different: int | None = None
    num_elements: int | None = None
    max_abs: float | None = None


def compare_items(
    a: OpenItem, b: OpenItem, advance: Callable[[int], None]
) -> Iterator[Difference | None]:
    """Compares two items leaf by leaf: yields a difference, or None for an equal leaf."""
    with contextlib.ExitStack() as files:
        yield from _compare_items(OpenArrays(a, files), OpenArrays(b, files), advance)


def _compare_items(
    first: OpenArrays, second: OpenArrays, advance: Callable[[int], None]
) -> Iterator[Difference | None]:
    a, b = first.opened, second.opened
    is_exact = a.record is not None and b.record is not None
    leaves_a, leaves_b = _leaves(a.root, is_exact=is_exact), _leaves(b.root, is_exact=is_exact)
    if _long_lists(leaves_a) != _long_lists(leaves_b):  # lists that are one leaf on one side only
        roots = long_lists.with_unpacked(a.root), long_lists.with_unpacked(b.root)
        leaves_a, leaves_b = (_leaves(root, is_exact=is_exact) for root in roots)
    if is_exact:
        yield from _compare_containers(a.root, b.root)
    for key, (name, leaf) in leaves_a.items():
        other = leaves_b.get(key)
        if other is None:
            text = trees.describe(leaf)
            yield Difference(leaf=name, kind="only in a", a=text, b=None)
        else:
            yield _compare_leaves(name, first, leaf, second, other[1], advance)
    for key, (name, leaf) in leaves_b.items():
        if key not in leaves_a:
            text = trees.describe(leaf)
            yield Difference(leaf=name, kind="only in b", a=None, b=text)


def _leaves(
    root: structure.Node, *, is_exact: bool
) -> dict[tuple[object, ...], tuple[str, structure.Node]]:
    """Leaves by key path. Native keys distinguish `3` from `"3"`; Orbax has only strings."""
    found: dict[tuple[object, ...], tuple[str, structure.Node]] = {}
    for path, leaf in structure.iter_leaves(root):
        keys = tuple((type(k.value), k.value) if is_exact else str(k.value) for k in path)
        found[keys] = (structure.leaf_name(path), leaf)
    return found


def _long_lists(leaves: Mapping[tuple[object, ...], tuple[str, structure.Node]]) -> set[Any]:
    """Returns the key paths of long lists."""
    return {key for key, (_, leaf) in leaves.items() if long_lists.is_long(leaf)}


def _compare_containers(a: structure.Node, b: structure.Node) -> Iterator[Difference]:
    """Containers at the same key path with different kinds."""
    todo: list[tuple[structure.KeyPath, structure.Node, structure.Node]] = [((), a, b)]
    while todo:
        path, first, second = todo.pop()
        if not isinstance(first, structure.BranchNode) or not isinstance(
            second, structure.BranchNode
        ):
            continue
        is_same = (first.kind, first.detail) == (second.kind, second.detail)
        if not is_same and first.children and second.children:  # empty ones are leaves
            name = structure.join(path) or "(the item itself)"
            yield Difference(leaf=name, kind="kind", a=_container(first), b=_container(second))
        others = {
            (type(k.value), k.value): n for k, n in zip(second.keys, second.children, strict=True)
        }
        for key, child in zip(first.keys, first.children, strict=True):
            if (other := others.get((type(key.value), key.value))) is not None:
                todo.append(((*path, key), child, other))


def _container(node: structure.BranchNode) -> str:
    detail = ", ".join(f"{key}={value}" for key, value in node.detail.items())
    return f"{node.kind} ({detail})" if detail else node.kind


def _compare_leaves(
    name: str,
    a: OpenArrays,
    leaf_a: structure.Node,
    b: OpenArrays,
    leaf_b: structure.Node,
    advance: Callable[[int], None],
) -> Difference | None:
    value_a, value_b = _plain(a, leaf_a), _plain(b, leaf_b)
    if isinstance(value_a, structure.ValueNode) and isinstance(value_b, structure.ValueNode):
        if value_a.kind == value_b.kind and structure.is_same(value_a.value, value_b.value):
            return None
        kind: _Kind = "value" if value_a.kind == value_b.kind else "kind"
        texts = trees.describe(value_a), trees.describe(value_b)
        return Difference(leaf=name, kind=kind, a=texts[0], b=texts[1])
    texts = trees.describe(leaf_a), trees.describe(leaf_b)
    if isinstance(leaf_a, structure.ArrayNode) and isinstance(leaf_b, structure.ArrayNode):
        is_same = leaf_a.spec == leaf_b.spec and leaf_a.dtype == leaf_b.dtype
        if is_same:
            return _compare_data(name, StoredArray(a, leaf_a), StoredArray(b, leaf_b), advance)
    elif texts == texts[::-1] and type(leaf_a) is type(leaf_b):
        return None
    return Difference(leaf=name, kind="kind", a=texts[0], b=texts[1])


def _plain(item: OpenArrays, leaf: structure.Node) -> structure.Node:
    """Converts a foreign number, stored as an array, to a plain number."""
    if not isinstance(leaf, structure.ArrayNode) or leaf.kind != "number":
        return leaf
    value: Any = StoredArray(item, leaf).read(Box.whole(leaf.spec.shape)).item()
    return structure.ValueNode(kind=type(value).__name__, value=value)


# ------------------------------------------------------------------------------------ arrays


def _compare_data(
    name: str, a: StoredArray, b: StoredArray, advance: Callable[[int], None]
) -> Difference | None:
    """Compares two arrays of one spec; equal digests spare the reading."""
    spec = a.node.spec
    num_different, largest = 0, 0.0
    for box, is_same in _regions(spec, a.digests, b.digests):
        advance(box.num_elements * spec.itemsize_bytes)
        if is_same:
            continue
        count, most = _measure(a.read(box), b.read(box))
        num_different += count
        largest = max(largest, most, key=lambda each: math.inf if math.isnan(each) else each)
    if not num_different:
        return None
    text = trees.describe(a.node)
    return Difference(
        leaf=name,
        kind="data",
        a=text,
        b=text,
        num_different=num_different,
        num_elements=spec.num_elements,
        max_abs=largest if a.is_numeric else None,
    )


def _regions(spec: ArraySpec, a: Digests | None, b: Digests | None) -> Iterator[tuple[Box, bool]]:
    """Yields regions that cover two arrays, and whether their recorded digests are equal."""
    if a is None:
        yield from ((box, False) for box in spec.slabs(SLAB_BYTES))
        return
    for index in a.grid.indices():
        is_same = b is not None and a.grid == b.grid and a.of(index) == b.of(index)
        yield a.grid.box(index), is_same


def _measure(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> tuple[int, float]:
    """Returns the number of elements whose bits differ, and the largest difference."""
    import numpy as np

    bits = np.dtype(f"u{a.itemsize}") if a.itemsize <= 8 else np.dtype("u8")
    differ = np.atleast_1d(a).view(bits) != np.atleast_1d(b).view(bits)
    if a.itemsize > 8:  # complex128: either part
        differ = differ.reshape(*np.atleast_1d(a).shape, 2).any(axis=-1)
    if not differ.any():
        return 0, 0.0
    x, y = np.atleast_1d(a)[differ], np.atleast_1d(b)[differ]
    if x.dtype.kind in "iu":
        gaps = np.where(x > y, x, y).astype(np.uint64) - np.where(x > y, y, x).astype(np.uint64)
        return int(differ.sum()), float(gaps.max())
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        gaps = np.abs(x.astype(wide) - y.astype(wide))
    both = np.isnan(x.astype(wide)) & np.isnan(y.astype(wide))
    return int(differ.sum()), float(np.where(both, 0.0, gaps).max())


# ------------------------------------------------------------------------------------ JSON


def compare_json(a: Any, b: Any) -> Iterator[Difference | None]:
    """Compares two JSON values leaf by leaf."""
    todo: list[tuple[str, Any, Any]] = [("", a, b)]
    while todo:
        name, first, second = todo.pop()
        children = _children(first), _children(second)
        if children[0] is None or children[1] is None or type(first) is not type(second):
            is_equal = type(first) is type(second) and first == second
            where = name or "(the value itself)"
            yield (
                None
                if is_equal
                else Difference(leaf=where, kind="value", a=_text(first), b=_text(second))
            )
            continue
        for key in reversed(list({**children[0], **children[1]})):
            dotted = f"{name}.{key}" if name else key
            if key not in children[1]:
                yield Difference(leaf=dotted, kind="only in a", a=_text(children[0][key]), b=None)
            elif key not in children[0]:
                yield Difference(leaf=dotted, kind="only in b", a=None, b=_text(children[1][key]))
            else:
                todo.append((dotted, children[0][key], children[1][key]))


def _children(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, dict):
        return value  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list):
        return {str(index): each for index, each in enumerate(value)}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return None


def _text(value: Any) -> str:
    import json

    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
