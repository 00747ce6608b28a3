"""A sorted table of the known steps of a directory; adding a step copies no other."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection, Iterable, Sequence

from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps.late_metrics import LateMetrics


class StepTable:
    """Steps by number, each with its late metrics. Its user synchronizes changes."""

    def __init__(self, late: LateMetrics) -> None:
        self._late = late
        self._committed: dict[int, StepInfo] = {}  # without late metrics
        self._shown: dict[int, StepInfo] = {}
        self._order: list[int] = []
        self._infos: tuple[StepInfo, ...] | None = ()

    @property
    def infos(self) -> tuple[StepInfo, ...]:
        """The steps, ascending."""
        found = self._infos
        if found is None:
            found = self._infos = tuple(self._shown[step] for step in self._order)
        return found

    def get(self, step: int) -> StepInfo | None:
        """Returns a step; None if it is not there."""
        return self._shown.get(step)

    def replace(self, infos: Iterable[StepInfo]) -> None:
        """Replaces all steps."""
        old, shown = self._committed, self._shown
        self._committed = {info.step: info for info in infos}
        self._shown = {
            step: shown[step] if old.get(step) is info else self._late.added_to(info)
            for step, info in self._committed.items()
        }
        self._order = sorted(self._shown)
        self._infos = None

    def add(self, info: StepInfo) -> None:
        """Adds a step, or replaces that of its number."""
        if info.step not in self._committed:
            bisect.insort(self._order, info.step)
        self._committed[info.step] = info
        self._shown[info.step] = self._late.added_to(info)
        self._infos = None

    def refresh(self, steps: Iterable[int]) -> None:
        """Shows the late metrics of steps as they were last read."""
        for step in steps:
            if (info := self._committed.get(step)) is not None:
                self.add(info)

    def discard(self, steps: Collection[int]) -> None:
        """Removes steps."""
        gone = {step for step in steps if self._committed.pop(step, None) is not None}
        for step in gone:
            del self._shown[step]
        if gone:
            self._order = [step for step in self._order if step not in gone]
            self._infos = None

    def doubtful(self) -> list[StepInfo]:
        """Returns the steps whose own files have a problem."""
        return [info for info in self._committed.values() if info.problem is not None]

    def is_known(self, info: StepInfo) -> bool:
        """Returns whether a step is in the table, unchanged since it was added."""
        return self._committed.get(info.step) is info


def united(tiers: Iterable[Sequence[StepInfo]]) -> tuple[StepInfo, ...]:
    """Returns the steps of several tiers, ascending; of each number that of the nearest tier.

    Metrics that only another tier has for the same commit are added.
    """
    infos: dict[int, StepInfo] = {}
    for tier in tiers:
        for info in tier:
            near = infos.setdefault(info.step, info)
            if near is not info and near.time == info.time and info.metrics:
                metrics = {**info.metrics, **(near.metrics or {})}
                infos[info.step] = dataclasses.replace(near, metrics=metrics)
    return tuple(infos[step] for step in sorted(infos))
