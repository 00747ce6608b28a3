"""Which handler a plain value gets."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from functional_ckpt import errors
from functional_ckpt.core.tree import flatten, structure
from functional_ckpt.core.tree.structure import Key, KeyPath
from functional_ckpt.handlers import classes, optimizer_names, parameter_names
from functional_ckpt.handlers.base import Item, Registry
from functional_ckpt.handlers.module import Module
from functional_ckpt.handlers.optimizer import Optimizer
from functional_ckpt.handlers.pytree import PyTree
from functional_ckpt.handlers.rng import Generator, is_generator
from functional_ckpt.handlers.stateful import Stateful, is_stateful
from functional_ckpt.handlers.torchmetrics import TorchMetric, is_metric

_DCP_STATEFUL = frozenset({"torch.distributed.checkpoint.stateful.Stateful"})
_Found: TypeAlias = Sequence[tuple[KeyPath, Any]]


class Owners:
    """Binds optimizers to the modules that own their parameters.

    The modules in the optimizer's own item are asked first, then those of all items. If one module
    owns all parameters, the names are that module's. Else each name starts with the path of its
    module: within the item, or from the item's name on.
    """

    def __init__(self, items: Mapping[str, Any]) -> None:
        """Remembers the items; they are looked through when the first optimizer is bound."""
        self._items = items
        self._bound: dict[int, Optimizer] = {}

    def bind(self, optimizer: torch.optim.Optimizer) -> Optimizer:
        """Returns the item of an optimizer.

        Raises:
            UsageError: A parameter belongs to no module of the items.
        """
        if id(optimizer) not in self._bound:
            self._bound[id(optimizer)] = self._bind(optimizer)
        return self._bound[id(optimizer)]

    @functools.cached_property
    def _found(self) -> Mapping[str, _Found]:
        return {name: list(_walk(item)) for name, item in self._items.items()}

    def _bind(self, optimizer: torch.optim.Optimizer) -> Optimizer:
        wanted = {id(each) for group in optimizer.param_groups for each in group["params"]}
        homes = (found for found in self._found.values() if any(o is optimizer for _, o in found))
        everywhere = [
            ((Key(name), *path), each)
            for name, found in self._found.items()
            for path, each in found
        ]
        for found in (next(homes, []), everywhere):
            if (model := _model_of(_modules(found), wanted)) is not None:
                return Optimizer(optimizer, model)
        optimizer_names.check_not_flattened(optimizer, ())
        known = frozenset[int]().union(
            *(parameter_names.ids_of(module) for _, module in _modules(everywhere))
        )
        unknown = parameter_names.without_name(optimizer, known)
        raise errors.UsageError(
            f"{type(optimizer).__name__} is saved by the names of its parameters, and no module in "
            f"the items has {', '.join(unknown)}. Add that module to the items, or pass "
            "fc.Optimizer(optimizer, model); model may also be (name, parameter) pairs."
        )


def _modules(found: _Found) -> list[tuple[str, torch.nn.Module]]:
    return [
        (structure.join(path), each) for path, each in found if isinstance(each, torch.nn.Module)
    ]


def _model_of(
    modules: Sequence[tuple[str, torch.nn.Module]], wanted: set[int]
) -> parameter_names.Model | None:
    """Returns the first module with all wanted parameters, or those that have them together."""
    owned = [(name, module, parameter_names.ids_of(module)) for name, module in modules]
    for _, module, ids in owned:
        if wanted <= ids:
            return module
    parts = [(name, module, ids) for name, module, ids in owned if wanted & ids]
    if not wanted <= frozenset[int]().union(*(ids for _, _, ids in parts)):
        return None
    return tuple((name, module) for name, module, _ in parts)


def _walk(item: Any) -> Iterator[tuple[KeyPath, Any]]:
    """Yields every module and optimizer in an item, with its first path."""
    seen: dict[int, Any] = {}  # holds the values, so that no other one gets the id
    remaining: list[tuple[KeyPath, Any]] = [((), item)]
    while remaining:
        path, value = remaining.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, (torch.nn.Module, torch.optim.Optimizer)):
            yield path, value
        elif isinstance(value, Item):
            remaining.append((path, value.value))
        elif not isinstance(value, torch.Tensor):
            opened = flatten.flatten_one_level(value)
            if opened is not None:
                pairs = zip(opened.keys, opened.children, strict=True)
                remaining += reversed([((*path, key), child) for key, child in pairs])


def default_registry() -> Registry:
    """Returns the registry used when none is given; extend it with `with_handler`.

    Asked in this order: torchmetrics metrics, modules, optimizers (named by the modules that stand
    in the same save or restore), random number generators, objects with `state_dict` and
    `load_state_dict`, torchtitan's container of optimizers among them; everything else is a pytree.
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
    """Not a container of optimizers whose state has a layout of its own, such as torchtitan's."""
    return isinstance(value, torch.optim.Optimizer) and not (
        classes.is_a(value, _DCP_STATEFUL)
        and type(value).state_dict is not torch.optim.Optimizer.state_dict
    )


def _bind_alone(value: Any) -> Item:
    return Owners({}).bind(value)


def for_items(registry: Registry, items: Mapping[str, Any]) -> Registry:
    """Returns the registry for one save or restore, in which the items' modules name parameters."""
    bind = Owners(items).bind
    rules = (
        each._replace(bind=bind) if each.bind is _bind_alone else each for each in registry.defaults
    )
    return dataclasses.replace(registry, defaults=tuple(rules))
