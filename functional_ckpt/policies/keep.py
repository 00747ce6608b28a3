"""Which steps to keep: the keep policies.

They decide as Orbax's preservation policies of the same names do, except where those lose
checkpoints: a metric that is missing or not a number ranks worst (there it breaks the ranking or
raises), keeping zero steps is an error (there it keeps none, or all) save for `LatestN(0)` in the
first of several tiers, and the clock is passed in.
"""

from __future__ import annotations

import datetime
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from functional_ckpt import errors
from functional_ckpt.policies.base import KeepContext, StepInfo, step_set
from functional_ckpt.policies.checks import check_bool, check_int, is_int
from functional_ckpt.policies.spelled import Spelled
from functional_ckpt.policies.timespan import Timespan, TimespanLike, parse_timespan

Metric: TypeAlias = str | Callable[[Mapping[str, Any]], float]
"""Which number ranks a step: the key of a metric, or a function of all metrics."""


@dataclass(frozen=True, slots=True, repr=False)
class PreserveAll(Spelled):
    """Keeps everything."""

    def should_preserve(
        self, checkpoints: Sequence[StepInfo], /, *, context: KeepContext
    ) -> list[bool]:
        """Returns True for each step."""
        return [True] * len(checkpoints)


@dataclass(frozen=True, slots=True, repr=False)
class LatestN(Spelled):
    """Keeps the `n` steps with the highest numbers.

    Attributes:
        n: None keeps all. 0 is for a first tier that steps only pass through: each goes once the
            tiers hold it that it was promised to, and never before.
    """

    n: int | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for less than no step."""
        if self.n is not None and (not is_int(self.n) or self.n < 0):
            raise errors.UsageError(
                "n of LatestN: expected an int of at least 1, None for all, or 0 for a first tier "
                f"that steps only pass through; got {self.n!r}."
            )

    def should_preserve(
        self, checkpoints: Sequence[StepInfo], /, *, context: KeepContext
    ) -> list[bool]:
        """Returns True for the last n steps."""
        return _last(len(checkpoints), self.n)


@dataclass(frozen=True, slots=True, init=False, repr=False)
class LatestDuration(Spelled):
    """Keeps steps saved within some time before now, and every step after the first such.

    Attributes:
        duration: How far back, as a timedelta or a time string (`"24h"`).
    """

    duration: Timespan

    def __init__(self, duration: TimespanLike) -> None:
        """Raises UsageError unless it is a wall-clock time."""
        span = parse_timespan(duration)
        if span.unit != "second" or not span.value:
            raise errors.UsageError(
                f"duration: expected a wall-clock time above zero, such as '24h'; got {span}."
            )
        object.__setattr__(self, "duration", span)

    def should_preserve(
        self, checkpoints: Sequence[StepInfo], /, *, context: KeepContext
    ) -> list[bool]:
        """Returns True from the first step on that is young enough at `context.now`."""
        for index, info in enumerate(checkpoints):
            if (context.now - info.time).total_seconds() <= self.duration.value:
                return [False] * index + [True] * (len(checkpoints) - index)
        return [False] * len(checkpoints)


@dataclass(frozen=True, slots=True, repr=False)
class EveryNSeconds(Spelled):
    """Keeps the first step, then each that was saved at least the interval after the last one kept.

    Attributes:
        interval_secs: In seconds, more than zero.
    """

    interval_secs: float

    def __post_init__(self) -> None:
        """Raises UsageError for anything but a positive number."""
        seconds = self.interval_secs
        if not (is_int(seconds) or isinstance(seconds, float)) or not 0 < seconds < math.inf:
            raise errors.UsageError(
                f"interval_secs: expected a number of seconds above zero; got {seconds!r}."
            )

    def should_preserve(
        self, checkpoints: Sequence[StepInfo], /, *, context: KeepContext
    ) -> list[bool]:
        """Returns True for the first step and each that is far enough from the last one kept."""
        kept: list[bool] = []
        last: datetime.datetime | None = None
        for info in checkpoints:
            keep = last is None or (info.time - last).total_seconds() >= self.interval_secs
            last = info.time if keep else last
            kept.append(keep)
        return kept


@dataclass(frozen=True, slots=True, repr=False)
class EveryNSteps(Spelled):
    """Keeps steps at an interval.

    Attributes:
        interval_steps: At least 1.
        exact_interval: True keeps the multiples of the interval; False keeps the first step, then
            each that is so far or farther from the last one kept.
        max_to_keep: How many of these to keep at most, the newest; None keeps all of them.
    """

    interval_steps: int
    exact_interval: bool = True
    max_to_keep: int | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for an interval or a number below 1."""
        check_int("interval_steps", self.interval_steps, at_least=1)
        check_bool("exact_interval", self.exact_interval)
        _check_count("max_to_keep of EveryNSteps", self.max_to_keep)

    def should_preserve(
        self, checkpoints: Sequence[StepInfo], /, *, context: KeepContext
    ) -> list[bool]:
        """Returns True for the steps at the interval."""
        kept: list[int] = []
        last: int | None = None
        for index, info in enumerate(checkpoints):
            if self.exact_interval:
                keep = info.step % self.interval_steps == 0
            else:
                keep = last is None or info.step - last >= self.interval_steps
            if keep:
                kept.append(index)
                last = info.step
        chosen = set(kept if self.max_to_keep is None else kept[-self.max_to_keep :])
        return [index in chosen for index in range(len(checkpoints))]


@dataclass(frozen=True, slots=True, init=False, repr=False)
class CustomSteps(Spelled):
    """Keeps the given steps.

    Attributes:
        steps: Their numbers; any iterable is accepted, a range is kept as it is.
    """

    steps: range | frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        """Raises UsageError unless all steps are ints >= 0."""
        object.__setattr__(self, "steps", step_set("steps to keep", steps))

    def should_preserve(
        self, checkpoints: Sequence[StepInfo], /, *, context: KeepContext
    ) -> list[bool]:
        """Returns True for each of the given steps."""
        return [info.step in self.steps for info in checkpoints]


@dataclass(frozen=True, slots=True, repr=False)
class BestN(Spelled):
    """Keeps the `n` steps with the best metric; of equal ones, the newer.

    A step whose metric is missing, nan or no number ranks below all others: it is kept only while
    there are fewer than `n` better ones.

    Attributes:
        n: At least 1; None keeps all.
        metric: The key of the metric, or a function of all metrics that returns the number.
        mode: Whether the highest (`max`) or the lowest (`min`) is best.
        keep_without_metrics: Keep, beside the best, every step whose metric is not known yet (as
            when evaluation comes later). Such steps stay until their metric is recorded.

    >>> BestN(1, "loss", mode="min")
    BestN(1, 'loss', mode='min')
    """

    n: int | None
    metric: Metric
    mode: Literal["max", "min"] = field(default="max", kw_only=True)
    keep_without_metrics: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Raises UsageError for a number below 1, another mode, or an invalid metric."""
        _check_count("n of BestN", self.n)
        _check_metric(self.metric, self.mode)
        check_bool("keep_without_metrics", self.keep_without_metrics)

    def should_preserve(
        self, checkpoints: Sequence[StepInfo], /, *, context: KeepContext
    ) -> list[bool]:
        """Returns True for the best n steps."""
        if self.n is None:
            return [True] * len(checkpoints)
        values = [_value(info, self.metric) for info in checkpoints]
        order = _ascending(values, self.mode)
        kept = set(order[-self.n :])
        if self.keep_without_metrics:
            # Unknown ones are counted separately from the n.
            known = [index for index in order if values[index] is not None]
            unknown = {index for index, value in enumerate(values) if value is None}
            kept = unknown.union(known[-self.n :])
        return [index in kept for index in range(len(checkpoints))]


def rank_steps(
    history: Sequence[StepInfo], metric: Metric, *, mode: Literal["max", "min"] = "max"
) -> list[StepInfo]:
    """Returns the steps that have the metric, the best first; of equal ones, the newer first.

    Args:
        history: Steps in ascending order.
        metric: The key of the metric, or a function of all metrics that returns the number.
        mode: Whether the highest or the lowest is best.

    Raises:
        UsageError: The mode or the metric is neither.
        CorruptCheckpointError: The metrics of a step are damaged: it may be the best.
        StorageError: The metrics of a step could not be read.
    """
    _check_metric(metric, mode)
    for info in history:
        if info.problem is not None and info.is_unreadable:
            raise errors.StorageError(f"The steps cannot be ranked now: {info.problem} Try again.")
        if info.problem is not None:
            raise errors.CorruptCheckpointError(
                f"The steps cannot be ranked: the metadata of step {info.step} is damaged. "
                f"{info.problem} Delete the step, or put its files back.",
                step=info.step,
            )
    values = [_value(info, metric) for info in history]
    order = _ascending(values, mode)
    return [history[index] for index in reversed(order) if not _is_worst(values[index])]


def best_step(
    history: Sequence[StepInfo],
    metric: Metric | None,
    mode: Literal["max", "min"],
    policies: Sequence[object],
) -> int | None:
    """Returns the best step, or None where no step has the metric.

    Args:
        history: Steps in ascending order.
        metric: As of `rank_steps`; None for that, and the mode, of the first `BestN` policy.
        mode: Whether the highest or the lowest is best.
        policies: The keep policies.

    Raises:
        UsageError: There is no metric and no such policy.
        CorruptCheckpointError: The metrics of a step are damaged: it may be the best.
        StorageError: The metrics of a step could not be read.
    """
    if metric is None:
        best = next((each for each in policies if isinstance(each, BestN)), None)
        if best is None:
            raise errors.UsageError(
                "best_step() needs a metric's name, or a keep policy BestN(n, name)."
            )
        metric, mode = best.metric, best.mode
    ranked = rank_steps(history, metric, mode=mode)
    return ranked[0].step if ranked else None


def unknown_metric(policy: object, history: Sequence[StepInfo]) -> str | None:
    """Returns a warning if a `BestN` policy ranks by a metric that no step has.

    Such a policy keeps the newest steps: its metric may be misspelled.
    """
    if not isinstance(policy, BestN) or policy.n is None or policy.keep_without_metrics:
        return None
    if not history or any(_value(info, policy.metric) is not None for info in history):
        return None
    names = sorted({str(name) for info in history for name in info.metrics or ()})
    recorded = ", ".join(names) or "none"
    return f"no step has the metric of {policy!r}; recorded metrics: {recorded}."


def _ascending(values: Sequence[float | None], mode: str) -> list[int]:
    """Returns the indices from worst to best; of equal values the newer counts as better."""

    def key(index: int) -> tuple[bool, float]:
        value = values[index]
        if value is None or _is_worst(value):
            return (False, 0.0)
        return (True, value if mode == "max" else -value)

    return sorted(range(len(values)), key=key)


def _is_worst(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _value(info: StepInfo, metric: Metric) -> float | None:
    """Returns the number that ranks a step: None if it is not known, nan if it is no number."""
    if info.metrics is None:
        return None
    if isinstance(metric, str):
        value = info.metrics.get(metric)
    else:
        try:
            value = metric(info.metrics)
        except LookupError:
            return None
        except (TypeError, ValueError, AttributeError, ArithmeticError):
            # Errors that odd data can cause: one such step must not end a run while it prunes.
            return math.nan
    if value is None:
        return None
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several
        return math.nan


def _check_metric(metric: object, mode: object) -> None:
    if mode not in ("max", "min"):
        raise errors.UsageError(f"mode: expected 'max' or 'min'; got {mode!r}.")
    if isinstance(metric, str):
        return
    if not callable(metric):
        raise errors.UsageError(
            f"metric: expected a key or a function of all metrics; got {metric!r}."
        )
    try:
        inspect.signature(metric).bind({})
    except ValueError:
        pass  # A builtin without a signature: it will be seen at the first ranking.
    except TypeError as error:
        # Found here, since a TypeError while ranking is taken for odd metrics.
        raise errors.UsageError(
            f"metric: expected a function of one argument, all metrics; got {metric!r} ({error})."
        ) from None


def _check_count(what: str, count: object) -> None:
    if count is not None and (not is_int(count) or count < 1):
        raise errors.UsageError(
            f"{what}: expected an int of at least 1, or None for all; got {count!r}."
        )


def _last(total: int, n: int | None) -> list[bool]:
    kept = total if n is None else min(n, total)
    return [False] * (total - kept) + [True] * kept
