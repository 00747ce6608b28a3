"""Restoring a checkpoint into items: everything is matched first, then read, then lifted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeGuard, cast

from functional_ckpt import errors, reader
from functional_ckpt.core import plan, selection, structure, union
from functional_ckpt.core.progress import Progress
from functional_ckpt.core.target import AS_SAVED
from functional_ckpt.distributed.coordinator import Combine, Coordinator, SingleProcess
from functional_ckpt.handlers.base import CheckpointItem, Handler, Registry
from functional_ckpt.storage.layout import OpenCheckpoint, OpenItem

__all__ = ["Restored", "RestoreOptions", "restore_checkpoint"]

_log = logging.getLogger("functional_ckpt")


class Restored(Mapping[str, Any]):
    """The items of a restored checkpoint, by name.

    Attributes:
        step: The step; None for a checkpoint without steps.
        report: What `strict=False` left out, all items together; false when nothing was.
        metrics: The metrics saved with it, or None.
        progress: How far the training was, or None where the checkpoint does not say.
        custom_metadata: The user's own metadata.
    """

    def __init__(
        self,
        items: Mapping[str, Any],
        *,
        step: int | None,
        report: plan.RestoreReport,
        metrics: Mapping[str, Any] | None,
        progress: Progress | None,
        custom_metadata: Mapping[str, Any],
    ) -> None:
        self._items = dict(items)
        self.step = step
        self.report = report
        self.metrics = metrics
        self.progress = progress
        self.custom_metadata = custom_metadata

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"Restored(step={self.step}, items={sorted(self._items)})"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions:
    """How to restore.

    Attributes:
        only: Shell patterns on `item` or `item.leaf.name`; None for everything.
        strict: Whether anything missing, unexpected or mismatched is an error; if not, the target
            keeps its own values there and the report names them.
        cast: `target` converts arrays to the target's dtype; None makes another dtype a mismatch.
        verify: `during` the read (default), all of it `before` the first byte is written, or `off`.
        share_reads: Whether ranks read for each other what several of them need.
    """

    only: str | Sequence[str] | None = None
    strict: bool = True
    cast: Literal["target"] | None = None
    verify: reader.Verify = "during"
    share_reads: bool = False

    def __post_init__(self) -> None:
        if self.cast not in (None, "target"):
            raise errors.UsageError(f"cast must be 'target' or None; got {self.cast!r}.")
        if self.verify not in ("during", "before", "off"):
            raise errors.UsageError(
                f"verify must be 'during', 'before' or 'off'; got {self.verify!r}."
            )

    @property
    def patterns(self) -> tuple[str, ...] | None:
        """`only` as a tuple."""
        if self.only is None:
            return None
        return (self.only,) if isinstance(self.only, str) else tuple(self.only)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Matched:
    """One item, ready to be read."""

    name: str
    item: CheckpointItem | None
    opened: OpenItem | None
    binding: plan.Binding
    report: plan.RestoreReport
    is_resized: bool = False


def restore_checkpoint(
    open_checkpoint: Callable[[], OpenCheckpoint],
    items: Mapping[str, Any] | None,
    registry: Registry,
    options: RestoreOptions,
    coordinator: Coordinator | None = None,
) -> Restored:
    """Restores a checkpoint: as saved without `items`, else into them.

    Every rank opens it and matches its own part, then all go on or all raise; likewise after
    reading.

    Raises:
        StepNotFoundError: An item is asked for that the checkpoint does not hold.
        MismatchError: Something does not fit; nothing was touched.
        CorruptCheckpointError: Damaged bytes; `.touched` says whether the target was written into.
    """
    group = coordinator or SingleProcess()
    with _together(group, "matching the checkpoint with the target", _is_asked_of_all) as round_:
        checkpoint = open_checkpoint()
        matched = _match(checkpoint, items, registry, options, group)
        reports = {each.name: each.report for each in matched}
        if options.strict and any(r.missing or r.mismatched for r in reports.values()):
            plan.raise_report(reports, step=checkpoint.step, path=checkpoint.path)
        round_.value = b"1" if any(report.unexpected for report in reports.values()) else b""
    reports = _unexpected_by_all(reports, group, may_be=round_.outcome == b"1")
    if options.strict:
        plan.raise_report(reports, step=checkpoint.step, path=checkpoint.path)
    with _together(group, "reading the checkpoint"):
        values = _read(checkpoint, matched, options, group)
        lifted = {
            each.name: _lift(each, value, group)
            for each, value in zip(matched, values, strict=True)
        }
    return Restored(
        lifted,
        step=checkpoint.step,
        report=_merge(list(reports.values())),
        metrics=checkpoint.metrics,
        progress=checkpoint.progress,
        custom_metadata=checkpoint.metadata.get("custom_metadata") or {},
    )


@dataclasses.dataclass(slots=True)
class _Round:
    """What a rank gives to the round at the end of a block, and what comes of it."""

    value: bytes = b""
    outcome: bytes = b""


@contextlib.contextmanager
def _together(group: Coordinator, what: str, combine: Combine = lambda _: b"") -> Generator[_Round]:
    """All ranks come through the block, or all raise: the error of a rank reaches every other."""
    round_ = _Round()
    try:
        yield round_
    except Exception as error:
        group.exchange(what, error, combine)
        raise
    round_.outcome = group.exchange(what, round_.value, combine)


def _is_asked_of_all(values: Sequence[bytes]) -> bytes:
    return b"1" if all(values) else b""


def _unexpected_by_all(
    reports: Mapping[str, plan.RestoreReport], group: Coordinator, *, may_be: bool
) -> dict[str, plan.RestoreReport]:
    """The reports without what another rank has a place for: of another pipeline stage, say.

    Args:
        reports: This rank's.
        group: The ranks.
        may_be: Whether every rank met something unexpected; if not, nothing was to all.
    """
    common: dict[str, list[str]] = {}
    if may_be:
        own = json.dumps({name: report.unexpected for name, report in reports.items()})
        what = "which leaves no rank expects"
        common = json.loads(zlib.decompress(group.exchange(what, _packed(own), _intersect)))
    return {
        name: dataclasses.replace(report, unexpected=tuple(common.get(name, ())))
        for name, report in reports.items()
    }


def _intersect(values: Sequence[bytes]) -> bytes:
    found = [json.loads(zlib.decompress(value)) for value in values]
    first, others = found[0], found[1:]
    for name, leaves in first.items():
        for other in others:
            wanted = set(other.get(name, ()))
            leaves = [leaf for leaf in leaves if leaf in wanted]
        first[name] = leaves
    return _packed(json.dumps(first))


def _packed(text: str) -> bytes:
    return zlib.compress(text.encode(), 1)


def _lift(matched: _Matched, value: Any, group: Coordinator) -> Any:
    if matched.item is None:
        return value
    handler = matched.item.handler
    if matched.is_resized:
        # What one rank saved alone is not wrapped in a dict of ranks.
        is_wrapped = matched.opened is not None and _is_per_rank(matched.opened.root)
        trees = list(value.values()) if is_wrapped else [value]
        value = handler.resize(trees, group.rank, group.num_ranks)
    return handler.lift(matched.item.value, value)


def _match(
    checkpoint: OpenCheckpoint,
    items: Mapping[str, Any] | None,
    registry: Registry,
    options: RestoreOptions,
    group: Coordinator,
) -> list[_Matched]:
    wanted = selection.Selection(options.patterns)
    if items is not None and not isinstance(items, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.UsageError(
            f"items must be a mapping of names to targets; got {type(items).__name__}."
        )
    if items is None:
        found = [_match_as_saved(checkpoint, name, wanted, group) for name in checkpoint.items]
    else:
        found = [
            _match_item(checkpoint, name, registry.bind(value, name), wanted, options, group)
            for name, value in items.items()
            if wanted.may_want(name)
        ]
    matched = [each for each in found if each is not None and wanted.found(each.name)]
    if group.num_ranks == 1 or not matched:  # another rank may have what a pattern names
        wanted.check_used()
    return matched


def _match_as_saved(
    checkpoint: OpenCheckpoint, name: str, wanted: selection.Selection, group: Coordinator
) -> _Matched | None:
    """An item as it was saved, or what is wanted of it; None for nothing."""
    nothing = plan.RestoreReport()
    if not wanted.may_want(name):
        return None
    if checkpoint.items[name] == "json":
        given = plan.Given(checkpoint.json(name))
        return _Matched(name=name, item=None, opened=None, binding=given, report=nothing)
    opened = checkpoint.tree(name)
    root = plan.prune(_root_for(opened, group), wanted.leaves_of(name))
    if root is None:
        return None
    binding = plan.match(root, AS_SAVED, item=name).binding
    return _Matched(name=name, item=None, opened=opened, binding=binding, report=nothing)


def _root_for(opened: OpenItem, group: Coordinator) -> structure.Node:
    """The structure as this rank restores it: its own part of what was saved per rank.

    An item that was saved per rank by another number of ranks comes back whole, as a dict of all.
    """
    root = opened.root
    if _is_per_rank(root) and len(root.children) != group.num_ranks:
        return dataclasses.replace(root, kind="dict")
    dropped: list[str] = []
    root = union.for_rank(root, group.rank, group.num_ranks, dropped)
    if dropped:
        _log.warning(
            "%s: %d plain values were saved for each of another number of ranks (%s, ...); those "
            "of rank 0 are taken",
            opened.path,
            len(dropped),
            dropped[0],
        )
    return root


def _is_per_rank(root: structure.Node) -> TypeGuard[structure.BranchNode]:
    return isinstance(root, structure.BranchNode) and root.kind == "per_rank"


def _match_item(
    checkpoint: OpenCheckpoint,
    name: str,
    item: CheckpointItem,
    wanted: selection.Selection,
    options: RestoreOptions,
    group: Coordinator,
) -> _Matched | None:
    kind = checkpoint.items.get(name)
    if kind is None:
        raise errors.StepNotFoundError(
            f"{checkpoint.path} has no item {name!r}; it has "
            f"{', '.join(sorted(checkpoint.items))}.",
            step=checkpoint.step,
            path=checkpoint.path,
            key_path=name,
        )
    handler = item.handler
    if kind == "json":
        if not wanted.wants_whole(name):
            return None
        if handler.format != "json" and item.value is not None and item.value is not AS_SAVED:
            raise errors.MismatchError(
                f"Item {name!r} was saved as JSON; give fc.Json(...) or None as its target.",
                mismatched=[name],
                step=checkpoint.step,
                path=checkpoint.path,
                key_path=name,
            )
        given = plan.Given(checkpoint.json(name))
        report = plan.RestoreReport()
        bound = item if handler.format == "json" else None
        return _Matched(name=name, item=bound, opened=None, binding=given, report=report)
    if item.value is None or item.value is AS_SAVED:
        return _match_as_saved(checkpoint, name, wanted, group)
    opened = checkpoint.tree(name)
    root = _root_for(opened, group)
    selects = wanted.leaves_of(name)
    plan.prune(root, selects)  # all that is stored is asked about, whatever the target turns out
    is_resized = _is_resized(opened.root, handler, group)
    unexpected: tuple[str, ...] = ()
    try:
        target: Any = AS_SAVED
        if is_resized:
            _check_resizable(name, opened.root, handler, group)
        else:
            target = handler.target(item.value, plan.specs(root), strict=options.strict)
    except errors.MismatchError as error:
        if group.num_ranks == 1 or error.missing or error.mismatched or not error.unexpected:
            return _refused(name, item, error)
        # Another rank may have a place for these.
        unexpected = tuple(error.unexpected)
        target = handler.target(item.value, plan.specs(root), strict=False)
    outcome = plan.match(
        root,
        target,
        item=name,
        cast_to_target=options.cast == "target",
        selects=lambda leaf: selects(leaf) and handler.selects(leaf),
    )
    return _Matched(
        name=name,
        item=item,
        opened=opened,
        binding=outcome.binding,
        report=dataclasses.replace(
            outcome.report, unexpected=(*unexpected, *outcome.report.unexpected)
        ),
        is_resized=is_resized,
    )


def _is_resized(root: structure.Node, handler: Handler, group: Coordinator) -> bool:
    """Whether each rank's state was saved by another number of ranks (one is not wrapped)."""
    num_saved = len(root.children) if _is_per_rank(root) else 1
    return (handler.per_rank or _is_per_rank(root)) and num_saved != group.num_ranks


def _check_resizable(name: str, root: structure.Node, handler: Handler, group: Coordinator) -> None:
    """A handler that cannot resize says so before anything is read."""
    if type(handler).resize is Handler.resize:
        num_saved = len(root.children) if _is_per_rank(root) else 1
        handler.resize([None] * num_saved, group.rank, group.num_ranks)


def _refused(name: str, item: CheckpointItem, error: errors.MismatchError) -> _Matched:
    """A mismatch that the handler found: reported with the others, and the item left alone."""
    mismatched = error.mismatched
    if not (error.missing or error.unexpected or error.mismatched):
        mismatched = (f"{name}: {error.message}",)
    report = plan.RestoreReport(
        missing=error.missing, unexpected=error.unexpected, mismatched=mismatched
    )
    given = plan.Given(item.value)
    return _Matched(name=name, item=None, opened=None, binding=given, report=report)


def _read(
    checkpoint: OpenCheckpoint,
    matched: Sequence[_Matched],
    options: RestoreOptions,
    group: Coordinator,
) -> list[Any]:
    touched = reader.Touched()
    sharing = group if options.share_reads and group.num_ranks > 1 else None
    trees = [(each.opened, each.binding) for each in matched if each.opened is not None]
    try:
        found = reader.read_all(trees, verify=options.verify, touched=touched, sharing=sharing)
        values = iter(found)
    except errors.CorruptCheckpointError as error:
        state = (
            "The target had already been written into: restore another step into it."
            if touched.value
            else "The target was not touched."
        )
        raise errors.CorruptCheckpointError(
            f"{error.message} {state}",
            touched=touched.value,
            step=checkpoint.step,
            path=error.path,
            key_path=error.key_path,
        ) from error
    # What has no tree was known without reading.
    return [
        cast("plan.Given", each.binding).value if each.opened is None else next(values)
        for each in matched
    ]


def _merge(reports: Sequence[plan.RestoreReport]) -> plan.RestoreReport:
    return plan.RestoreReport(
        missing=tuple(leaf for report in reports for leaf in report.missing),
        unexpected=tuple(leaf for report in reports for leaf in report.unexpected),
        mismatched=tuple(leaf for report in reports for leaf in report.mismatched),
    )
