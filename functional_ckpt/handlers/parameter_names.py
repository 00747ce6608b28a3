"""The names of an optimizer's parameters, taken from a module, several modules or pairs."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import TypeAlias

import torch

from functional_ckpt import errors
from functional_ckpt.handlers import module_names

Model: TypeAlias = torch.nn.Module | tuple[tuple[str, torch.Tensor | torch.nn.Module], ...]
"""A module, or `(name, parameter or module)` pairs: a module's name is the prefix of its names."""


def names_of(model: Model) -> dict[int, str]:
    """Returns the `id` of each tensor -> its first name."""
    names: dict[int, str] = {}
    owners: dict[str, int] = {}
    for name, tensor in _tensors(model):
        if owners.setdefault(name, id(tensor)) != id(tensor):
            raise errors.UsageError(f"Two parameters are named {name!r}.", key_path=name)
        names.setdefault(id(tensor), name)
    return names


def ids_of(module: torch.nn.Module) -> frozenset[int]:
    """Returns the `id` of each of a module's tensors."""
    return frozenset(id(tensor) for _, tensor in _tensors(module))


def _tensors(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(model, torch.nn.Module):
        for name, slot in module_names.slots(model):
            yield name, slot.tensor
        return
    for name, each in model:
        if isinstance(each, torch.nn.Module):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _tensors(each))
        else:
            yield name, each


def without_name(optimizer: torch.optim.Optimizer, known: Container[int]) -> list[str]:
    """Returns group, index and shape of each parameter whose `id` is not known."""
    return [
        f"param_groups[{index}]['params'][{number}] {tuple(parameter.shape)}"
        for index, group in enumerate(optimizer.param_groups)
        for number, parameter in enumerate(group["params"])
        if id(parameter) not in known
    ]
