"""Checkpoints for PyTorch in the style of Orbax: steps of named items, written asynchronously.

A program needs three lines:

    import functional_ckpt as fc

    with fc.CheckpointManager("runs/a", save_policy=fc.policies.every(100)) as manager:
        ...
        manager.save(step, {"model": model, "optimizer": fc.Optimizer(optimizer, model)})
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functional_ckpt import errors as errors
    from functional_ckpt import flags as flags
    from functional_ckpt import hooks as hooks
    from functional_ckpt import interop as interop
    from functional_ckpt import listeners as listeners
    from functional_ckpt import policies as policies
    from functional_ckpt.checkpoint import metadata as metadata
    from functional_ckpt.checkpoint import restore as restore
    from functional_ckpt.checkpoint import save as save
    from functional_ckpt.core.arrays.spec import ArraySpec as ArraySpec
    from functional_ckpt.core.restore_plan.plan import RestoreReport as RestoreReport
    from functional_ckpt.core.tree.placeholders import AS_SAVED as AS_SAVED
    from functional_ckpt.core.tree.placeholders import Fill as Fill
    from functional_ckpt.errors import CheckpointError as CheckpointError
    from functional_ckpt.events import Event as Event
    from functional_ckpt.handlers import CheckpointItem as CheckpointItem
    from functional_ckpt.handlers import Generator as Generator
    from functional_ckpt.handlers import Handler as Handler
    from functional_ckpt.handlers import Json as Json
    from functional_ckpt.handlers import Module as Module
    from functional_ckpt.handlers import Optimizer as Optimizer
    from functional_ckpt.handlers import PyTree as PyTree
    from functional_ckpt.handlers import Registry as Registry
    from functional_ckpt.handlers import Rng as Rng
    from functional_ckpt.handlers import Stateful as Stateful
    from functional_ckpt.handlers import TorchMetric as TorchMetric
    from functional_ckpt.handlers import default_registry as default_registry
    from functional_ckpt.manager import CheckpointManager as CheckpointManager
    from functional_ckpt.policies.progress import Progress as Progress
    from functional_ckpt.restoring.restore import Restored as Restored
    from functional_ckpt.saving.background import Commit as Commit
    from functional_ckpt.saving.options import Blocking as Blocking
    from functional_ckpt.saving.options import Eager as Eager
    from functional_ckpt.saving.options import Overlapped as Overlapped
    from functional_ckpt.steps.metadata import StepMetadata as StepMetadata
    from functional_ckpt.steps.names import CompositeStepName as CompositeStepName
    from functional_ckpt.steps.names import StepName as StepName
    from functional_ckpt.steps.template import StepTemplate as StepTemplate
    from functional_ckpt.steps.tiers import Tier as Tier

# Where each public name lives; imported when first used: the command line starts without torch.
_HOMES = {
    "AS_SAVED": "core.tree.placeholders",
    "ArraySpec": "core.arrays.spec",
    "Blocking": "saving.options",
    "CheckpointError": "errors",
    "CheckpointItem": "handlers",
    "CheckpointManager": "manager",
    "Commit": "saving.background",
    "CompositeStepName": "steps.names",
    "Eager": "saving.options",
    "Event": "events",
    "Fill": "core.tree.placeholders",
    "Generator": "handlers",
    "Handler": "handlers",
    "Json": "handlers",
    "Module": "handlers",
    "Optimizer": "handlers",
    "Overlapped": "saving.options",
    "Progress": "policies.progress",
    "PyTree": "handlers",
    "Registry": "handlers",
    "RestoreReport": "core.restore_plan.plan",
    "Restored": "restoring.restore",
    "Rng": "handlers",
    "StepMetadata": "steps.metadata",
    "StepName": "steps.names",
    "StepTemplate": "steps.template",
    "Stateful": "handlers",
    "Tier": "steps.tiers",
    "TorchMetric": "handlers",
    "default_registry": "handlers",
    "errors": "",
    "flags": "",
    "interop": "",
    "hooks": "",
    "listeners": "",
    "metadata": "checkpoint",
    "policies": "",
    "restore": "checkpoint",
    "save": "checkpoint",
}

__version__ = "0.1.0"
__all__ = [
    "AS_SAVED",
    "ArraySpec",
    "Blocking",
    "CheckpointError",
    "CheckpointItem",
    "CheckpointManager",
    "Commit",
    "CompositeStepName",
    "Eager",
    "Event",
    "Fill",
    "Generator",
    "Handler",
    "Json",
    "Module",
    "Optimizer",
    "Overlapped",
    "Progress",
    "PyTree",
    "Registry",
    "RestoreReport",
    "Restored",
    "Rng",
    "Stateful",
    "Tier",
    "TorchMetric",
    "StepMetadata",
    "StepName",
    "StepTemplate",
    "default_registry",
    "errors",
    "flags",
    "interop",
    "hooks",
    "listeners",
    "metadata",
    "policies",
    "restore",
    "save",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if home == "":
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
