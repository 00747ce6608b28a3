"""When to save and what to keep: `fc.policies`.

Save policies: `every`, `when`, `FixedInterval`, `SpecificSteps`, `InitialSave`, `Preemption`. Keep
policies: `LatestN`, `LatestDuration`, `best_n`, `BestN`, `EveryNSteps`, `EveryNSeconds`,
`CustomSteps`, `PreserveAll`, `preserve_all`. A list of either means any of them.

For policies of one's own: `SavePolicy` and `KeepPolicy` are the protocols (Orbax's), `StepInfo`,
`SaveContext` and `KeepContext` are their arguments.
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
    best_n,
    preserve_all,
)
from functional_ckpt.policies.save import (
    FixedInterval,
    InitialSave,
    Preemption,
    SpecificSteps,
    every,
    when,
)

__all__ = [
    "BestN",
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
    "best_n",
    "every",
    "preserve_all",
    "when",
]


def __dir__() -> list[str]:
    """Returns the public names: the modules of this package are its own affair."""
    return list(__all__)
