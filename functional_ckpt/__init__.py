"""Checkpoints for PyTorch in the style of Orbax: steps of named items, written asynchronously.

A program needs three lines:

    import functional_ckpt as fc

    with fc.CheckpointManager("runs/a", save_policy=fc.policies.every(100)) as manager:
        ...
        manager.save(step, {"model": model, "optimizer": fc.Optimizer(optimizer, model)})
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functional_ckpt import errors as errors
    from functional_ckpt import flags as flags
    from functional_ckpt import handlers as handlers
    from functional_ckpt import hooks as hooks
    from functional_ckpt import interop as interop
    from functional_ckpt import listeners as listeners
    from functional_ckpt import policies as policies
    from functional_ckpt import protocols as protocols
    from functional_ckpt import step_names as step_names
    from functional_ckpt import transform as transform
    from functional_ckpt.checkpoint import metadata as metadata
    from functional_ckpt.checkpoint import restore as restore
    from functional_ckpt.checkpoint import save as save
    from functional_ckpt.core.restore_plan.plan import RestoreReport as RestoreReport
    from functional_ckpt.errors import CheckpointError as CheckpointError
    from functional_ckpt.events import Event as Event
    from functional_ckpt.handlers import CheckpointItem as CheckpointItem
    from functional_ckpt.handlers import Generator as Generator
    from functional_ckpt.handlers import Json as Json
    from functional_ckpt.handlers import Module as Module
    from functional_ckpt.handlers import Optimizer as Optimizer
    from functional_ckpt.handlers import PyTree as PyTree
    from functional_ckpt.handlers import Rng as Rng
    from functional_ckpt.handlers import Stateful as Stateful
    from functional_ckpt.handlers import TorchMetric as TorchMetric
    from functional_ckpt.handlers import training_items as training_items
    from functional_ckpt.manager import CheckpointManager as CheckpointManager
    from functional_ckpt.policies.progress import Progress as Progress
    from functional_ckpt.restoring.restore import Restored as Restored
    from functional_ckpt.saving.background import Commit as Commit
    from functional_ckpt.saving.options import Blocking as Blocking
    from functional_ckpt.saving.options import Eager as Eager
    from functional_ckpt.saving.options import Overlapped as Overlapped
    from functional_ckpt.steps.metadata import StepMetadata as StepMetadata
    from functional_ckpt.steps.node_local import NodeLocal as NodeLocal
    from functional_ckpt.steps.tiers import Tier as Tier

# Module -> its public names, which are imported when first used: the command line starts without
# torch. The other names of `__all__` are modules.
_HOMES = {
    "checkpoint": ("metadata", "restore", "save"),
    "core.restore_plan.plan": ("RestoreReport",),
    "errors": ("CheckpointError",),
    "events": ("Event",),
    "handlers": (
        *("CheckpointItem", "Generator", "Json", "Module", "Optimizer", "PyTree", "Rng"),
        *("Stateful", "TorchMetric", "training_items"),
    ),
    "manager": ("CheckpointManager",),
    "policies.progress": ("Progress",),
    "restoring.restore": ("Restored",),
    "saving.background": ("Commit",),
    "saving.options": ("Blocking", "Eager", "Overlapped"),
    "steps.metadata": ("StepMetadata",),
    "steps.node_local": ("NodeLocal",),
    "steps.tiers": ("Tier",),
}

# Old name -> new name.
_MOVED = {
    "Metric": "TorchMetric",
    "CompositeStepName": "step_names.CompositeStepName",
    "StepName": "step_names.StepName",
    "StepTemplate": "step_names.StepTemplate",
    "AS_SAVED": "handlers.AS_SAVED",
    "ArraySpec": "handlers.ArraySpec",
    "Fill": "handlers.Fill",
    "Handler": "handlers.Handler",
    "Registry": "handlers.Registry",
    "default_registry": "handlers.default_registry",
}

__version__ = "0.1.0"
__all__ = [
    "Blocking",
    "CheckpointError",
    "CheckpointItem",
    "CheckpointManager",
    "Commit",
    "Eager",
    "Event",
    "Generator",
    "Json",
    "Module",
    "NodeLocal",
    "Optimizer",
    "Overlapped",
    "Progress",
    "PyTree",
    "RestoreReport",
    "Restored",
    "Rng",
    "Stateful",
    "Tier",
    "TorchMetric",
    "StepMetadata",
    "errors",
    "flags",
    "handlers",
    "hooks",
    "interop",
    "listeners",
    "metadata",
    "policies",
    "protocols",
    "restore",
    "save",
    "step_names",
    "training_items",
    "transform",
]


if not TYPE_CHECKING:  # type checkers know the names above, and no others

    def __getattr__(name: str) -> Any:
        if (moved := _MOVED.get(name)) is not None:
            warnings.warn(f"fc.{name} is now fc.{moved}.", DeprecationWarning, stacklevel=2)
            module, _, name = f"{__name__}.{moved}".rpartition(".")
            return getattr(importlib.import_module(module), name)
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = next((home for home, names in _HOMES.items() if name in names), None)
        module = importlib.import_module(f"{__name__}.{home or name}")
        value = getattr(module, name) if home else module
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return list(__all__)
