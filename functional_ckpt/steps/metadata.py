"""Metadata of a checkpoint, without reading its arrays."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.restore_plan import select
from functional_ckpt.core.tree import containers, html_tree
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.policies.progress import Progress
from functional_ckpt.steps import history
from functional_ckpt.steps.late_metrics import LateMetrics
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.step_table import united

State: TypeAlias = Literal["committed", "replicated", "uploaded"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepMetadata:
    """Metadata of a step, without its arrays.

    Attributes:
        step: Its number; None for a checkpoint outside a directory of steps.
        time: The time of the commit.
        items: Name of each item -> its tree, with an `ArraySpec` for every array; the value of a
            JSON item.
        metrics: Its metrics, or None.
        progress: Progress of the training, or None if it was not saved.
        custom_metadata: The user's custom metadata.
        generation: The number of rollbacks before it was saved.
        is_abandoned: Whether the run has rolled back to an earlier step, so that the step is not on
            its current line.
        state: `committed`: it survives killed processes; `replicated`: other nodes hold verified
            copies of it (`NodeLocal`), so that it survives the loss of a node; `uploaded`: a remote
            tier holds it. Outside a manager always `committed`.
    """

    step: int | None
    time: datetime.datetime
    items: Mapping[str, Any]
    metrics: Mapping[str, Any] | None
    progress: Progress | None
    custom_metadata: Mapping[str, Any]
    generation: int = 0
    is_abandoned: bool = False
    state: State = "committed"

    def __repr__(self) -> str:
        leaves = [leaf for tree in self.items.values() for leaf in _arrays(tree)]
        facts = [
            f"step={self.step}",
            f"{len(self.items)} item{'' if len(self.items) == 1 else 's'}: {', '.join(self.items)}",
            f"{len(leaves)} array{'' if len(leaves) == 1 else 's'}",
            f"{sum(leaf.size_bytes for leaf in leaves):,} bytes",
            f"metrics={None if self.metrics is None else dict(self.metrics)}",
        ]
        return f"StepMetadata({', '.join(facts)})"

    def _repr_html_(self) -> str:
        facts = {
            "saved": f"{self.time:%Y-%m-%d %H:%M:%S %Z}",
            "metrics": self.metrics,
            "progress": self.progress,
            "custom metadata": self.custom_metadata or None,
        }
        return html_tree.page(f"StepMetadata(step={self.step})", self.items, facts)


def _arrays(tree: Any) -> Iterator[ArraySpec]:
    todo = [tree]
    while todo:
        value = todo.pop()
        if isinstance(value, ArraySpec):
            yield value
        elif (node := containers.flatten_one_level(value)) is not None:
            todo.extend(node.children)


def checkpoint_metadata(
    opened: checkpoint_dir.OpenCheckpoint, late: LateMetrics | None = None
) -> StepMetadata:
    """Returns the metadata of an opened checkpoint, with its `late` metrics as last read."""
    items = {
        name: opened.json(name) if kind == "json" else select.specs(opened.tree(name).root)
        for name, kind in opened.items.items()
    }
    info = history.sound_info(opened.files)
    recorded = {} if late is None else late.of(info, opened.path)
    return StepMetadata(
        step=opened.step,
        time=info.time,
        items=items,
        metrics={**(info.metrics or {}), **recorded} if recorded else info.metrics,
        progress=opened.progress,
        custom_metadata=opened.custom_metadata,
        generation=info.generation,
    )


def step_metadata(steps: Steps, step: int | None) -> StepMetadata:
    """Returns the metadata of a step, None for the latest, from the nearest tier that holds it."""
    number = steps.latest() if step is None else steps.existing(step)
    holder = steps.tiers_with(number)[0]
    opened = checkpoint_dir.open_checkpoint(holder.storage, holder.path(number), number)
    holder.look_at_metrics(number)
    found = checkpoint_metadata(opened, holder.late)
    infos = [StepInfo(step=number, time=found.time, metrics=found.metrics)]
    infos += [info for each in steps.remote if (info := each.info(number)) is not None]
    (info,) = united([info] for info in infos)
    return dataclasses.replace(
        found,
        metrics=info.metrics,
        is_abandoned=steps.is_abandoned(number),
        state=_state(steps, number, found.time),
    )


def _state(steps: Steps, step: int, time: datetime.datetime) -> State:
    """Returns how safe a commit is."""
    far = [info for each in steps.remote if (info := each.info(step)) is not None]
    if any(info.time == time for info in far):
        return "uploaded"
    return "replicated" if steps.first.is_replicated(step) else "committed"
