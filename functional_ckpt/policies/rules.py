"""The decision of several policies together: whether to save, and what to keep."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, cast

from functional_ckpt import errors
from functional_ckpt.policies import lines, plausible_times
from functional_ckpt.policies.base import (
    KeepContext,
    KeepPolicy,
    SaveContext,
    SavePolicy,
    StepInfo,
    StepPolicy,
)
from functional_ckpt.policies.keep import (
    CustomSteps,
    EveryNSeconds,
    EveryNSteps,
    LatestDuration,
    LatestN,
    PreserveAll,
    unknown_metric,
)
from functional_ckpt.policies.save import ElapsedInterval, every

SavePolicies: TypeAlias = (
    SavePolicy
    | int
    | str
    | datetime.timedelta
    | Sequence[SavePolicy | int | str | datetime.timedelta]
)
"""The argument `save_policy`: one policy, or a list (any of them saves). A number of steps, a
time string or a timedelta means `every` of it."""


@dataclass(frozen=True, slots=True)
class AnySave:
    """Saves whenever one of several policies does, as a list of them does.

    Attributes:
        policies: Asked in this order.
    """

    policies: tuple[SavePolicy, ...]

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        """Returns whether any policy accepts the save."""
        return any(
            policy.should_save(step, previous_steps, context=context) for policy in self.policies
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRule:
    """A user's save policies, flattened and sorted by the inputs they need.

    Attributes:
        policies: All of them, in the user's order.
        by_step: Those that depend on the step alone: decided by every rank for itself.
        by_state: The others: decided by the primary for all.
    """

    policies: tuple[SavePolicy, ...]
    by_step: tuple[StepPolicy, ...]
    by_state: tuple[SavePolicy, ...]

    @property
    def step_only(self) -> bool:
        """Whether no rank ever needs another's decision."""
        return not self.by_state

    @property
    def ignores_step(self) -> bool:
        """Whether `by_state` depends on the clock, signals and the history, not on the step."""
        ignoring = (getattr(policy, "ignores_step", False) for policy in self.by_state)
        return bool(self.by_state) and all(ignoring)

    @property
    def shortest_seconds(self) -> float:
        """The shortest interval of the clock; infinite without one."""
        clocks = (each for each in self.by_state if isinstance(each, ElapsedInterval))
        return min((each.interval.value for each in clocks), default=math.inf)

    def decide_step(self, step: int) -> bool | None:
        """Decides from the number of the step, in well under a microsecond.

        Returns:
            True to save, False not to, None if that depends on more: then ask `decide_save`.
        """
        for policy in self.by_step:
            if policy.fires_at(step):
                return True
        return None if self.by_state else False


def save_rule(
    policies: SavePolicies, *, adapt: Callable[[Any], Any] = lambda policy: policy
) -> SaveRule:
    """Returns the rule that saves whenever any of the policies does.

    Args:
        policies: One policy or a sequence of them (sequences within are flattened). An empty one
            never saves: only forced saves happen.
        adapt: Called with each policy first; converts foreign objects, such as Orbax's.

    Raises:
        UsageError: One of them is not a save policy; the message names it.
    """
    flat = tuple(_flatten(policies, adapt, "save_policy"))
    by_step: list[StepPolicy] = []
    by_state: list[SavePolicy] = []
    for policy in flat:
        if isinstance(policy, StepPolicy) and policy.step_only:
            by_step.append(policy)
        else:
            by_state.append(policy)
    return SaveRule(policies=flat, by_step=tuple(by_step), by_state=tuple(by_state))


def decide_save(
    rule: SaveRule, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
) -> SavePolicy | None:
    """Returns the first policy that accepts the step, None if there is none.

    Args:
        rule: The policies.
        step: The current step.
        previous_steps: The steps that exist, ascending, with the one being committed: without that
            one, a policy that counts seconds would ask for a second save while it is on its way.
        context: The external inputs.
    """
    for policy in rule.policies:
        if policy.should_save(step, previous_steps, context=context):
            return policy
    return None


def _flatten(policies: Any, adapt: Callable[[Any], Any], place: str) -> list[SavePolicy]:
    if isinstance(policies, (int, str, datetime.timedelta)) and not isinstance(policies, bool):
        return [every(policies)]
    policy = adapt(policies)
    if isinstance(policy, AnySave):
        return _flatten(policy.policies, adapt, place)
    if isinstance(policy, (list, tuple)):
        return [
            each
            for index, member in enumerate(cast("Sequence[Any]", policy))
            for each in _flatten(member, adapt, f"{place}[{index}]")
        ]
    if isinstance(policy, type) or not callable(getattr(policy, "should_save", None)):
        raise errors.UsageError(
            f"{place}: expected a save policy{_save_advice(policy)}; got {policy!r}."
        )
    if getattr(policy, "step_only", False) and not callable(getattr(policy, "fires_at", None)):
        raise errors.UsageError(
            f"{place}: expected `fires_at(step)` of a policy whose `step_only` is true; "
            f"{policy!r} has none."
        )
    return [policy]


def _save_advice(policy: object) -> str:
    if isinstance(policy, type):
        return f", an instance such as {policy.__name__}(...)"
    if hasattr(policy, "should_preserve"):
        return " (this one belongs in keep_policy)"
    if callable(policy):
        return ", such as When(function)"
    return " or a list of them"


KeepPolicies: TypeAlias = KeepPolicy | int | Sequence[KeepPolicy | int]
"""The argument `keep_policy`: one policy, or a list (any of them keeps a step). A number n means
`LatestN(n)`."""


@dataclass(frozen=True, slots=True)
class AnyKeep:
    """Keeps the steps that any of several policies keeps, as a list does; all if there is none.

    Attributes:
        policies: All are evaluated.
    """

    policies: tuple[KeepPolicy, ...]

    def should_preserve(
        self, checkpoints: Sequence[StepInfo], /, *, context: KeepContext
    ) -> list[bool]:
        """Returns True for each step that any policy keeps."""
        if not self.policies:
            return [True] * len(checkpoints)
        answers = [_ask(policy, checkpoints, context) for policy in self.policies]
        return [any(each) for each in zip(*answers, strict=True)]


def keep_policies(
    policies: KeepPolicies, *, adapt: Callable[[Any], Any] = lambda policy: policy
) -> tuple[KeepPolicy, ...]:
    """Returns a user's keep policies as a tuple.

    Args:
        policies: One policy or a sequence of them; an empty one keeps everything.
        adapt: Called with each policy first; converts foreign objects, such as Orbax's.

    Raises:
        UsageError: One of them is not a keep policy; the message names it.
    """
    if isinstance(policies, (list, tuple)):
        members = cast("Sequence[Any]", policies)
        return tuple(
            _checked(each, adapt, f"keep_policy[{index}]") for index, each in enumerate(members)
        )
    return (_checked(policies, adapt, "keep_policy"),)


def decide_keep(
    policies: Sequence[KeepPolicy],
    history: Sequence[StepInfo],
    *,
    context: KeepContext,
    protected: Collection[int] = (),
) -> tuple[bool, ...]:
    """Returns, for each step, whether it stays: if any policy keeps it, or if it is the newest.

    The policies are applied to the abandoned steps separately, so that these do not displace
    others.

    Args:
        policies: None at all keeps everything.
        history: The steps on disk, ascending and each once.
        context: The clock.
        protected: Steps that stay regardless of the policies.

    Raises:
        UsageError: A policy does not answer once for each step, or the history is out of order.
    """
    for before, after in pairwise(history):
        if before.step >= after.step:
            raise errors.UsageError(
                f"history: expected each step once, in ascending order; got {after.step} "
                f"after {before.step}."
            )
    if not history:
        return ()
    policy = AnyKeep(tuple(policies))
    present = [info for info in history if not info.is_abandoned]
    abandoned = [info for info in history if info.is_abandoned]
    # Regardless of the policies: a run must always be able to resume from its last step.
    kept = {max(history, key=lines.age).step, *protected}
    for infos in (present, abandoned):
        answers = policy.should_preserve(infos, context=context) if infos else ()
        kept |= {info.step for info, keep in zip(infos, answers, strict=True) if keep}
    return tuple(info.step in kept for info in history)


def steps_to_prune(
    policies: Sequence[KeepPolicy],
    history: Sequence[StepInfo],
    *,
    context: KeepContext,
    protected: Collection[int] = (),
) -> tuple[int, ...]:
    """Returns the numbers of the steps that may go, in ascending order; never the newest.

    Neither may a step that has a `problem`: its metrics may be the best of all. The arguments and
    errors are those of `decide_keep`.
    """
    kept = decide_keep(policies, history, context=context, protected=protected)
    return tuple(
        info.step
        for info, keep in zip(history, kept, strict=True)
        if not keep and info.problem is None
    )


def keeps_newest(
    policies: Sequence[KeepPolicy], history: Sequence[StepInfo], *, context: KeepContext
) -> bool:
    """Returns whether the newest step stays in a directory that is not the only one.

    It does, regardless of the policies, unless `LatestN(0)` is among them.
    """
    if not history or not passes_through(policies):
        return True
    return AnyKeep(tuple(policies)).should_preserve(history, context=context)[-1]


def passes_through(policies: Sequence[KeepPolicy]) -> bool:
    """Returns whether `LatestN(0)` is among the policies: steps stay until they are elsewhere."""
    return any(
        passes_through(each.policies)
        if isinstance(each, AnyKeep)
        else isinstance(each, LatestN) and each.n == 0
        for each in policies
    )


def read_metrics(policies: Sequence[KeepPolicy]) -> bool:
    """Returns whether a policy may depend on metrics, as any class of the user's may."""
    return any(
        read_metrics(each.policies) if isinstance(each, AnyKeep) else type(each) not in _BLIND
        for each in policies
    )


_BLIND = (PreserveAll, LatestN, LatestDuration, EveryNSeconds, EveryNSteps, CustomSteps)


def unknown_metrics(policies: Sequence[KeepPolicy], history: Sequence[StepInfo]) -> dict[str, str]:
    """Returns a warning for each policy that ranks by a metric that no step has."""
    found: dict[str, str] = {}
    for each in policies:
        if isinstance(each, AnyKeep):
            found |= unknown_metrics(each.policies, history)
        elif (warning := unknown_metric(each, history)) is not None:
            found[repr(each)] = warning
    return found


def check_not_passing(place: str, policies: Sequence[KeepPolicy]) -> None:
    """Raises UsageError for `LatestN(0)` where steps have nowhere else to go."""
    if passes_through(policies):
        raise errors.UsageError(
            f"{place}: LatestN(0) keeps no step, so it is for the first of several tiers: give the "
            "manager tiers=, or keep the latest step with LatestN(1)."
        )


def steps_to_prune_after(
    committed: int | None,
    policies: Sequence[KeepPolicy],
    history: Sequence[StepInfo],
    *,
    context: KeepContext,
) -> tuple[int, ...]:
    """Returns the steps that may go after a commit, in ascending order.

    Besides the newest, the step that was committed stays, and the last one by the time of its
    commit. Where clocks were wrong, a step goes only if the policies let it go with the times on
    record and with plausible ones.

    Args:
        committed: The step that has just been committed, if one was.
        policies: As of `decide_keep`.
        history: As of `decide_keep`.
        context: As of `decide_keep`.
    """
    if not history:
        return ()
    last = max(history, key=lambda info: (info.time, info.step))
    protected = {last.step} if committed is None else {last.step, committed}
    plausible = plausible_times.with_plausible_times(history, context.now)
    gone = steps_to_prune(policies, history, context=context, protected=protected)
    if plausible == tuple(history):
        return gone
    others = steps_to_prune(policies, plausible, context=context, protected=protected)
    return tuple(sorted({*gone} & {*others}))


def _ask(
    policy: KeepPolicy, checkpoints: Sequence[StepInfo], context: KeepContext
) -> Sequence[bool]:
    answer: Any = policy.should_preserve(checkpoints, context=context)
    # A single bool, or a list that is too short, would silently decide about the wrong steps.
    if not hasattr(answer, "__len__") or len(answer) != len(checkpoints):
        raise errors.UsageError(
            f"keep policy {policy!r}: expected {len(checkpoints)} answers, one for each step; "
            f"got {answer!r}."
        )
    return answer


def _checked(policy: Any, adapt: Callable[[Any], Any], place: str) -> KeepPolicy:
    if isinstance(policy, (list, tuple)):
        return AnyKeep(keep_policies(cast("Sequence[Any]", policy), adapt=adapt))
    if isinstance(policy, int) and not isinstance(policy, bool):
        return LatestN(policy)
    adapted = adapt(policy)
    if isinstance(adapted, type) or not callable(getattr(adapted, "should_preserve", None)):
        raise errors.UsageError(
            f"{place}: expected a keep policy{_keep_advice(adapted)}; got {adapted!r}."
        )
    return adapted


def _keep_advice(policy: object) -> str:
    if isinstance(policy, str):
        return f", such as BestN(1, {policy!r})"
    if isinstance(policy, type):
        return f", an instance such as {policy.__name__}(...)"
    if hasattr(policy, "should_save"):
        return " (this one belongs in save_policy)"
    return " or a list of them"
