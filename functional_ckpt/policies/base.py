"""Policies: their input records and the two protocols, which are Orbax's.

A policy is a pure function of its arguments: the history of the steps on disk, the current step
and, in a context, external inputs (the clock, a signal). It holds no state, so it decides the same
after a restart as before.

The policies themselves are in `save` and `keep`; `save_rules` and `keep_rules` decide by several at
once.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from functional_ckpt import errors
from functional_ckpt.policies.checks import check_int, is_int
from functional_ckpt.policies.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """A step as policies see it: one that is on disk, or the one to decide about.

    Attributes:
        step: Its number.
        time: When it was saved (or, for the step to decide about, now); with a time zone.
        metrics: Its metrics; None if there are none (yet).
        progress: Progress of the training; None if it was not saved. It is saved with the step,
            since a policy that saves every epoch has no other memory.
        problem: Why its metrics, time or progress cannot be believed; None where they can. Such a
            step is kept, regardless of the policies.
        is_unreadable: Whether the problem is that the system refused to read them.
        generation: The number of rollbacks before it was saved.
        ancestors: For each earlier generation that led to it, the number of that generation and
            its last step on the way here.
        is_abandoned: It is not on the present line: the run went back to a step before it.
    """

    step: int
    time: datetime.datetime
    metrics: Mapping[str, Any] | None = None
    progress: Progress | None = None
    problem: str | None = None
    is_unreadable: bool = False
    generation: int = 0
    ancestors: tuple[tuple[int, int], ...] = ()
    is_abandoned: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for a negative step or a time without a time zone."""
        check_int("step", self.step)
        _check_zone("time of a step", self.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveContext:
    """Inputs of a save policy besides the steps.

    Attributes:
        is_saving_in_progress: An earlier save is still being committed in the background.
        reached_preemption: The process has received SIGTERM.
        start_time: When this run started, with a time zone: the first interval in seconds is
            counted from here if nothing was saved since. None: an interval in seconds is over at
            once if nothing was ever saved.
    """

    is_saving_in_progress: bool = False
    reached_preemption: bool = False
    start_time: datetime.datetime | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a start time without a time zone."""
        if self.start_time is not None:
            _check_zone("start_time", self.start_time)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepContext:
    """Inputs of a keep policy besides the steps.

    Attributes:
        now: The time of the decision, with a time zone.
    """

    now: datetime.datetime

    def __post_init__(self) -> None:
        """Raises UsageError for a time without a time zone."""
        _check_zone("now", self.now)


class SavePolicy(Protocol):
    """Decides whether a step is saved.

    A class may set `step_only = True` and add `fires_at` (see `StepPolicy`): then it is decided on
    every rank by itself. Any other policy is decided by the primary for all, in a round trip a
    step; or, if it sets `ignores_step = True`, only when a thread of the primary, which asks it
    once a second, finds that it accepts.
    """

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns whether to save.

        Args:
            step: The current step.
            previous_steps: The steps that exist, ascending, with the one being committed.
            context: The external inputs.
        """
        ...


@runtime_checkable
class StepPolicy(Protocol):
    """A save policy that depends on the number of the step and nothing else."""

    @property
    def step_only(self) -> Literal[True]:
        """Whether `fires_at` decides alone."""
        ...

    def fires_at(self, step: int) -> bool:
        """Returns whether to save this step."""
        ...

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns `fires_at(step.step)`."""
        ...


class KeepPolicy(Protocol):
    """Decides which steps stay on disk.

    It is asked twice where a run went back to an earlier step: about the steps that lead to the
    present one, and about those that were abandoned.
    """

    def should_preserve(
        self, checkpoints: Sequence[StepInfo], /, *, context: KeepContext
    ) -> Sequence[bool]:
        """Returns one answer for each of the steps, which come in ascending order."""
        ...


def step_set(what: str, steps: Iterable[int]) -> range | frozenset[int]:
    """Returns the steps for quick look-up, a range as it is; raises UsageError for non-steps."""
    if isinstance(steps, range):
        wrong = [end for end in (steps[:1] and (steps[0], steps[-1])) if end < 0]
        members = steps
    else:
        if isinstance(steps, (str, bytes, bytearray, Mapping)):
            raise errors.UsageError(f"{what}: expected ints, zero or more; got {steps!r:.80}.")
        try:
            members = frozenset(steps)
        except TypeError:
            raise errors.UsageError(f"{what}: expected several ints; got {steps!r}.") from None
        wrong = [step for step in members if not is_int(step) or step < 0]
    if wrong:
        raise errors.UsageError(
            f"{what}: expected ints, zero or more; got {wrong[0]!r} among them."
        )
    return members


def _check_zone(what: str, time: object) -> None:
    if not isinstance(time, datetime.datetime):
        raise errors.UsageError(f"{what}: expected a datetime with a time zone; got {time!r}.")
    if time.tzinfo is None:
        raise errors.UsageError(
            f"{what}: expected a datetime with a time zone, as `datetime.now(timezone.utc)`; "
            f"got {time!r} without one."
        )
