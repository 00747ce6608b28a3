"""Matches items of a checkpoint with targets, before anything is read or written."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeGuard

from functional_ckpt import errors
from functional_ckpt.core.records import merge_ranks
from functional_ckpt.core.restore_plan import json_tree, keep, plan, rename, select
from functional_ckpt.core.restore_plan.match import match
from functional_ckpt.core.restore_plan.targets import own_value
from functional_ckpt.core.tree import context, long_lists, structure
from functional_ckpt.core.tree.placeholders import AS_SAVED, NOTHING
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format.checkpoint_dir import OpenCheckpoint, OpenItem, missing_item
from functional_ckpt.handlers import nested as nested_values
from functional_ckpt.handlers.base import Handler, Item, Registry
from functional_ckpt.policies.checks import check_bool
from functional_ckpt.restoring import nested, read

_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions:
    """The options of a restore.

    Attributes:
        only: Shell patterns on `item` or `item.leaf.name`; None for everything.
        ignore: Leaves to skip, as patterns or a function of the name: the target keeps its values.
            A pattern without a match is an error.
        key_map: Maps stored names to the target's: a mapping of old names or prefixes to new ones,
            `(regular expression, replacement)` pairs, or a function, which may return None to skip
            a leaf. Names are `item.leaf.name`; `only` and `ignore` are matched against new names.
            A rule that renames nothing is an error.
        strict: Whether anything missing, unexpected or mismatched is an error; if not, the target
            keeps its own values there and the report names them.
        cast: Whether arrays are converted to the target's dtype; if not, another dtype is a
            mismatch.
        verify: When bytes are checked: `"stream"`, while they are read (default); `"first"`, all of
            them before the target is modified; or False, never.
        share_reads: Whether one rank reads the data that several ranks need, and sends it to them.
            Useful for replicas, another sharding than the saved one, and slow storage.
    """

    only: str | Sequence[str] | None = None
    ignore: select.Ignored | None = None
    key_map: rename.KeyMap | None = None
    strict: bool = True
    cast: bool = False
    verify: read.Verify = "stream"
    share_reads: bool = False

    def __post_init__(self) -> None:
        for name in ("strict", "cast", "share_reads"):
            check_bool(name, getattr(self, name))
        for name in ("only", "ignore"):
            given: object = getattr(self, name)
            if given is not None and not callable(given) and not isinstance(given, Iterable):
                raise errors.UsageError(
                    f"{name} must be a pattern or a list of patterns; got {given!r:.80}."
                )
        if self.verify is not False and self.verify not in ("stream", "first"):
            raise errors.UsageError(
                f"verify must be 'stream', 'first' or False; got {self.verify!r}."
            )

    @property
    def patterns(self) -> tuple[str, ...] | None:
        """`only` as a tuple."""
        if self.only is None:
            return None
        return (self.only,) if isinstance(self.only, str) else tuple(self.only)


class RestoreArguments(TypedDict, total=False):
    """The fields of `RestoreOptions`, as keyword arguments of calls that pass them through."""

    only: str | Sequence[str] | None
    ignore: select.Ignored | None
    key_map: rename.KeyMap | None
    strict: bool
    cast: bool
    verify: read.Verify
    share_reads: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MatchedItem:
    """An item matched with its target.

    `item` is None if it is restored as saved; `opened` is None if nothing is read.
    """

    name: str
    item: Item | None
    opened: OpenItem | None
    binding: plan.Binding
    report: plan.RestoreReport
    is_resized: bool = False
    filled: tuple[plan.Filled, ...] = ()
    is_nested: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A restore request."""

    checkpoint: OpenCheckpoint
    options: RestoreOptions
    wanted: select.Selection
    renamed: rename.Renaming | None
    registry: Registry
    coordinator: Coordinator
    keeps_missing: bool = False
    """Whether a target whose item the checkpoint lacks is kept and reported."""

    def root_of(self, opened: OpenItem, name: str) -> structure.Node | None:
        """Returns an item's selected structure, under the target's names; None if nothing is left.

        If leaves are selected or renamed by name, each value of a long list has its own name.
        """
        root = _root_for(opened, self.coordinator)
        if self.renamed is not None or self.wanted.is_partial(name):
            root = long_lists.with_unpacked(root)
        return root if self.renamed is None else self.renamed.rename(root, name)

    def check_used(self) -> None:
        """Raises `UsageError` for a pattern, or a rule of `key_map`, that matched nothing."""
        if self.renamed is not None:
            self.renamed.check_used()
        self.wanted.check_used()


def match_items(
    checkpoint: OpenCheckpoint,
    into: Mapping[str, Any] | None,
    registry: Registry,
    options: RestoreOptions,
    coordinator: Coordinator,
) -> list[MatchedItem]:
    """Matches a request with a checkpoint; no array is read and no target modified.

    Without `into` everything is restored as saved. Each rank matches its own part.
    """
    if into is not None and not isinstance(into, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.UsageError(
            f"into must be a mapping of item names to targets; got {type(into).__name__}."
        )
    asked = _Request(
        checkpoint=checkpoint,
        options=options,
        wanted=select.Selection(options.patterns, options.ignore),
        renamed=None if options.key_map is None else rename.Renaming(options.key_map),
        registry=registry,
        coordinator=coordinator,
        # Where no item is there at all, it is another checkpoint than the one that was meant.
        keeps_missing=not options.strict and not checkpoint.items.keys().isdisjoint(into or ()),
    )
    wanted = asked.wanted
    if into is None:
        found = [_match_as_saved(asked, name) for name in checkpoint.items]
    else:
        found = [
            _match_item(asked, name, registry.bind(value, name))
            for name, value in into.items()
            if wanted.may_include(name)
        ]
    matched = [each for each in found if each is not None and wanted.has_match(each.name)]
    if coordinator.num_ranks == 1 or not matched:  # another rank may have a match of a pattern
        asked.check_used()
    return matched


def _match_as_saved(asked: _Request, name: str) -> MatchedItem | None:
    """Returns an item as saved, or its selected part; None if there is none."""
    nothing = plan.RestoreReport()
    if not asked.wanted.may_include(name):
        return None
    if asked.checkpoint.items[name] == "json":
        return _match_json(asked, name, None)
    opened = asked.checkpoint.tree(name)
    root = asked.root_of(opened, name)
    if root is not None:
        root = select.prune(root, asked.wanted.leaves_of(name))
    if root is None:
        return None
    binding = match(root, AS_SAVED, item=name).binding
    return MatchedItem(name=name, item=None, opened=opened, binding=binding, report=nothing)


def _match_json(asked: _Request, name: str, item: Item | None) -> MatchedItem | None:
    """Returns a JSON item, or its selected part; None if there is none."""
    value = asked.checkpoint.json(name)
    if asked.renamed is not None or asked.wanted.is_partial(name):
        root: structure.Node | None = json_tree.to_node(value)
        if asked.renamed is not None:
            root = asked.renamed.rename(root, name)
        if root is not None and asked.wanted.is_partial(name):
            selects = asked.wanted.leaves_of(name)
            pruned = select.prune(root, selects)
            own = NOTHING if item is None or item.value is None else item.handler.own(item.value)
            root = pruned if item is None else keep.keep_unselected(root, own, selects)
        if root is None:
            return None
        value = json_tree.from_node(root)
    if item is None:
        value = context.unpack(value)
    nothing = plan.RestoreReport()
    return MatchedItem(name=name, item=item, opened=None, binding=plan.Given(value), report=nothing)


def _root_for(opened: OpenItem, coordinator: Coordinator) -> structure.Node:
    """Returns the structure as this rank restores it: its own part of per-rank values.

    An item that was saved per rank by another number of ranks is restored as a dict of all.
    """
    root = opened.root
    if is_per_rank(root) and len(root.children) != coordinator.num_ranks:
        return dataclasses.replace(root, kind="dict")
    dropped: list[str] = []
    root = merge_ranks.select_rank(root, coordinator.rank, coordinator.num_ranks, dropped)
    if dropped:
        _log.warning(
            "%s: %d per-rank values were saved with a different world size (%s, ...); using those "
            "of rank 0",
            opened.path,
            len(dropped),
            dropped[0],
        )
    return root


def is_per_rank(root: structure.Node) -> TypeGuard[structure.BranchNode]:
    """Returns whether an item holds a value for each rank that saved it."""
    return isinstance(root, structure.BranchNode) and root.kind == "per_rank"


def _match_item(asked: _Request, name: str, item: Item) -> MatchedItem | None:
    checkpoint, wanted, options, coordinator = (
        asked.checkpoint,
        asked.wanted,
        asked.options,
        asked.coordinator,
    )
    kind = checkpoint.items.get(name)
    if kind is None and asked.keeps_missing:
        return _left_alone(asked, name, item, plan.RestoreReport(missing=(name,)))
    if kind is None:
        hint = " Pass strict=False to keep the target's own." if options.strict else ""
        raise missing_item(checkpoint.path, name, checkpoint.items, checkpoint.step, hint)
    handler = item.handler
    if kind == "json":
        if handler.format != "json" and item.value is not None and item.value is not AS_SAVED:
            raise errors.MismatchError(
                f"Item {name!r} was saved as JSON; give fc.Json(...) or None as its target.",
                mismatched=[name],
                step=checkpoint.step,
                path=checkpoint.path,
                key_path=name,
            )
        return _match_json(asked, name, item if handler.format == "json" else None)
    if item.value is None or item.value is AS_SAVED:
        return _match_as_saved(asked, name)
    opened = checkpoint.tree(name)
    root = asked.root_of(opened, name) or structure.BranchNode(kind="dict", keys=(), children=())
    if asked.renamed is not None and handler.holds_values:
        root = nested.with_module_names(root, item, asked.registry)
    is_resized = _is_resized(opened.root, handler, coordinator)
    if wanted.is_partial(name):
        root = _select(asked, name, item, root, is_resized=is_resized)
        if root is None or keep.is_own(root):
            return _left_alone(asked, name, item, plan.RestoreReport())
    target = _target_of(asked, name, item, opened.root, root, is_resized=is_resized)
    if target.tree is None:
        return _left_alone(asked, name, item, target.report)
    outcome = match(
        root,
        target.tree,
        item=name,
        cast_to_target=options.cast,
        selects=nested.selects(handler, target.inside),
        lifts=functools.partial(nested_values.lifts, asked.registry),
    )
    return MatchedItem(
        name=name,
        item=item,
        opened=opened,
        binding=outcome.binding,
        report=plan.merge([target.report, outcome.report]),
        is_resized=is_resized,
        filled=outcome.filled,
        is_nested=outcome.is_nested,
    )


def _select(
    asked: _Request, name: str, item: Item, root: structure.Node, *, is_resized: bool
) -> structure.Node | None:
    """Returns the structure with the target's values for leaves that are not selected."""
    selects = asked.wanted.leaves_of(name)
    pruned = select.prune(root, selects)  # asks about all that is stored, whatever the target has
    if not is_resized:
        return keep.keep_unselected(root, nested_values.own(asked.registry, item), selects)
    if pruned is not None and pruned != root:
        raise errors.UsageError(
            f"{name} was saved per rank by another number of ranks and cannot be restored in part: "
            "select or ignore all of it.",
            key_path=name,
        )
    return pruned


def _target_of(
    asked: _Request,
    name: str,
    item: Item,
    saved: structure.Node,
    root: structure.Node,
    *,
    is_resized: bool,
) -> nested.Target:
    """Returns the item's target, and the mismatches that handlers find."""
    handler, coordinator = item.handler, asked.coordinator

    def may_differ(error: errors.MismatchError) -> bool:
        only_unexpected = not (error.missing or error.mismatched) and bool(error.unexpected)
        # Another rank may expect a leaf that is unexpected here.
        return not asked.options.strict or (coordinator.num_ranks > 1 and only_unexpected)

    if not is_resized:
        return nested.target_of(
            item, select.specs(root), name=name, registry=asked.registry, may_differ=may_differ
        )
    num_saved = len(saved.children) if is_per_rank(saved) else 1
    wrong = nested.why_not_resizable(
        handler, num_saved, coordinator.rank, coordinator.num_ranks, name
    )
    return nested.Target(tree=None if wrong else AS_SAVED, report=wrong, inside={})


def _is_resized(root: structure.Node, handler: Handler, coordinator: Coordinator) -> bool:
    """Returns whether a per-rank item was saved by another number of ranks."""
    num_saved = len(root.children) if is_per_rank(root) else 1  # one rank's value is not wrapped
    return (handler.per_rank or is_per_rank(root)) and num_saved != coordinator.num_ranks


def _left_alone(asked: _Request, name: str, item: Item, report: plan.RestoreReport) -> MatchedItem:
    """Returns an item of which nothing is restored: the caller's object, unchanged."""
    given = plan.Given(own_value(nested_values.unchanged(asked.registry, item)))
    return MatchedItem(name=name, item=None, opened=None, binding=given, report=report)
