"""What a restore will do, worked out and validated in full before anything is read into place.

`match` walks a stored structure and a target side by side and returns a *binding* for every leaf,
or collects what does not fit. Pure: nothing is read, nothing the caller passed is touched.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch

from functional_ckpt import errors
from functional_ckpt.core import leaves, parts, structure, tree, walk
from functional_ckpt.core.spec import ArraySpec
from functional_ckpt.core.structure import KeyPath
from functional_ckpt.core.target import AS_SAVED, Fill

__all__ = [
    "Binding",
    "Bound",
    "Build",
    "Given",
    "ReadArray",
    "RestoreReport",
    "match",
    "prune",
    "raise_report",
    "specs",
]


_PARTS = parts.KINDS
_LEAVES = (Fill, torch.Tensor)
_Place: TypeAlias = tuple[structure.Node, KeyPath]
_Pair: TypeAlias = tuple[structure.Node | None, Any, KeyPath]
"""What is stored (None for nothing), what the target has there, and where."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What a restore left out, as `item['key']` texts; all empty when checkpoint and target agree.

    Attributes:
        missing: Expected by the target, absent from the checkpoint; the target kept its own value.
        unexpected: In the checkpoint, without a place in the target; not read.
        mismatched: Different in kind, shape or dtype; the target kept its own value.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = {
            "missing from the checkpoint": self.missing,
            "not expected by the target": self.unexpected,
            "different": self.mismatched,
        }
        lines = [f"  {what}: {leaf}" for what, found in parts.items() for leaf in found]
        return "\n".join(lines) or "  everything matched"


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """A leaf whose value is known without reading."""

    value: Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReadArray:
    """An array to be read.

    Attributes:
        node: What is stored.
        form: What becomes of it: `as_saved`, `tensor` (new), `ndarray` (new), or `fill`.
        like: The tensor to fill or imitate, for `fill` and `tensor`.
    """

    node: structure.ArrayNode
    form: Literal["as_saved", "tensor", "ndarray", "fill"]
    like: Any = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A container to be built from its children.

    Attributes:
        node: What is stored, or a node of the target's own keys.
        children: Their bindings.
        like: The target's container, or None to build what was saved.
        into: A tensor that receives the built value by `copy_`, for tensors made of parts.
    """

    node: structure.BranchNode
    children: tuple[Binding, ...]
    like: Any = None
    into: Any = None


Binding: TypeAlias = Given | ReadArray | Build


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The outcome of `match`.

    Attributes:
        binding: What to do for the whole item.
        report: What did not fit.
    """

    binding: Binding
    report: RestoreReport


def specs(node: structure.Node) -> Any:
    """The tree a structure describes, with an `ArraySpec` in place of every array."""
    return walk.fold(node, _visit_specs)


def _visit_specs(node: structure.Node) -> walk.Visit[structure.Node, Any]:
    if isinstance(node, structure.ArrayNode):
        return walk.leaf(node.spec)
    if isinstance(node, structure.ValueNode):
        return walk.leaf(leaves.plain_value(node))

    def build(children: list[Any]) -> Any:
        if node.kind in _PARTS or node.kind == "registered":  # neither is made of specs
            return dict(zip([key.value for key in node.keys], children, strict=True))
        return tree.close_container(node, children)

    return node.children, build


def prune(
    node: structure.Node, keep: Callable[[str], bool], path: KeyPath = ()
) -> structure.Node | None:
    """The part of a structure whose leaf names `keep` accepts; None when nothing is left.

    A dict loses the keys that are left out; in a sequence, named tuple or registered node None
    takes their place.
    """

    def visit(place: _Place) -> walk.Visit[_Place, structure.Node | None]:
        current, where = place
        is_leaf = not isinstance(current, structure.BranchNode) or not current.children
        if is_leaf or current.kind in _PARTS:
            return walk.leaf(current if keep(structure.leaf_name(where)) else None)
        branch = cast("structure.BranchNode", current)
        pairs = zip(branch.children, branch.keys, strict=True)
        return [(child, (*where, key)) for child, key in pairs], functools.partial(_pruned, branch)

    return walk.fold((node, path), visit)


def _pruned(
    node: structure.BranchNode, children: Sequence[structure.Node | None]
) -> structure.Node | None:
    if all(child is None for child in children):
        return None
    pairs = list(zip(node.keys, children, strict=True))
    if node.kind in ("dict", "ordered_dict", "default_dict", "counter"):
        pairs = [(key, child) for key, child in pairs if child is not None]
    nothing = structure.ValueNode(kind="none", value=None)
    return dataclasses.replace(
        node,
        keys=tuple(key for key, _ in pairs),
        children=tuple(child or nothing for _, child in pairs),
    )


def match(
    saved: structure.Node,
    target: Any,
    *,
    item: str,
    cast_to_target: bool = False,
    selects: Callable[[str], bool] | None = None,
) -> Bound:
    """Binds every leaf of a target to what is stored for it.

    Args:
        saved: The stored structure.
        target: A pytree as `Handler.target` returns it.
        item: The item's name, for messages.
        cast_to_target: Whether an array of another dtype may be converted to the target's.
        selects: Which stored leaves the target is about, by name; the others are left alone.
    """
    matching = _Matching(item, cast_to_target, selects or (lambda name: True))
    binding = walk.fold((saved, target, ()), matching.visit)
    return Bound(
        binding=binding,
        report=RestoreReport(
            missing=tuple(matching.missing),
            unexpected=tuple(matching.unexpected),
            mismatched=tuple(matching.mismatched),
        ),
    )


class _Matching:
    """The mutable state of one `match` call."""

    def __init__(self, item: str, cast_to_target: bool, selects: Callable[[str], bool]) -> None:
        self.item = item
        self.cast_to_target = cast_to_target
        self.selects = selects
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.mismatched: list[str] = []

    def visit(self, place: _Pair) -> walk.Visit[_Pair, Binding]:
        saved, target, path = place
        if saved is None:
            return walk.leaf(self._absent(target, path))
        if target is AS_SAVED:
            return walk.leaf(_as_saved(saved))
        if not self._is_wanted(saved, target, path):
            return walk.leaf(Given(_own_value(target)))
        opened = None if isinstance(target, _LEAVES) else tree.open_container(target)
        if opened is None:
            return walk.leaf(self._bind_leaf(saved, target, path))
        if not isinstance(saved, structure.BranchNode):
            return walk.leaf(self._differs(path, f"a {opened.kind}", _describe(saved), target))
        return self._bind_container(saved, target, opened, path)

    def _bind_leaf(self, saved: structure.Node, target: Any, path: KeyPath) -> Binding:
        if isinstance(target, Fill):
            return self._bind_tensor(saved, target.tensor, path, fill=True)
        if isinstance(target, torch.Tensor):
            return self._bind_tensor(saved, target, path, fill=False)
        if isinstance(saved, structure.ArrayNode):
            return self._bind_array(saved, target, path)
        return self._bind_value(saved, target, path)

    def _is_wanted(self, saved: structure.Node, target: Any, path: KeyPath) -> bool:
        is_leaf = not isinstance(saved, structure.BranchNode) or isinstance(target, _LEAVES)
        return not is_leaf or self.selects(structure.leaf_name(path))

    # -------------------------------------------------------------------------- containers

    def _bind_container(
        self, saved: structure.BranchNode, target: Any, opened: tree.Opened, path: KeyPath
    ) -> walk.Visit[_Pair, Binding]:
        """Children are paired by what their keys read as: others know no keys but strings."""
        pairs = list(zip(saved.keys, saved.children, strict=True))
        stored = {str(key.value): child for key, child in pairs}
        wanted = {str(key.value) for key in opened.keys}
        for key, child in pairs:
            if str(key.value) not in wanted:
                self._not_expected(child, (*path, key))
        children: list[_Pair] = [
            (stored.get(str(key.value)), child, (*path, key))
            for key, child in zip(opened.keys, opened.children, strict=True)
        ]
        return children, lambda bound: Build(node=opened.node(), children=tuple(bound), like=target)

    def _not_expected(self, node: structure.Node, path: KeyPath) -> None:
        for inner, _ in structure.iter_leaves(node, path):
            if self.selects(structure.leaf_name(inner)):
                self.unexpected.append(structure.pretty(inner, self.item))

    def _absent(self, target: Any, path: KeyPath) -> Binding:
        todo: list[tuple[Any, KeyPath]] = [(target, path)]
        while todo:
            current, place = todo.pop()
            opened = None if isinstance(current, _LEAVES) else tree.open_container(current)
            if opened is not None and opened.children:
                pairs = zip(reversed(opened.keys), reversed(opened.children), strict=True)
                todo.extend((child, (*place, key)) for key, child in pairs)
            elif current is not AS_SAVED and self.selects(structure.leaf_name(place)):
                self.missing.append(structure.pretty(place, self.item))
        return Given(_own_value(target))

    # -------------------------------------------------------------------------- leaves

    def _bind_tensor(
        self, saved: structure.Node, tensor: torch.Tensor, path: KeyPath, *, fill: bool
    ) -> Binding:
        keep = Fill(tensor) if fill else tensor
        opened = None if tensor.is_meta else tree.open_container(tensor)
        if opened is not None:
            return self._bind_parts(saved, tensor, opened, path, fill=fill)
        dtype, shape = leaves.torch_dtype_name(tensor.dtype), tuple(tensor.shape)
        expected = f"tensor {dtype}{list(shape)}"
        if not isinstance(saved, structure.ArrayNode) or saved.kind in ("bytes", "number"):
            is_number = isinstance(saved, structure.ArrayNode) and saved.kind == "number"
            if not (is_number and shape == ()):
                return self._differs(path, expected, _describe(saved), keep)
        node = cast("structure.ArrayNode", saved)
        if node.spec.shape != shape:
            return self._differs(path, expected, _describe(saved), keep)
        if _stored_dtype(node) != dtype and not self.cast_to_target:
            hint = " (pass cast='target' to convert)"
            return self._differs(path, expected, _describe(saved) + hint, keep)
        return ReadArray(node=node, form="fill" if fill else "tensor", like=tensor)

    def _bind_parts(
        self,
        saved: structure.Node,
        tensor: torch.Tensor,
        opened: tree.Opened,
        path: KeyPath,
        *,
        fill: bool,
    ) -> Binding:
        """Sparse, quantized and subclass tensors: built from their parts as saved, of any size."""
        keep = Fill(tensor) if fill else tensor
        if not isinstance(saved, structure.BranchNode) or saved.kind != opened.kind:
            return self._differs(path, f"a {opened.kind} tensor", _describe(saved), keep)
        if saved.detail.get("shape") != opened.detail.get("shape"):
            return self._differs(
                path, f"shape {opened.detail.get('shape')}", f"{saved.detail.get('shape')}", keep
            )
        stored = dict(zip(saved.keys, saved.children, strict=True))
        for key, part in zip(opened.keys, opened.children, strict=True):
            expected, got = _dtype_of(part), stored.get(key)
            if expected is not None and (got is None or _stored_dtype(got) != expected):
                found = "nothing" if got is None else _describe(got)
                return self._differs((*path, key), f"dtype {expected}", found, keep)
        children = tuple(_as_saved(child) for child in saved.children)
        dressing = ("parameter", "requires_grad", "buffer")
        detail = {key: value for key, value in saved.detail.items() if key not in dressing}
        return Build(
            node=dataclasses.replace(saved, detail={**detail, **leaves.dressing(tensor)}),
            children=children,
            like=tensor,
            into=tensor if fill else None,
        )

    def _bind_array(self, saved: structure.ArrayNode, target: Any, path: KeyPath) -> Binding:
        if isinstance(target, ArraySpec):
            if target != saved.spec:
                return self._differs(path, str(target), str(saved.spec), target)
            return ReadArray(node=saved, form="as_saved")
        if isinstance(target, (np.ndarray, np.generic)):
            wanted = leaves.array_node(target, saved.name)
            if (
                wanted is None
                or wanted.spec != saved.spec
                or _stored_dtype(wanted) != _stored_dtype(saved)
            ):
                expected = f"ndarray {target.dtype}{list(target.shape)}"
                return self._differs(path, expected, _describe(saved), target)
            return ReadArray(
                node=saved, form="as_saved" if saved.kind == wanted.kind else "ndarray"
            )
        is_number = type(target) in (bool, int, float, complex)
        if (saved.kind == "bytes" and type(target) is bytes) or (
            saved.kind == "number" and (is_number or target is None)
        ):
            return ReadArray(node=saved, form="as_saved")
        return self._differs(path, _describe_value(target), _describe(saved), target)

    def _bind_value(self, saved: structure.Node, target: Any, path: KeyPath) -> Binding:
        wanted = leaves.value_node(target)
        if wanted is None:
            expected = _describe_value(target)
            return self._differs(path, expected, _describe(saved), target)
        if not isinstance(saved, structure.ValueNode):
            return self._differs(path, _describe_value(target), _describe(saved), target)
        numbers = ("none", "bool", "int", "float", "complex")
        if saved.kind != wanted.kind and not (saved.kind in numbers and wanted.kind in numbers):
            return self._differs(path, _describe_value(target), _describe(saved), target)
        return Given(leaves.plain_value(saved))

    def _differs(self, path: KeyPath, expected: str, got: str, target: Any) -> Binding:
        where = structure.pretty(path, self.item)
        self.mismatched.append(f"{where}: the target expects {expected}, the checkpoint has {got}")
        return Given(_own_value(target))


def _as_saved(root: structure.Node) -> Binding:
    def visit(node: structure.Node) -> walk.Visit[structure.Node, Binding]:
        if isinstance(node, structure.ValueNode):
            return walk.leaf(Given(leaves.plain_value(node)))
        if isinstance(node, structure.ArrayNode):
            return walk.leaf(ReadArray(node=node, form="as_saved"))
        return node.children, lambda bound: Build(node=node, children=tuple(bound))

    return walk.fold(root, visit)


def _dtype_of(part: object) -> str | None:
    """The dtype of a part that is one tensor; None for numbers and for parts made of parts."""
    if not isinstance(part, torch.Tensor) or tree.open_container(part) is not None:
        return None
    return leaves.torch_dtype_name(part.dtype)


def _stored_dtype(node: structure.Node) -> str | None:
    if not isinstance(node, structure.ArrayNode):
        return None
    return str(node.detail.get("dtype", node.spec.dtype))


def _own_value(target: Any) -> Any:
    """What a target keeps when the checkpoint has nothing for it."""
    return tree.map_leaves(_own_leaf, target)


def _own_leaf(target: Any) -> Any:
    if isinstance(target, Fill):
        return target.tensor
    return None if target is AS_SAVED else target


def _describe(node: structure.Node) -> str:
    if isinstance(node, structure.ArrayNode):
        return f"{node.kind} {_stored_dtype(node)}{list(node.spec.shape)}"
    if isinstance(node, structure.ValueNode):
        return "None" if node.kind == "none" else f"{node.kind} {_short(node.value)}"
    return f"a {node.kind} of {len(node.children)}"


def _describe_value(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {_short(value)}"


def _short(value: object) -> str:
    # Python refuses to print integers of more than 4,300 digits in decimal.
    return f"{hex(value) if type(value) is int and value.bit_length() > 128 else repr(value):.40}"


def raise_report(reports: Mapping[str, RestoreReport], *, step: int | None, path: str) -> None:
    """Raises one `MismatchError` for everything that did not fit, in all items."""
    missing = [leaf for report in reports.values() for leaf in report.missing]
    unexpected = [leaf for report in reports.values() for leaf in report.unexpected]
    mismatched = [leaf for report in reports.values() for leaf in report.mismatched]
    if not (missing or unexpected or mismatched):
        return
    body = "\n".join(str(report) for report in reports.values() if report)
    where = "checkpoint" if step is None else f"step {step}"
    raise errors.MismatchError(
        f"Cannot restore {where} of {path} into the target; nothing was touched.\n"
        f"{_shorten(body)}\n"
        "Give a target that fits, choose leaves with only=, or pass strict=False to keep the "
        "target's own values for these.",
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
        step=step,
        path=path,
    )


def _shorten(text: str, num_lines: int = 200) -> str:
    lines: Sequence[str] = text.splitlines()
    if len(lines) <= num_lines:
        return text
    more = f"  ... and {len(lines) - num_lines} more (see the error's fields)"
    return "\n".join([*lines[:num_lines], more])
