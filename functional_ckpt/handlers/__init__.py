"""Handlers and items: they lower values to pytrees and lift them back."""

from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.tree.placeholders import AS_SAVED, Fill
from functional_ckpt.handlers.base import CheckpointItem, Handler, Item, Registry, item_class
from functional_ckpt.handlers.json import Json, JsonHandler
from functional_ckpt.handlers.module import Module, ModuleHandler
from functional_ckpt.handlers.optimizer import Optimizer, OptimizerHandler
from functional_ckpt.handlers.pytree import PyTree, PyTreeHandler
from functional_ckpt.handlers.registry import default_registry
from functional_ckpt.handlers.rng import Generator, GeneratorHandler, Rng, RngHandler
from functional_ckpt.handlers.stateful import Stateful, StatefulHandler
from functional_ckpt.handlers.torchmetrics import TorchMetric, TorchMetricHandler
from functional_ckpt.handlers.training import training_items

__all__ = [
    "AS_SAVED",
    "ArraySpec",
    "CheckpointItem",
    "Fill",
    "Generator",
    "GeneratorHandler",
    "Handler",
    "Item",
    "Json",
    "JsonHandler",
    "Module",
    "ModuleHandler",
    "Optimizer",
    "OptimizerHandler",
    "PyTree",
    "PyTreeHandler",
    "Registry",
    "Rng",
    "RngHandler",
    "Stateful",
    "StatefulHandler",
    "TorchMetric",
    "TorchMetricHandler",
    "default_registry",
    "item_class",
    "training_items",
]
