"""Which handler a plain value gets."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from functional_ckpt import errors
from functional_ckpt.handlers.base import Registry
from functional_ckpt.handlers.module import Module
from functional_ckpt.handlers.pytree import PyTree
from functional_ckpt.handlers.rng import Generator, is_generator
from functional_ckpt.handlers.stateful import Stateful, is_stateful
from functional_ckpt.handlers.torchmetrics import TorchMetric, is_metric

__all__ = ["default_registry"]


def default_registry() -> Registry:
    """The registry used when none is given; extend it with `with_handler`.

    Asked in this order: torchmetrics metrics, modules, optimizers (an error: they need their
    model), random number generators, objects with `state_dict` and `load_state_dict`; everything
    else is a pytree.
    """
    registry = Registry()
    for fits, bind in (  # the rule that is added last is asked first
        (_always, PyTree),
        (is_stateful, Stateful),
        (is_generator, Generator),
        (_is_optimizer, _refuse_optimizer),
        (_is_module, Module),
        (is_metric, TorchMetric),
    ):
        registry = registry.with_rule(fits, bind)
    return Registry(defaults=registry.rules)


def _always(value: object) -> bool:
    del value
    return True


def _is_module(value: object) -> bool:
    return isinstance(value, torch.nn.Module)


def _is_optimizer(value: object) -> bool:
    return isinstance(value, torch.optim.Optimizer)


def _refuse_optimizer(value: Any) -> NoReturn:
    raise errors.UsageError(
        f"{type(value).__name__} is saved by the names of its parameters, and needs the model that "
        "names them: pass fc.Optimizer(optimizer, model)."
    )
