"""Whether to save: the decision of several save policies together."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from functional_ckpt.core.policy import SaveContext, SavePolicy, StepInfo, StepPolicy
from functional_ckpt.errors import UsageError

__all__ = ["AnySave", "SavePolicies", "SaveRule", "decide_save", "save_rule"]

SavePolicies: TypeAlias = SavePolicy | Sequence[SavePolicy]
"""What users pass: one policy, or a list that saves whenever any of them does."""


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
        """Returns whether any policy wants the save."""
        return any(
            policy.should_save(step, previous_steps, context=context) for policy in self.policies
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRule:
    """A user's save policies, flattened and sorted by what they need to know.

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
        """Whether no rank ever has to ask another."""
        return not self.by_state

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
        adapt: Called with each policy first, to let others' objects in.

    Raises:
        UsageError: One of them is no save policy; the message says which.
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
    """Returns the first policy that wants the step saved, None if there is none.

    Args:
        rule: The policies.
        step: The step at hand.
        previous_steps: The steps that exist, ascending, with the one being committed: without that
            one, a policy that counts seconds would ask for a second save while it is on its way.
        context: What the outside world says.
    """
    for policy in rule.policies:
        if policy.should_save(step, previous_steps, context=context):
            return policy
    return None


def _flatten(policies: Any, adapt: Callable[[Any], Any], place: str) -> list[SavePolicy]:
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
        raise UsageError(f"{place}: expected a save policy{_advice(policy)}; got {policy!r}")
    if getattr(policy, "step_only", False) and not callable(getattr(policy, "fires_at", None)):
        raise UsageError(
            f"{place}: expected `fires_at(step)` of a policy whose `step_only` is true; "
            f"{policy!r} has none"
        )
    return [policy]


def _advice(policy: object) -> str:
    if isinstance(policy, (int, str, datetime.timedelta)) and not isinstance(policy, bool):
        return f", such as every({policy!r})"
    if isinstance(policy, type):
        return f", an instance such as {policy.__name__}(...)"
    if hasattr(policy, "should_preserve"):
        return " (this one belongs in keep_policy)"
    if callable(policy):
        return ", such as when(function)"
    return " or a list of them"
