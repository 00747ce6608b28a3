"""The decision of several keep policies together."""

from __future__ import annotations

import bisect
import dataclasses
import datetime
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, cast

from functional_ckpt import errors
from functional_ckpt.policies import lines
from functional_ckpt.policies.base import KeepContext, KeepPolicy, StepInfo
from functional_ckpt.policies.keep import (
    CustomSteps,
    EveryNSeconds,
    EveryNSteps,
    LatestDuration,
    LatestN,
    PreserveAll,
    unknown_metric,
)
from functional_ckpt.policies.spelled import Spelled

KeepPolicies: TypeAlias = KeepPolicy | int | Sequence[KeepPolicy | int]
"""The argument `keep_policy`: one policy, or a list (any of them keeps a step). A number n means
`LatestN(n)`."""


@dataclass(frozen=True, slots=True, repr=False)
class AnyKeep(Spelled):
    """Keeps the steps that any of several policies keeps, as a list does; all if there is none."""

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
    others. Without policies everything is kept; protected steps stay regardless of the policies.

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
    # Regardless of the policies: a run must always be able to resume from its last step.
    kept = {max(history, key=lines.age).step, *protected}
    kept |= kept_by(AnyKeep(tuple(policies)), history, context=context)
    return tuple(info.step in kept for info in history)


def kept_by(policy: KeepPolicy, history: Sequence[StepInfo], *, context: KeepContext) -> set[int]:
    """Returns the steps that one policy keeps, of the present line and of the abandoned ones."""
    kept: set[int] = set()
    for is_abandoned in (False, True):
        infos = [info for info in history if info.is_abandoned == is_abandoned]
        answers = policy.should_preserve(infos, context=context) if infos else ()
        kept |= {info.step for info, keep in zip(infos, answers, strict=True) if keep}
    return kept


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


def check_not_passing(name: str, policies: Sequence[KeepPolicy]) -> None:
    """Raises UsageError for `LatestN(0)` where steps have nowhere else to go."""
    if passes_through(policies):
        raise errors.UsageError(
            f"{name}: LatestN(0) keeps no step, so it is for the first of several tiers: give the "
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
    record and with plausible ones. For the other arguments see `decide_keep`.
    """
    if not history:
        return ()
    last = max(history, key=lambda info: (info.time, info.step))
    protected = {last.step} if committed is None else {last.step, committed}
    plausible = with_plausible_times(history, context.now)
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


def _checked(policy: Any, adapt: Callable[[Any], Any], name: str) -> KeepPolicy:
    if isinstance(policy, (list, tuple)):
        return AnyKeep(keep_policies(cast("Sequence[Any]", policy), adapt=adapt))
    if isinstance(policy, int) and not isinstance(policy, bool):
        return LatestN(policy)
    adapted = adapt(policy)
    if isinstance(adapted, type) or not callable(getattr(adapted, "should_preserve", None)):
        raise errors.UsageError(
            f"{name}: expected a keep policy{_keep_advice(adapted)}; got {adapted!r}."
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


def with_plausible_times(
    history: Sequence[StepInfo], now: datetime.datetime
) -> tuple[StepInfo, ...]:
    """Returns the history with other times for steps whose own contradict those of most others.

    Times rise with the steps of a generation, and none is in the future. The longest run of steps
    for which that holds is believed; each other step gets the time of the believed one before it.
    """
    order = sorted(range(len(history)), key=lambda i: lines.age(history[i]))
    believed = _longest_rising([(i, history[i].time) for i in order if history[i].time <= now])
    times: dict[int, datetime.datetime] = {}
    earliest = min((history[i].time for i in believed), default=now)
    for index in order:
        earliest = times[index] = history[index].time if index in believed else earliest
    return tuple(
        info if times[index] == info.time else dataclasses.replace(info, time=times[index])
        for index, info in enumerate(history)
    )


def _longest_rising(timed: Sequence[tuple[int, datetime.datetime]]) -> set[int]:
    """Returns the keys of a longest subsequence whose times do not fall."""
    ends: list[datetime.datetime] = []  # the earliest end of a rising subsequence of each length
    keys: list[int] = []
    before: dict[int, int | None] = {}
    for key, time in timed:
        index = bisect.bisect_right(ends, time)
        before[key] = keys[index - 1] if index else None
        ends[index : index + 1] = [time]
        keys[index : index + 1] = [key]
    found: set[int] = set()
    key = keys[-1] if keys else None
    while key is not None:
        found.add(key)
        key = before[key]
    return found
