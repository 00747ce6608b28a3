"""Matches a stored structure with a target, leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.restore_plan import keep, targets
from functional_ckpt.core.restore_plan.plan import (
    Binding,
    Bound,
    Build,
    Filled,
    Given,
    ReadArray,
    RestoreReport,
)
from functional_ckpt.core.tree import (
    composite,
    encode,
    flatten,
    long_lists,
    memory,
    structure,
    walk,
)
from functional_ckpt.core.tree.placeholders import AS_SAVED, NOTHING, Fill, Refused
from functional_ckpt.core.tree.structure import KeyPath

_LEAVES = (Fill, Refused, torch.Tensor)
_HANDLED = structure.BranchNode(kind="handled", keys=(), children=())
_Pair: TypeAlias = tuple[structure.Node | None, Any, KeyPath]
"""Stored node (None if absent), target value and key path."""


def match(
    saved: structure.Node,
    target: Any,
    *,
    item: str,
    cast_to_target: bool = False,
    selects: Callable[[str], bool] | None = None,
    lifts: Callable[[structure.BranchNode], bool | None] | None = None,
) -> Bound:
    """Binds every leaf of a target to its stored leaf.

    Args:
        saved: The stored structure, or the result of `keep_unselected`.
        target: A pytree as `Handler.target` returns it.
        item: The item's name, for messages.
        cast_to_target: Whether an array of another dtype may be converted to the target's.
        selects: Which stored leaves the target is about, by name; the others are left alone.
        lifts: Whether a handler makes a value of a node that is taken as saved; None for a handler
            that is not there, which is a mismatch. Without `lifts`, all comes back as plain data:
            the trees of handlers, and a tensor subclass as a dict of its parts; with it, such a
            tensor is of its class, and a class that this process does not know is a mismatch.
    """
    matching = _Matching(item, cast_to_target, selects or (lambda name: True), lifts)
    binding = walk.fold((saved, target, ()), matching.visit)
    return Bound(
        binding=binding,
        report=RestoreReport(
            missing=tuple(matching.missing),
            unexpected=tuple(matching.unexpected),
            mismatched=tuple(matching.mismatched),
        ),
        filled=tuple(matching.filled),
        is_nested=matching.is_nested,
    )


class _Matching:
    """The mutable state of one `match` call."""

    def __init__(
        self,
        item: str,
        cast_to_target: bool,
        selects: Callable[[str], bool],
        lifts: Callable[[structure.BranchNode], bool | None] | None,
    ) -> None:
        self.item = item
        self.cast_to_target = cast_to_target
        self.selects = selects
        self.lifts = lifts
        self.is_nested = False
        self.filled: list[Filled] = []
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.mismatched: list[str] = []

    def visit(self, entry: _Pair) -> walk.Visit[_Pair, Binding]:
        saved, target, path = entry
        if (  # most leaves: few questions
            isinstance(target, Fill)
            and targets.is_filled_as_it_is(saved, target.tensor)
            and self.selects(structure.leaf_name(path))
        ):
            read = ReadArray(node=saved, form="fill", like=target.tensor)
            self.filled.append(Filled(item=self.item, path=path, read=read))
            return walk.leaf(read)
        if isinstance(target, structure.Handled):
            return self._visit_handled(saved, target, path)
        if saved is None:
            return walk.leaf(self._absent(target, path))
        if keep.is_own(saved):
            self.is_nested = True
            return walk.leaf(Given(targets.own_value(cast("structure.ValueNode", saved).value)))
        if target is AS_SAVED:
            return walk.leaf(self._as_saved(saved, path))
        if isinstance(target, Refused):
            found = structure.describe(saved)
            return walk.leaf(self._differs(path, target.expected, found, target.own))
        saved, path = targets.inside(saved, path)
        if not self._is_wanted(saved, target, path):
            return walk.leaf(Given(targets.own_value(target)))
        if long_lists.is_long(saved):
            if (values := long_lists.like(saved, target)) is not None:
                return walk.leaf(Given(values))
            saved = long_lists.unpacked(saved)
        opened = None if isinstance(target, _LEAVES) else flatten.flatten_one_level(target)
        if opened is None:
            return walk.leaf(self._bind_leaf(saved, target, path))
        if not isinstance(saved, structure.BranchNode):
            return walk.leaf(
                self._differs(path, f"a {opened.kind}", structure.describe(saved), target)
            )
        return self._bind_container(saved, target, opened, path)

    def _visit_handled(
        self, saved: structure.Node | None, target: structure.Handled, path: KeyPath
    ) -> walk.Visit[_Pair, Binding]:
        self.is_nested = True
        if saved is None:
            return walk.leaf(self._absent(target, path))
        if target.is_kept or keep.is_own(saved):
            return walk.leaf(Given(targets.own_value(target)))
        if structure.handler_of(saved) is not None:
            saved = structure.without(cast("structure.BranchNode", saved), structure.HANDLER)
        inner, inner_path = targets.inside(saved, path)
        return [(inner, target.tree, inner_path)], lambda bound: Build(
            node=_HANDLED, children=tuple(bound), like=target
        )

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
        self, saved: structure.BranchNode, target: Any, opened: flatten.FlatNode, path: KeyPath
    ) -> walk.Visit[_Pair, Binding]:
        """Pairs children by the text of their keys: foreign checkpoints have only str keys."""
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
        return children, lambda bound: targets.built(opened, bound, target)

    def _not_expected(self, node: structure.Node, path: KeyPath) -> None:
        for inner, leaf in structure.iter_leaves(node, path):
            if not keep.is_own(leaf) and self.selects(structure.leaf_name(inner)):
                self.unexpected.append(structure.pretty(inner, self.item))

    def _absent(self, target: Any, path: KeyPath) -> Binding:
        todo: list[tuple[Any, KeyPath]] = [(target, path)]
        while todo:
            current, path = todo.pop()
            if isinstance(current, structure.Handled):
                todo.append((current.tree, path))
                continue
            opened = None if isinstance(current, _LEAVES) else flatten.flatten_one_level(current)
            if opened is not None and opened.children:
                pairs = zip(reversed(opened.keys), reversed(opened.children), strict=True)
                todo.extend((child, (*path, key)) for key, child in pairs)
            elif current is not AS_SAVED and self.selects(structure.leaf_name(path)):
                self.missing.append(structure.pretty(path, self.item))
        return Given(targets.own_value(target))

    # -------------------------------------------------------------------------- leaves

    def _bind_tensor(
        self, saved: structure.Node, tensor: torch.Tensor, path: KeyPath, *, fill: bool
    ) -> Binding:
        own = Fill(tensor) if fill else tensor
        if fill and structure.handler_of(saved) and sharding.sharding_of(tensor) is not None:
            return self._bind_local_parts(cast("structure.BranchNode", saved), tensor, path)
        if (wrong := targets.why_wrong(tensor)) is not None:
            return self._refuse(path, f"cannot be restored into: {wrong}", own)
        opened = None if tensor.is_meta else flatten.flatten_one_level(tensor)
        if opened is not None:
            return self._bind_parts(saved, tensor, opened, path, fill=fill)
        dtype, shape = encode.torch_dtype_name(tensor.dtype), tuple(tensor.shape)
        expected = f"tensor {dtype}{list(shape)}"
        if not isinstance(saved, structure.ArrayNode) or saved.kind in ("bytes", "number"):
            is_number = isinstance(saved, structure.ArrayNode) and saved.kind == "number"
            if not (is_number and shape == ()):
                return self._differs(path, expected, structure.describe(saved), own)
        node = cast("structure.ArrayNode", saved)
        if node.spec.shape != shape:
            return self._differs(path, expected, structure.describe(saved), own)
        if fill and not tensor.is_contiguous() and memory.is_expanded(tensor):
            shared = "memory for each element (it is expanded: clone() it)"
            return self._differs(path, shared, structure.describe(saved), own)
        if targets.stored_dtype(node) != dtype and not self.cast_to_target:
            hint = " (pass cast=True to convert)"
            return self._differs(path, expected, structure.describe(saved) + hint, own)
        read = ReadArray(node=node, form="fill" if fill else "tensor", like=tensor)
        if fill or tensor.is_meta:  # a module's tensors on the meta device are given memory
            self.filled.append(Filled(item=self.item, path=path, read=read))
        elif not memory.can_be_imitated(tensor):
            wanted = f"a {type(tensor).__name__}, whose class is not stored"
            return self._differs(path, wanted, structure.describe(saved), own)
        return read

    def _bind_local_parts(
        self, saved: structure.BranchNode, tensor: torch.Tensor, path: KeyPath
    ) -> Binding:
        """Binds a DTensor over a subclass to this rank's part; the sharding must be as saved."""
        stored = {
            str(key.value): child for key, child in zip(saved.keys, saved.children, strict=True)
        }
        text = stored.get(structure.SHARDING)
        expected = structure.sharding_text(sharding.sharding_of(tensor), tuple(tensor.shape))
        found = text.value if isinstance(text, structure.ValueNode) else structure.describe(saved)
        if found != expected:
            return self._differs(path, expected, str(found), Fill(tensor))
        local = sharding.local_of(tensor)
        opened = flatten.flatten_one_level(local)
        if opened is None:
            return self._differs(path, "a DTensor of plain tensors", str(found), Fill(tensor))
        bound = self._bind_parts(stored[structure.LOCAL], local, opened, path, fill=True)
        if isinstance(bound, Build):
            return dataclasses.replace(bound, result=tensor)
        return Given(tensor)

    def _bind_parts(
        self,
        saved: structure.Node,
        tensor: torch.Tensor,
        opened: flatten.FlatNode,
        path: KeyPath,
        *,
        fill: bool,
    ) -> Binding:
        """Sparse, quantized and subclass tensors: built from their parts as saved, of any size."""
        own = Fill(tensor) if fill else tensor
        if not isinstance(saved, structure.BranchNode) or saved.kind != opened.kind:
            return self._differs(path, f"a {opened.kind} tensor", structure.describe(saved), own)
        if saved.detail.get("shape") != opened.detail.get("shape"):
            return self._differs(
                path, f"shape {opened.detail.get('shape')}", f"{saved.detail.get('shape')}", own
            )
        stored = dict(zip(saved.keys, saved.children, strict=True))
        for key, part in zip(opened.keys, opened.children, strict=True):
            expected, got = targets.dtype_of(part), stored.get(key)
            if expected is not None and (got is None or targets.stored_dtype(got) != expected):
                found = "nothing" if got is None else structure.describe(got)
                return self._differs((*path, key), f"dtype {expected}", found, own)
        children = tuple(
            self._as_saved(child, (*path, key))
            for key, child in zip(saved.keys, saved.children, strict=True)
        )
        dressing = ("parameter", "requires_grad", "buffer")
        detail = {key: value for key, value in saved.detail.items() if key not in dressing}
        return Build(
            node=dataclasses.replace(saved, detail={**detail, **encode.tensor_role(tensor)}),
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
            wanted = encode.array_node(target, saved.name)
            if (
                wanted is None
                or wanted.spec != saved.spec
                or targets.stored_dtype(wanted) != targets.stored_dtype(saved)
            ):
                expected = f"ndarray {target.dtype}{list(target.shape)}"
                return self._differs(path, expected, structure.describe(saved), target)
            return ReadArray(
                node=saved, form="as_saved" if saved.kind == wanted.kind else "ndarray"
            )
        is_number = type(target) in (bool, int, float, complex)
        if (saved.kind == "bytes" and type(target) is bytes) or (
            saved.kind == "number" and (is_number or target is None)
        ):
            return ReadArray(node=saved, form="as_saved")
        return self._differs(path, targets.describe(target), structure.describe(saved), target)

    def _bind_value(self, saved: structure.Node, target: Any, path: KeyPath) -> Binding:
        wanted = encode.value_node(target)
        if wanted is None:
            expected = targets.describe(target)
            return self._differs(path, expected, structure.describe(saved), target)
        if not isinstance(saved, structure.ValueNode):
            return self._differs(path, targets.describe(target), structure.describe(saved), target)
        numbers = ("none", "bool", "int", "float", "complex")
        if saved.kind != wanted.kind and not (saved.kind in numbers and wanted.kind in numbers):
            return self._differs(path, targets.describe(target), structure.describe(saved), target)
        return Given(encode.plain_value(saved))

    def _differs(self, path: KeyPath, expected: str, got: str, target: Any) -> Binding:
        why = f"the target expects {expected}, the checkpoint has {got}"
        return self._refuse(path, why, target)

    def _refuse(self, path: KeyPath, why: str, target: Any) -> Binding:
        self.mismatched.append(f"{structure.pretty(path, self.item)}: {why}")
        return Given(NOTHING if target is NOTHING else targets.own_value(target))

    # -------------------------------------------------------------------------- as saved

    def _as_saved(self, root: structure.Node, path: KeyPath) -> Binding:
        trail: walk.Trail[structure.Key] = walk.Trail()

        def visit(entry: _Entry) -> walk.Visit[_Entry, Binding]:
            node, key, depth = entry
            trail.enter(depth, key)
            if isinstance(node, structure.ValueNode):
                own = keep.is_own(node)
                return walk.leaf(
                    Given(targets.own_value(node.value) if own else encode.plain_value(node))
                )
            if isinstance(node, structure.ArrayNode):
                return walk.leaf(ReadArray(node=node, form="as_saved"))
            if node.detail.get(keep.INCOMPLETE):
                raise self._incomplete(node, (*path, *trail.path()))
            if structure.handler_of(node) is not None:
                node = self._saved_by_handler(node, (*path, *trail.path()))
            if node.kind == "subclass":
                if self.lifts is None:
                    node = structure.without(node, "class")
                elif not composite.is_known(node):
                    self._unknown_class(node, (*path, *trail.path()))
            pairs = zip(node.children, node.keys, strict=True)
            return [(child, at, depth + 1) for child, at in pairs], lambda bound: Build(
                node=node, children=tuple(bound)
            )

        return walk.fold((root, None, 0), visit)

    def _saved_by_handler(self, node: structure.BranchNode, path: KeyPath) -> structure.BranchNode:
        """Returns the node, if its handler makes a value of it; else as plain data."""
        is_lifted = False if self.lifts is None else self.lifts(node)
        if is_lifted is None:
            self.mismatched.append(
                f"{structure.pretty(path, self.item)}: {structure.handler_of(node)} saved it, and "
                "neither has the target such a value nor the registry this handler; pass the "
                "registry that it was saved with"
            )
        self.is_nested = self.is_nested or bool(is_lifted)
        return node if is_lifted else structure.without(node, structure.HANDLER)

    def _incomplete(self, node: structure.BranchNode, path: KeyPath) -> errors.UsageError:
        where = structure.pretty(path, self.item)
        return errors.UsageError(
            f"{where}, a {node.kind}, cannot be restored in part: the target has no values for the "
            "rest. Select or ignore all of it.",
            key_path=where,
        )

    def _unknown_class(self, node: structure.BranchNode, path: KeyPath) -> None:
        name = node.detail.get("class", "whose class the checkpoint does not name")
        self.mismatched.append(
            f"{structure.pretty(path, self.item)}: the checkpoint has a tensor subclass, {name}, "
            "which this process does not know; import its class before the restore, or restore "
            "into a value that has such a tensor"
        )


_Entry: TypeAlias = tuple[structure.Node, "structure.Key | None", int]
