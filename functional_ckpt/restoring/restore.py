"""Restoring a checkpoint into items: everything is matched first, then read, then lifted."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.restore_plan import plan
from functional_ckpt.core.tree import containers, html_tree, memory
from functional_ckpt.distributed.collective import collective
from functional_ckpt.distributed.coordinator import Coordinator, SingleProcess
from functional_ckpt.format.checkpoint_dir import OpenCheckpoint
from functional_ckpt.handlers import nested
from functional_ckpt.handlers.base import Item, Registry
from functional_ckpt.handlers.registry import for_items
from functional_ckpt.policies.progress import Progress
from functional_ckpt.restoring import node_read, read, ties
from functional_ckpt.restoring.match import MatchedItem, RestoreOptions, is_per_rank, match_items
from functional_ckpt.restoring.node_copies import NodeSources
from functional_ckpt.runtime import threads


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Restored(Mapping[str, Any]):
    """The items of a restored checkpoint: an immutable mapping of names to values.

    Attributes:
        items_by_name: The restored values.
        step: The step; None for a checkpoint that records none, and for initial values.
        report: The differences that `strict=False` skipped, of all items; false if there are none.
        metrics: The metrics saved with the step, or None.
        progress: The training progress saved with the step, or None.
        custom_metadata: The user's own metadata.
        starts_at: The next step, if it is not `step + 1`.
    """

    items_by_name: Mapping[str, Any]
    step: int | None = None
    report: plan.RestoreReport = dataclasses.field(default_factory=plan.RestoreReport)
    metrics: Mapping[str, Any] | None = None
    progress: Progress | None = None
    custom_metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    starts_at: int | None = None

    @property
    def next_step(self) -> int:
        """The step to resume with: the one after `step`, or 0 where nothing was restored.

        Raises:
            UsageError: The checkpoint was restored and does not record a step.
        """
        if self.starts_at is not None:
            return self.starts_at
        if self.step is None:
            raise errors.UsageError(
                "The restored checkpoint does not record a step: it was written by fc.save or is "
                "foreign. Choose the first step explicitly."
            )
        return self.step + 1

    def with_defaults(self, others: Mapping[str, Any]) -> Restored:
        """Returns these items, and the values of `others` under the remaining names, for a new run.

        The new run starts at step 0, whatever step the items come from.
        """
        return dataclasses.replace(
            self, items_by_name={**others, **self.items_by_name}, starts_at=0
        )

    def over(self, items: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the items for the next save: `items` with the restored values.

        Modules and optimizers are the same objects, filled in place; pytrees are the restored ones.
        Names that were not restored keep their values.

        >>> Restored({"state": 1}).over({"state": 0, "other": 2})
        {'state': 1, 'other': 2}
        """
        known = self.items_by_name
        return {
            name: containers.overlay(
                value,
                known[name],
                lambda each: isinstance(each, Item),
                lambda given, restored: dataclasses.replace(given, value=restored),
            )
            if name in known
            else value
            for name, value in items.items()
        }

    def __getitem__(self, name: str) -> Any:
        return self.items_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_by_name)

    def __len__(self) -> int:
        return len(self.items_by_name)

    def __repr__(self) -> str:
        return f"Restored(step={self.step}, items={sorted(self.items_by_name)})"

    def _repr_html_(self) -> str:
        facts = {
            "metrics": self.metrics,
            "progress": self.progress,
            "custom metadata": self.custom_metadata or None,
            "differences": self.report or None,
        }
        return html_tree.page(f"Restored(step={self.step})", self.items_by_name, facts)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.items_by_name)


def restore_checkpoint(
    open_checkpoint: Callable[[], OpenCheckpoint],
    into: Mapping[str, Any] | None,
    registry: Registry,
    options: RestoreOptions,
    coordinator: Coordinator | None = None,
    shown: Callable[[int, int], None] | None = None,
    nodes: NodeSources | None = None,
) -> Restored:
    """Restores a checkpoint: as saved without `into`, else into its values.

    Every rank opens it and matches its own part, then all continue or all raise; likewise after
    reading.

    Raises:
        StepNotFoundError: The checkpoint lacks a requested item.
        MismatchError: Checkpoint and target differ; no target was modified.
        CorruptCheckpointError: Damaged bytes; `.touched` says whether a target was modified.
    """
    if torch.is_inference_mode_enabled():
        # Restored tensors must not be inference tensors, which cannot be trained.
        with torch.inference_mode(mode=False), torch.no_grad():
            return restore_checkpoint(
                open_checkpoint, into, registry, options, coordinator, shown, nodes
            )
    registry = for_items(registry, {} if into is None else into)
    coordinator = coordinator or SingleProcess()
    with collective(coordinator, "matching the checkpoint with the target", _all_or_none) as round_:
        memory.check_no_fake_mode()
        with threads.gc_paused():
            checkpoint = open_checkpoint()
            with _noticing_overwrite(checkpoint):
                # Whatever may be damaged is read before anything is touched.
                metrics, progress = checkpoint.metrics, checkpoint.progress
                found = match_items(checkpoint, into, registry, options, coordinator)
                matched = ties.report_conflicts(found, options.verify)
        reports = {each.name: each.report for each in matched}
        if options.strict and any(r.missing or r.mismatched for r in reports.values()):
            plan.raise_report(reports, step=checkpoint.step, path=checkpoint.path)
        round_.value = b"1" if any(report.unexpected for report in reports.values()) else b""
    reports = _unexpected_by_all(reports, coordinator, may_be=round_.outcome == b"1")
    if options.strict:
        plan.raise_report(reports, step=checkpoint.step, path=checkpoint.path)
    target = read.TargetState()
    with (
        _reporting(target, checkpoint),
        collective(coordinator, "reading the checkpoint"),
        _noticing_overwrite(checkpoint),
    ):
        from_nodes = None
        if nodes is not None:
            nodes = dataclasses.replace(nodes, shares=options.share_reads)
            from_nodes = functools.partial(node_read.read_from_nodes, nodes, checkpoint)
        values = _read(matched, options, coordinator, target, shown, from_nodes)
        with threads.gc_paused():
            lifted = _lift_all(matched, values, registry, coordinator, target)
    return Restored(
        lifted,
        step=checkpoint.step,
        report=plan.merge(list(reports.values())),
        metrics=metrics,
        progress=progress,
        custom_metadata=checkpoint.custom_metadata,
    )


@contextlib.contextmanager
def _noticing_overwrite(checkpoint: OpenCheckpoint) -> Generator[None]:
    """Raises `StorageError` for apparent damage if the checkpoint was overwritten meanwhile."""
    try:
        yield
    except (errors.CorruptCheckpointError, errors.StorageError) as error:
        if not checkpoint.files.is_replaced():
            raise
        raise errors.StorageError(
            f"{checkpoint.path} was overwritten while it was being read; restore it again.",
            errno=errno.ESTALE,
            step=checkpoint.step,
            path=checkpoint.path,
        ) from error


@contextlib.contextmanager
def _reporting(target: read.TargetState, checkpoint: OpenCheckpoint) -> Generator[None]:
    """Raises errors inside with `touched`: whether the caller's objects were modified."""

    def state() -> str:
        return (
            "The target was partly modified: restore another step into it."
            if target.value
            else "The target was not touched."
        )

    try:
        yield
    except errors.CheckpointError as error:
        step = checkpoint.step if error.step is None else error.step
        message = f"{error.message.rstrip().removesuffix('.').removesuffix(':')}. {state()}"
        raise error.replace(message, step=step, touched=target.value) from error.__cause__
    except Exception as error:
        error.add_note(state())
        raise


def _all_or_none(values: Sequence[bytes]) -> bytes:
    return b"1" if all(values) else b""


def _unexpected_by_all(
    reports: Mapping[str, plan.RestoreReport], coordinator: Coordinator, *, may_be: bool
) -> dict[str, plan.RestoreReport]:
    """Returns the reports without leaves that another rank, such as another stage, expects."""
    common: dict[str, list[str]] = {}
    if may_be:
        own = json.dumps({name: report.unexpected for name, report in reports.items()})
        what = "which leaves no rank expects"
        common = json.loads(
            zlib.decompress(coordinator.gather_broadcast(what, _packed(own), _intersect))
        )
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


def _lift_all(
    matched: Sequence[MatchedItem],
    values: Sequence[Any],
    registry: Registry,
    coordinator: Coordinator,
    target: read.TargetState,
) -> dict[str, Any]:
    """Returns the restored values of all items; optimizers come last, since they need modules."""
    lifted = {each.name: value for each, value in zip(matched, values, strict=True)}
    for is_late in (False, True):
        for each in matched:
            if each.item is None:
                continue
            if each.is_nested:
                target.value = True
                lifted[each.name] = nested.lift(registry, lifted[each.name], is_late=is_late)
            # A tree that holds values is complete once all of them are lifted.
            if is_late == (each.item.handler.holds_values or nested.is_lifted_late(each.item)):
                lifted[each.name] = _lift(each, each.item, lifted[each.name], coordinator, target)
    return lifted


def _lift(
    matched: MatchedItem, item: Item, value: Any, coordinator: Coordinator, target: read.TargetState
) -> Any:
    handler = item.handler
    if matched.is_resized:
        # Values of a single rank are not wrapped in a dict of ranks.
        is_wrapped = matched.opened is not None and is_per_rank(matched.opened.root)
        trees = list(value.values()) if is_wrapped else [value]
        value = handler.resize(trees, coordinator.rank, coordinator.num_ranks)
    target.value = target.value or handler.changes_value
    return handler.lift(item.value, value)


def _read(
    matched: Sequence[MatchedItem],
    options: RestoreOptions,
    coordinator: Coordinator,
    target: read.TargetState,
    shown: Callable[[int, int], None] | None,
    from_nodes: read.FromNodes | None,
) -> list[Any]:
    sharing = coordinator if options.share_reads and coordinator.num_ranks > 1 else None
    trees = [(each.opened, each.binding) for each in matched if each.opened is not None]
    values = iter(
        read.read_all(
            trees,
            verify=options.verify,
            touched=target,
            sharing=sharing,
            shown=shown,
            from_nodes=from_nodes,
        )
    )
    # JSON items were read while matching.
    return [
        cast("plan.Given", each.binding).value if each.opened is None else next(values)
        for each in matched
    ]
