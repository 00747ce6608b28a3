"""When to save: the save policies.

`FixedInterval`, `SpecificSteps`, `InitialSave` and `Preemption` decide as Orbax's policies of those
names do; intervals in time and progress, and `when`, are additional.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, cast

from functional_ckpt import errors
from functional_ckpt.policies.base import SaveContext, StepInfo, step_set
from functional_ckpt.policies.checks import check_int, check_seconds
from functional_ckpt.policies.spelled import Spelled
from functional_ckpt.policies.timespan import Timespan, TimespanLike, Unit, parse_timespan

# 0.3 / 0.1 is 2.9999999999999996: a boundary counts as crossed within this distance.
_ROUNDING: Final = 1e-9
# A shorter interval may be over at the next step.
_SHORTEST_SECONDS: Final = 1.0
_ADVICE: Final[dict[Unit, str]] = {
    "sample": "Count them, progress.next_batch(samples=...)",
    "token": "Count them, progress.next_batch(tokens=...)",
    "duration": "Say how long it is, fc.Progress(max_duration=...)",
}


@dataclass(frozen=True, slots=True, repr=False)
class FixedInterval(Spelled):
    """Saves every step that is a multiple of `interval`, step 0 included.

    Attributes:
        interval: In steps, at least 1.
    """

    interval: int
    step_only: ClassVar[Literal[True]] = True
    _call: ClassVar[str] = "every"

    def __post_init__(self) -> None:
        """Raises UsageError for anything but a positive int."""
        check_int("interval in steps", self.interval, at_least=1)

    def fires_at(self, step: int) -> bool:
        """Returns whether the interval divides the step."""
        return step % self.interval == 0

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns whether the interval divides the step."""
        return step.step % self.interval == 0


@dataclass(frozen=True, slots=True, init=False, repr=False)
class SpecificSteps(Spelled):
    """Saves the given steps.

    Attributes:
        steps: Their numbers; any iterable is accepted, a range is kept as it is.
    """

    steps: range | frozenset[int]
    step_only: ClassVar[Literal[True]] = True

    def __init__(self, steps: Iterable[int]) -> None:
        """Raises UsageError unless all steps are ints >= 0."""
        object.__setattr__(self, "steps", step_set("steps to save", steps))

    def fires_at(self, step: int) -> bool:
        """Returns whether the step is one of them."""
        return step in self.steps

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns whether the step is one of them."""
        return step.step in self.steps


@dataclass(frozen=True, slots=True, repr=False)
class InitialSave(Spelled):
    """Saves as soon as possible if there is no checkpoint at all."""

    ignores_step: ClassVar[Literal[True]] = True

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns whether nothing was saved before."""
        return not previous_steps


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class Preemption(Spelled):
    """Saves once the process has received SIGTERM.

    Attributes:
        snapshot_every: At steps that it divides, a declined `save` copies the state into host
            memory, instead of an earlier copy. After a SIGTERM the copy is saved if no save comes,
            as during an evaluation, a compilation or a long call of C. None for no copies.
        grace_seconds: How long after a SIGTERM a save may come before the copy is saved.
    """

    snapshot_every: int | None = None
    grace_seconds: float = 5.0

    def __post_init__(self) -> None:
        """Raises UsageError for an interval below 1, and for a negative time."""
        if self.snapshot_every is not None:
            check_int("snapshot_every of Preemption", self.snapshot_every, at_least=1)
        check_seconds("grace_seconds of Preemption", self.grace_seconds)

    ignores_step: ClassVar[Literal[True]] = True

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns whether the signal was received."""
        return context.reached_preemption


@dataclass(frozen=True, slots=True, repr=False)
class Continuous(Spelled):
    """Saves as soon as the last save is durable: no save waits for another one."""

    ignores_step: ClassVar[Literal[True]] = True

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns whether no save is in progress."""
        return not context.is_saving_in_progress


@dataclass(frozen=True, slots=True, repr=False)
class When(Spelled):
    """Saves when a function of the step returns true.

    With several ranks the function is called on the primary alone, which decides for all.

    Attributes:
        decide: Called with the step's `StepInfo`.
    """

    decide: Callable[[StepInfo], bool]

    def __post_init__(self) -> None:
        """Raises UsageError unless it is callable."""
        if not callable(self.decide):
            raise errors.UsageError(
                f"When: expected a function of a StepInfo; got {self.decide!r}."
            )

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns the function's decision."""
        return bool(self.decide(step))


@dataclass(frozen=True, slots=True, repr=False)
class ElapsedInterval(Spelled):
    """Saves when some time has passed since the last save, or since the run started if later.

    The last save is the youngest of the history, whatever its number (an older step may have been
    overwritten); steps dated in the future, as after a clock was set back, are ignored.

    Attributes:
        interval: In seconds.
    """

    interval: Timespan
    _call: ClassVar[str] = "every"

    def __post_init__(self) -> None:
        """Raises UsageError for another unit, zero, or more than a calendar can hold."""
        _check_interval(self.interval, ("second",))
        try:
            datetime.timedelta(seconds=self.interval.value)
        except OverflowError:
            raise errors.UsageError(
                f"interval: expected a time below a million years; got {self.interval}."
            ) from None

    @property
    def ignores_step(self) -> bool:
        """Whether the ranks need no round at each step: the interval is long enough for that."""
        return self.interval.value >= _SHORTEST_SECONDS

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns whether the interval is over at `step.time`."""
        now = step.time
        # The history is asked for its youngest step rather than its last: after a rollback the last
        # one may be older than later steps, and every step would be saved.
        times = [saved.time for saved in previous_steps if saved.time <= now]
        if context.start_time is not None and context.start_time <= now:
            times.append(context.start_time)
        if not times:
            return True
        return (now - max(times)).total_seconds() >= self.interval.value


@dataclass(frozen=True, slots=True, repr=False)
class ProgressInterval(Spelled):
    """Saves when the progress has crossed a multiple of the interval since the last save.

    With `1ep`, a training saves at the first step at which 1 epoch or more is over, then 2 or more,
    and so on; once per boundary, before and after a resume.

    Attributes:
        interval: In iterations, epochs, samples, tokens, or a fraction of the training.
    """

    interval: Timespan
    _call: ClassVar[str] = "every"

    def __post_init__(self) -> None:
        """Raises UsageError for another unit, zero, or more than the entire training."""
        _check_interval(self.interval, ("iteration", "epoch", "sample", "token", "duration"))
        if self.interval.unit == "duration" and self.interval.value > 1:
            raise errors.UsageError(
                f"interval: expected at most the entire training, 1dur; got {self.interval}."
            )

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns whether a boundary was crossed; raises UsageError without progress."""
        here = self._boundaries(_count(step, self.interval.unit, f"every({str(self.interval)!r})"))
        # Steps beyond this one were left behind by a rollback: they are no memory of this run.
        for saved in reversed(previous_steps):
            if saved.step <= step.step:
                # A step saved before progress was reported counts as the start of the training: at
                # worst one save too many, never one too few.
                before = saved.progress.count(self.interval.unit) if saved.progress else None
                return here > self._boundaries(before or 0)
        return here > 0

    def _boundaries(self, progress: float) -> int:
        interval = self.interval.value
        if isinstance(progress, int) and isinstance(interval, int):
            return progress // interval
        return math.floor(progress / interval + _ROUNDING)


@dataclass(frozen=True, slots=True, init=False, repr=False)
class AtEnd(Spelled):
    """Saves the last step of a training whose length is known.

    A policy only decides about steps that are passed to `save`. If training may end at any other
    step (early stopping, an exception), call `save(step, items, force=True)` after the loop.

    Attributes:
        max_duration: The length of the training: a number of steps or a time string (`5000`,
            `"5000ba"`, `"10ep"`, `"24h"` of training time). None for that of the progress that is
            passed to `save`, `fc.Progress(max_duration=...)`. In steps, the steps `n - 1` and `n`
            are saved: the last of `range(n)`, or of steps that are counted from 1. In other units,
            the first step at which the progress reaches it.
    """

    max_duration: Timespan

    def __init__(self, max_duration: TimespanLike | None = None) -> None:
        """Raises UsageError for an invalid time span, or zero."""
        span = Timespan(1, "duration") if max_duration is None else parse_timespan(max_duration)
        if not span.value:
            raise errors.UsageError(f"max_duration: expected more than zero; got {span}.")
        object.__setattr__(self, "max_duration", span)

    @property
    def step_only(self) -> bool:
        """Whether the number of a step decides."""
        return self.max_duration.unit == "batch"

    def fires_at(self, step: int) -> bool:
        """Returns whether the step is the last one, counted from 0 or from 1."""
        return 0 <= self.max_duration.value - step <= 1

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns whether the training ends here; raises UsageError without progress."""
        if self.step_only:
            return self.fires_at(step.step)
        unit, end = self.max_duration.unit, self.max_duration.value
        what = "AtEnd()" if unit == "duration" else f"AtEnd({str(self.max_duration)!r})"
        if _count(step, unit, what) < end:
            return False
        before = [each.progress for each in previous_steps if each.step <= step.step]
        counted = before[-1].count(unit) if before and before[-1] is not None else None
        return counted is None or counted < end


def every(interval: TimespanLike) -> FixedInterval | ElapsedInterval | ProgressInterval:
    """Returns the policy that saves at an interval.

    Args:
        interval: Of steps (`500`, `"500ba"`: every step number that the interval divides, step 0
            included); of time (`"90m"`, `"1h20m40s"`, a timedelta: this time after the last save);
            or of the training's progress (`"1ep"`, `"3e4tok"`, `"0.25dur"`: at the first step after
            each multiple). None keeps state: the history on disk is the memory.

    Raises:
        UsageError: It is no time span, or zero.

    >>> every("500ba")
    every(500)
    >>> every("90m").interval
    Timespan(value=5400, unit='second')
    """
    span = parse_timespan(interval)
    if span.unit == "batch":
        return FixedInterval(cast(int, span.value))
    if span.unit == "second":
        return ElapsedInterval(span)
    return ProgressInterval(span)


def _count(step: StepInfo, unit: Unit, what: str) -> float:
    """Returns the progress at a step in a unit; raises UsageError if it is not known."""
    count = step.progress.count(unit) if step.progress is not None else None
    if count is None:
        raise errors.UsageError(
            f"{what}: expected the training's progress in {unit} units with step {step.step}; got "
            f"{_missing_progress(step, unit)}, or save at an interval of steps or seconds.",
            step=step.step,
        )
    return count


def _missing_progress(step: StepInfo, unit: Unit) -> str:
    """Describes the missing progress, and the fix."""
    if step.progress is None:
        return "none. Pass save(progress=fc.Progress(...))"
    counted = {key: value for key, value in step.progress.to_json().items() if value}
    counts = ", ".join(f"{key}={value!r}" for key, value in counted.items()) or "no count"
    return f"{counts}. {_ADVICE[unit]}"


def _check_interval(interval: Timespan, units: tuple[str, ...]) -> None:
    if not isinstance(interval, Timespan) or interval.unit not in units:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.UsageError(
            f"interval: expected a Timespan in {' or '.join(units)}; got {interval!r}."
        )
    if not interval.value:
        raise errors.UsageError(f"interval: expected more than zero; got {interval}.")
