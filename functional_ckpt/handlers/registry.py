"""Which handler a plain value gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from functional_ckpt import errors
from functional_ckpt.handlers.base import Item, Registry
from functional_ckpt.handlers.module import Module
from functional_ckpt.handlers.owners import Owners
from functional_ckpt.handlers.pytree import PyTree
from functional_ckpt.handlers.rng import Generator, is_generator
from functional_ckpt.handlers.stateful import Stateful, is_stateful
from functional_ckpt.handlers.torchmetrics import TorchMetric, is_metric


def default_registry() -> Registry:
    """The registry used when none is given; extend it with `with_handler`.

    Asked in this order: torchmetrics metrics, modules, optimizers (named by the modules that stand
    in the same save or restore), random number generators, objects with `state_dict` and
    `load_state_dict`; everything else is a pytree.
    """
    registry = Registry()
    for fits, bind in (  # the rule that is added last is asked first
        (_always, PyTree),
        (is_stateful, Stateful),
        (is_generator, Generator),
        (_is_optimizer, _bind_alone),
        (_is_module, Module),
        (is_metric, TorchMetric),
    ):
        registry = registry.with_rule(fits, bind)
    return Registry(defaults=registry.rules)


def chosen(registry: object) -> Registry:
    """Returns a caller's registry, the default one for None; `UsageError` for another value."""
    if registry is None:
        return default_registry()
    if not isinstance(registry, Registry):
        raise errors.UsageError(
            f"registry must be an fc.Registry or None; got {registry!r:.80}. Extend "
            "fc.handlers.default_registry() with with_handler(type, handler)."
        )
    return registry


def _always(value: object) -> bool:
    return True


def _is_module(value: object) -> bool:
    return isinstance(value, torch.nn.Module)


def _is_optimizer(value: object) -> bool:
    return isinstance(value, torch.optim.Optimizer)


def _bind_alone(value: Any) -> Item:
    return Owners({}).bind(value)


def for_items(registry: Registry, items: Mapping[str, Any]) -> Registry:
    """The registry for one save or restore: modules in the items name optimizers' parameters."""
    bind = Owners(items).bind
    rules = (
        each._replace(bind=bind) if each.bind is _bind_alone else each for each in registry.defaults
    )
    return dataclasses.replace(registry, defaults=tuple(rules))
