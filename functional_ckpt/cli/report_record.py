"""A run as its report shows it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Literal, TypeAlias

Health: TypeAlias = Literal["intact", "damaged", "readable", "not verified"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReportStep:
    """A step.

    Attributes:
        step: Its number.
        time: Its commit.
        metrics: Its finite metrics.
        size_bytes: The size of its files; None if unknown.
        seconds: From the call of `save` to the commit; None if unknown.
        is_kept: Whether it is there.
        is_abandoned: Whether a rollback left it behind.
        is_uploading: Whether the run will upload it to other tiers.
        reasons: Why it stays.
        health: The outcome of its verification; None if it is gone.
        problem: The first finding of a damaged step.
    """

    step: int
    time: datetime.datetime
    metrics: Mapping[str, float]
    size_bytes: int | None = None
    seconds: float | None = None
    is_kept: bool = True
    is_abandoned: bool = False
    is_uploading: bool = False
    reasons: tuple[str, ...] = ()
    health: Health | None = None
    problem: str = ""

    def metric(self, name: str) -> float | None:
        """Returns a metric, or None."""
        return self.metrics.get(name)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSize:
    """A module, or an item, with the size of its arrays; children are sorted by size."""

    name: str
    size_bytes: int
    num_arrays: int
    children: tuple[ModuleSize, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConfigChange:
    """A value of an item, or of the custom metadata, that differs from the step before."""

    before: int
    after: int
    name: str
    old: str
    new: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """An array that differs between two steps: the norm of the difference over that of the first.

    `relative` is None if the arrays cannot be subtracted, or the first is zero.
    """

    name: str
    relative: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two steps.

    Attributes:
        before: The first one.
        after: The second one.
        changes: Item -> arrays that differ, the largest change first.
        num_equal: How many arrays are equal.
    """

    before: int
    after: int
    changes: Mapping[str, tuple[LayerChange, ...]]
    num_equal: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """A run.

    Attributes:
        path: Its directory.
        time: When it was looked at.
        steps: Its steps and those that it lost, ascending.
        latest: The step that a run resumes from; None if there is none.
        best: Metric -> the step with its best value.
        policies: The keep policies at the last commit, as text.
        unfinished: Directories of steps being written, or left by a crash.
        modules: The items of the latest step.
        changes: Changes of the configuration between steps.
        comparison: Two steps compared, if any.
    """

    path: str
    time: datetime.datetime
    steps: tuple[ReportStep, ...]
    latest: int | None
    best: Mapping[str, int]
    policies: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    modules: tuple[ModuleSize, ...] = ()
    changes: tuple[ConfigChange, ...] = ()
    comparison: Comparison | None = None

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, in order of their first appearance."""
        return list(dict.fromkeys(name for step in self.steps for name in step.metrics))
