"""Targets of an item: of its handler, and of the handlers of values in its tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.core.restore_plan import plan
from functional_ckpt.core.tree import structure
from functional_ckpt.core.tree.composite import KINDS
from functional_ckpt.core.tree.placeholders import AS_SAVED, NOTHING
from functional_ckpt.core.tree.structure import Handled, KeyPath
from functional_ckpt.handlers import nested
from functional_ckpt.handlers.base import Handler, Item, Registry
from functional_ckpt.handlers.module import ModuleHandler


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The target of an item.

    Attributes:
        tree: The target for `match`; None if nothing can be restored into it.
        report: The mismatches that handlers found.
        inside: The values in the tree that have handlers, by the prefix of their leaves' names.
    """

    tree: Any
    report: plan.RestoreReport
    inside: Mapping[str, Item]


def target_of(
    item: Item,
    saved: Any,
    *,
    name: str,
    registry: Registry,
    may_differ: Callable[[errors.MismatchError], bool],
) -> Target:
    """Returns the target, from the item's handler and those of the values in its tree."""
    reports: list[plan.RestoreReport] = []
    inside: dict[str, Item] = {}
    tree = _ask(item, saved, "", name, reports, may_differ)

    def make(each: Item, stored: Any, path: KeyPath) -> Handled:
        inside[structure.join(path)] = each
        if stored is NOTHING:
            return Handled(each.handler.own(each.value), item=each, is_kept=True)
        detail: Mapping[str, object] = {}
        if isinstance(stored, Handled):
            if stored.is_kept:
                return Handled(None, item=each, is_kept=True)
            stored, detail = stored.tree, stored.detail
        wanted: Any = AS_SAVED
        where = structure.pretty(path, name)
        if structure.RESIZE in detail:
            wrong = why_not_resizable(each.handler, len(stored), *_sizes(detail), where)
            reports.append(wrong)
            wanted = None if wrong else AS_SAVED
        elif each.value is not None:
            wanted = _ask(each, stored, where, name, reports, may_differ)
        if wanted is None:
            return Handled(None, item=each, is_kept=True)
        return Handled(wanted, detail, each)

    if tree is not None:
        tree = nested.place(registry, tree, saved, item, make)
    return Target(tree=tree, report=plan.merge(reports), inside=inside)


def with_module_names(root: structure.Node, item: Item, registry: Registry) -> structure.Node:
    """Returns the renamed structure, in which the name of each module's tensor is one key."""
    paths: list[KeyPath] = []

    def note(each: Item, _: Any, path: KeyPath) -> Handled:
        if isinstance(each.handler, ModuleHandler):
            paths.append(path)
        return Handled(None, item=each, is_kept=True)

    nested.place(registry, item.handler.own(item.value), NOTHING, item, note)
    for path in paths:
        root = _flat_below(root, path)
    return root


def _flat_below(node: structure.Node, path: KeyPath) -> structure.Node:
    """Returns the structure with one flat container of the leaves below a path."""
    if not isinstance(node, structure.BranchNode) or not node.children:
        return node
    if not path:
        # A tensor made of parts is one leaf.
        leaves = list(structure.iter_leaves(node, leaf_kinds=KINDS))
        keys = tuple(structure.Key(structure.join(inner)) for inner, _ in leaves)
        return dataclasses.replace(node, keys=keys, children=tuple(leaf for _, leaf in leaves))
    children = [
        _flat_below(child, path[1:]) if str(key.value) == str(path[0].value) else child
        for key, child in zip(node.keys, node.children, strict=True)
    ]
    return dataclasses.replace(node, children=tuple(children))


def _ask(
    item: Item,
    saved: Any,
    where: str,
    name: str,
    reports: list[plan.RestoreReport],
    may_differ: Callable[[errors.MismatchError], bool],
) -> Any:
    """Returns the handler's target; None, with a report, if it raises `MismatchError`."""
    try:
        return item.handler.target(item.value, saved, strict=True)
    except errors.MismatchError as error:
        reports.append(_report_of(where, name, error))
        if not may_differ(error):
            return None
    try:
        return item.handler.target(item.value, saved, strict=False)
    except errors.MismatchError:
        return None


def _report_of(where: str, name: str, error: errors.MismatchError) -> plan.RestoreReport:
    """Returns the report of a handler's mismatch, to be merged with the others."""
    found = (error.missing, error.unexpected, error.mismatched)
    if not any(found):
        return plan.RestoreReport(mismatched=(f"{where or name}: {error.message}",))
    missing, unexpected, mismatched = (
        tuple(f"{where}: {each}" if where else each for each in kind) for kind in found
    )
    return plan.RestoreReport(missing=missing, unexpected=unexpected, mismatched=mismatched)


def _sizes(detail: Mapping[str, object]) -> tuple[int, int]:
    rank, num_ranks = cast("list[int]", detail[structure.RESIZE])
    return rank, num_ranks


def why_not_resizable(
    handler: Handler, num_saved: int, rank: int, num_ranks: int, where: str
) -> plan.RestoreReport:
    """Returns the mismatch of a handler that cannot resize; empty for one that can."""
    if not handler.can_resize():
        try:
            handler.resize([None] * num_saved, rank, num_ranks)
        except errors.MismatchError as error:
            return _report_of("", where, error)
    return plan.RestoreReport()


def selects(handler: Handler, inside: Mapping[str, Item]) -> Callable[[str], bool]:
    """Returns a predicate on stored names: whether the handler of the leaf restores it."""
    if not inside:
        return handler.selects

    def concerns(name: str) -> bool:
        for start, each in inside.items():
            if not each.handler.holds_values and f"{name}.".startswith(
                f"{start}." if start else ""
            ):
                return each.handler.selects(name.removeprefix(start).removeprefix("."))
        return handler.selects(name)

    return concerns
