"""The decision of several save policies together."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from functional_ckpt import errors
from functional_ckpt.policies.base import SaveContext, SavePolicy, StepInfo, StepPolicy
from functional_ckpt.policies.save import Continuous, ElapsedInterval, every

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
    """Saves whenever one of several policies does, as a list of them does."""

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
        """The shortest interval of the clock, 0 for continuous saves; infinite without one."""
        clocks = (each for each in self.by_state if isinstance(each, (Continuous, ElapsedInterval)))
        seconds = (0.0 if isinstance(each, Continuous) else each.interval.value for each in clocks)
        return min(seconds, default=math.inf)

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


def _flatten(policies: Any, adapt: Callable[[Any], Any], name: str) -> list[SavePolicy]:
    if isinstance(policies, (int, str, datetime.timedelta)) and not isinstance(policies, bool):
        return [every(policies)]
    policy = adapt(policies)
    if isinstance(policy, AnySave):
        return _flatten(policy.policies, adapt, name)
    if isinstance(policy, (list, tuple)):
        return [
            each
            for index, member in enumerate(cast("Sequence[Any]", policy))
            for each in _flatten(member, adapt, f"{name}[{index}]")
        ]
    if isinstance(policy, type) or not callable(getattr(policy, "should_save", None)):
        raise errors.UsageError(
            f"{name}: expected a save policy{_save_advice(policy)}; got {policy!r}."
        )
    if getattr(policy, "step_only", False) and not callable(getattr(policy, "fires_at", None)):
        raise errors.UsageError(
            f"{name}: expected `fires_at(step)` of a policy whose `step_only` is true; "
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
