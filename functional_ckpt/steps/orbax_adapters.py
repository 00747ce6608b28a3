"""Adapters for Orbax's own policies and step name formats.

Orbax imports JAX, so it is imported only when one of its objects is passed. Nothing here
initialises a JAX backend. The adapters return all other objects unchanged, so they can be applied
to any argument.

An adapted policy decides exactly as Orbax's: BestN raises for a missing metric, and LatestDuration
reads its own clock. The policies in `functional_ckpt.policies` do neither.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Final, Literal

from functional_ckpt import errors
from functional_ckpt.policies import keep_rules, save_rules
from functional_ckpt.policies.base import KeepContext, KeepPolicy, SaveContext, StepInfo
from functional_ckpt.policies.keep_rules import AnyKeep
from functional_ckpt.policies.save_rules import AnySave
from functional_ckpt.steps.names import CompositeStepName, StepName

_PROBES: Final = (0, 7, 1_234_567)
# The time given to policies that do not look at it.
_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def adapted_save_rule(policies: save_rules.SavePolicies | None) -> save_rules.SaveRule | None:
    """Returns the rule of save policies, native and Orbax's; None saves at every call."""
    return None if policies is None else save_rules.save_rule(policies, adapt=adapt_save_policy)


def adapted_keep_policies(policies: keep_rules.KeepPolicies | None) -> tuple[KeepPolicy, ...]:
    """Returns keep policies, native and Orbax's, as a tuple; an empty one keeps all."""
    return () if policies is None else keep_rules.keep_policies(policies, adapt=adapt_keep_policy)


def is_orbax_object(value: object) -> bool:
    """Returns whether the value's class is Orbax's or derives from one of Orbax's.

    Looks at names only: Orbax is not imported.
    """
    return any(_is_orbax_class(each) for each in type(value).__mro__)


def adapt_save_policy(policy: Any) -> Any:
    """Returns an Orbax policy as a native one, any other policy unchanged.

    Raises:
        UsageError: It is, or holds, Orbax's ContinuousCheckpointingPolicy, which needs JAX.
    """
    if not is_orbax_object(policy):
        return policy
    if _derives_from(policy, "ContinuousCheckpointingPolicy"):
        raise errors.UsageError(
            "save_policy: expected a policy that needs no JAX; got Orbax's "
            "ContinuousCheckpointingPolicy, which decides by JAX's distributed client. Use "
            "functional_ckpt.policies.Continuous() or every('90s') instead."
        )
    if _is_exactly(policy, "AnySavePolicy"):
        return AnySave(tuple(adapt_save_policy(each) for each in policy.policies))
    if _is_exactly(policy, "FixedIntervalPolicy", "SpecificStepsPolicy"):
        return _StepSavePolicy(policy)
    return _SavePolicy(policy)


def adapt_keep_policy(policy: Any) -> Any:
    """Returns an Orbax policy as a native one, any other policy unchanged.

    An AnyPreservationPolicy without policies keeps everything, as an empty list does here (Orbax
    answers a single False).
    """
    if not is_orbax_object(policy):
        return policy
    if _is_exactly(policy, "AnyPreservationPolicy"):
        return AnyKeep(tuple(adapt_keep_policy(each) for each in policy.policies))
    return _KeepPolicy(policy)


def adapt_name_format(name_format: Any) -> Any:
    """Returns an Orbax step name format as a native one, any other format unchanged.

    Raises:
        UsageError: Its names do not hold the number of the step, or could be no directories.
    """
    if not is_orbax_object(name_format) and not _has_orbax_naming(name_format):
        return name_format
    if _is_exactly(name_format, "_StandardNameFormat"):
        # Orbax does not pad at all with a width of zero.
        pad = name_format.step_format_fixed_length or None
        return StepName(prefix=name_format.step_prefix, zero_pad=pad)
    if _is_exactly(name_format, "_CompositeNameFormat"):
        return CompositeStepName(
            write=adapt_name_format(name_format.write_name_format),
            read=tuple(adapt_name_format(each) for each in name_format.read_name_formats),
        )
    return _NameFormat(name_format)


@dataclass(frozen=True, slots=True)
class _SavePolicy:
    """One of Orbax's save-decision policies, given its kind of context."""

    theirs: Any

    @property
    def ignores_step(self) -> bool:
        return _is_exactly(self.theirs, "InitialSavePolicy", "PreemptionCheckpointingPolicy")

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        theirs = _decision_context(context.is_saving_in_progress, context.reached_preemption)
        return bool(self.theirs.should_save(step, previous_steps, context=theirs))


@dataclass(frozen=True, slots=True)
class _StepSavePolicy:
    """One of Orbax's save-decision policies that look at nothing but the number of the step."""

    theirs: Any
    step_only: ClassVar[Literal[True]] = True

    def fires_at(self, step: int) -> bool:
        info = StepInfo(step=step, time=_EPOCH)
        return bool(self.theirs.should_save(info, (), context=_decision_context(False, False)))

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        return self.fires_at(step.step)


@dataclass(frozen=True, slots=True)
class _KeepPolicy:
    """One of Orbax's preservation policies, given its kind of context."""

    theirs: Any

    def should_preserve(
        self, checkpoints: Sequence[StepInfo], /, *, context: KeepContext
    ) -> Sequence[bool]:
        return self.theirs.should_preserve(checkpoints, context=_preservation_context())


@dataclass(frozen=True, slots=True)
class _NameFormat:
    """A name format written against Orbax's protocol: it builds names but does not parse them.

    A name is parsed by trying each run of digits in it: the step is the one whose name is built
    exactly so.
    """

    theirs: Any

    def __post_init__(self) -> None:
        for step in _PROBES:
            name = self.theirs.build_name(step)
            if self.parse(name) != step:
                raise errors.UsageError(
                    f"step name format {self.theirs!r}: expected names that hold the number of "
                    f"their step in digits; got {name!r} for step {step}."
                )

    def build_name(self, step: int) -> str:
        return self.theirs.build_name(step)

    def names(self, step: int) -> tuple[str, ...]:
        return (self.build_name(step),)

    def parse(self, name: str) -> int | None:
        if len(name) > 255:  # no file has such a name, and int() refuses thousands of digits
            return None
        for digits in re.findall(r"[0-9]+", name):
            if self.theirs.build_name(int(digits)) == name:
                return int(digits)
        return None


@cache
def _decision_context(saving: bool, preempted: bool) -> Any:
    from orbax.checkpoint import checkpoint_managers, options

    return checkpoint_managers.DecisionContext(
        is_saving_in_progress=saving,
        reached_preemption=preempted,
        multiprocessing_options=options.MultiprocessingOptions(),
    )


@cache
def _preservation_context() -> Any:
    from orbax.checkpoint import checkpoint_managers

    return checkpoint_managers.PreservationContext()


def _is_orbax_class(kind: type) -> bool:
    return kind.__module__ == "orbax" or kind.__module__.startswith("orbax.")


def _derives_from(value: object, name: str) -> bool:
    return any(each.__name__ == name and _is_orbax_class(each) for each in type(value).__mro__)


def _has_orbax_naming(value: object) -> bool:
    # Written against Orbax's protocol without deriving from it, as protocols allow.
    return callable(getattr(value, "build_name", None)) and not hasattr(value, "parse")


def _is_exactly(value: object, *names: str) -> bool:
    # Subclasses may decide differently: only Orbax's own class is known.
    return type(value).__name__ in names and _is_orbax_class(type(value))
