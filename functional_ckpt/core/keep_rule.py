"""Which steps to prune: the decision of several keep policies together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, cast

from functional_ckpt.core.policy import KeepContext, KeepPolicy, StepInfo
from functional_ckpt.errors import UsageError

__all__ = ["AnyKeep", "KeepPolicies", "decide_keep", "keep_policies", "steps_to_prune"]

KeepPolicies: TypeAlias = KeepPolicy | Sequence[KeepPolicy]
"""What users pass: one policy, or a list that keeps what any of them keeps."""


@dataclass(frozen=True, slots=True)
class AnyKeep:
    """Keeps what one of several policies keeps, as a list does; everything if there is none.

    Attributes:
        policies: All are asked.
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
        adapt: Called with each policy first, to let others' objects in.

    Raises:
        UsageError: One of them is no keep policy; the message says which.
    """
    if isinstance(policies, (list, tuple)):
        members = cast("Sequence[Any]", policies)
        return tuple(
            _checked(each, adapt, f"keep_policy[{index}]") for index, each in enumerate(members)
        )
    return (_checked(policies, adapt, "keep_policy"),)


def decide_keep(
    policies: Sequence[KeepPolicy], history: Sequence[StepInfo], *, context: KeepContext
) -> tuple[bool, ...]:
    """Returns, for each step, whether it stays: if any policy keeps it, or if it is the newest.

    Args:
        policies: None at all keeps everything.
        history: The steps on disk, ascending and each once.
        context: The clock.

    Raises:
        UsageError: A policy does not answer once for each step, or the history is out of order.
    """
    for before, after in pairwise(history):
        if before.step >= after.step:
            raise UsageError(
                f"history: expected each step once, in ascending order; got {after.step} "
                f"after {before.step}"
            )
    if not history:
        return ()
    kept = AnyKeep(tuple(policies)).should_preserve(history, context=context)
    # Whatever the policies say: a run must always be able to go on from where it was.
    return (*kept[:-1], True)


def steps_to_prune(
    policies: Sequence[KeepPolicy], history: Sequence[StepInfo], *, context: KeepContext
) -> tuple[int, ...]:
    """Returns the numbers of the steps that may go, the oldest first; never the newest.

    The arguments and errors are those of `decide_keep`.
    """
    kept = decide_keep(policies, history, context=context)
    return tuple(info.step for info, keep in zip(history, kept, strict=True) if not keep)


def _ask(
    policy: KeepPolicy, checkpoints: Sequence[StepInfo], context: KeepContext
) -> Sequence[bool]:
    answer: Any = policy.should_preserve(checkpoints, context=context)
    # A single bool, or a list that is too short, would silently decide about the wrong steps.
    if not hasattr(answer, "__len__") or len(answer) != len(checkpoints):
        raise UsageError(
            f"keep policy {policy!r}: expected {len(checkpoints)} answers, one for each step; "
            f"got {answer!r}"
        )
    return answer


def _checked(policy: Any, adapt: Callable[[Any], Any], place: str) -> KeepPolicy:
    if isinstance(policy, (list, tuple)):
        return AnyKeep(keep_policies(cast("Sequence[Any]", policy), adapt=adapt))
    adapted = adapt(policy)
    if isinstance(adapted, type) or not callable(getattr(adapted, "should_preserve", None)):
        raise UsageError(f"{place}: expected a keep policy{_advice(adapted)}; got {adapted!r}")
    return adapted


def _advice(policy: object) -> str:
    if isinstance(policy, int) and not isinstance(policy, bool):
        return f", such as LatestN({policy})"
    if isinstance(policy, str):
        return f", such as best_n(1, {policy!r})"
    if isinstance(policy, type):
        return f", an instance such as {policy.__name__}(...)"
    if hasattr(policy, "should_save"):
        return " (this one belongs in save_policy)"
    return " or a list of them"
