"""Handlers and items: they lower values to pytrees and lift them back."""

from functional_ckpt.handlers.base import CheckpointItem, Handler, Registry
from functional_ckpt.handlers.json import Json, JsonHandler
from functional_ckpt.handlers.module import Module, ModuleHandler
from functional_ckpt.handlers.optimizer import NamedOptimizer, Optimizer, OptimizerHandler
from functional_ckpt.handlers.pytree import PyTree, PyTreeHandler
from functional_ckpt.handlers.registry import default_registry
from functional_ckpt.handlers.rng import Generator, GeneratorHandler, Rng, RngHandler
from functional_ckpt.handlers.stateful import PerRankStatefulHandler, Stateful, StatefulHandler
from functional_ckpt.handlers.torchmetrics import Metric, MetricHandler

__all__ = [
    "CheckpointItem",
    "Generator",
    "GeneratorHandler",
    "Handler",
    "Json",
    "JsonHandler",
    "Metric",
    "MetricHandler",
    "Module",
    "ModuleHandler",
    "NamedOptimizer",
    "Optimizer",
    "OptimizerHandler",
    "PerRankStatefulHandler",
    "PyTree",
    "PyTreeHandler",
    "Registry",
    "Rng",
    "RngHandler",
    "Stateful",
    "StatefulHandler",
    "default_registry",
]
