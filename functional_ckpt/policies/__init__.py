"""Save policies and keep policies: `fc.policies`.

Save policies: `every`, `When`, `FixedInterval`, `SpecificSteps`, `InitialSave`, `AtEnd`,
`Continuous`, `Preemption`. Keep policies: `LatestN`, `LatestDuration`, `BestN`, `EveryNSteps`,
`EveryNSeconds`, `CustomSteps`, `PreserveAll`. A list of either means any of them.

Custom policies implement the protocols `SavePolicy` and `KeepPolicy` (Orbax's), and are given
`StepInfo`, `SaveContext` and `KeepContext`.
"""

from __future__ import annotations

from functional_ckpt.policies.base import (
    KeepContext,
    KeepPolicy,
    SaveContext,
    SavePolicy,
    StepInfo,
    StepPolicy,
)
from functional_ckpt.policies.keep import (
    BestN,
    CustomSteps,
    EveryNSeconds,
    EveryNSteps,
    LatestDuration,
    LatestN,
    PreserveAll,
)
from functional_ckpt.policies.save import (
    AtEnd,
    Continuous,
    FixedInterval,
    InitialSave,
    Preemption,
    SpecificSteps,
    When,
    every,
)

__all__ = [
    "AtEnd",
    "BestN",
    "Continuous",
    "CustomSteps",
    "EveryNSeconds",
    "EveryNSteps",
    "FixedInterval",
    "InitialSave",
    "KeepContext",
    "KeepPolicy",
    "LatestDuration",
    "LatestN",
    "Preemption",
    "PreserveAll",
    "SaveContext",
    "SavePolicy",
    "SpecificSteps",
    "StepInfo",
    "StepPolicy",
    "When",
    "every",
]


def __dir__() -> list[str]:
    """Returns the public names, without the modules of this package."""
    return list(__all__)
