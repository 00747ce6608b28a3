"""The parameters of an optimizer: their names, and whether they are those of the checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import spec as spec_lib
from functional_ckpt.core.tree import structure
from functional_ckpt.handlers import classes, parameter_names

State: TypeAlias = dict[Any, Any]

# State whose key is not a parameter.
SHARED = "shared_state"
RESERVED = ("state", "param_groups", SHARED)


# Implementation flags, which depend on the run's devices: taken from the live optimizer. They are
# saved, and not restored. Everything else in a group is restored.
RUN_FLAGS = frozenset({"foreach", "fused", "capturable", "differentiable"})
# Keys that torch's schedulers add to a group: not options of the optimizer.
_OF_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "params"}
)
# Wrappers that hand every step to the optimizer that they hold -> the attribute it is under.
_WRAPPERS = {
    "accelerate.optimizer.AcceleratedOptimizer": "optimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer": "_optimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer": "_optimizer",
}
# State of torch's optimizers that has the shape of its parameter.
_LIKE_PARAMETER = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg"}
    | {"grad_avg", "acc_delta", "sum", "prev", "ax"}
)


@dataclasses.dataclass(frozen=True, slots=True)
class NamedOptimizer:
    """An optimizer and where its parameters' names come from.

    Attributes:
        optimizer: Any `torch.optim.Optimizer`.
        model: Names the parameters.
        outer: The ZeRO optimizer of which `optimizer` updates this rank's share; else None.
    """

    optimizer: torch.optim.Optimizer
    model: parameter_names.Model
    outer: torch.optim.Optimizer | None = None


def group_names(named: NamedOptimizer) -> list[list[str]]:
    """Returns the names of each group's parameters, in the groups' order."""
    names = parameter_names.names_of(named.model)
    unknown = parameter_names.without_name(named.optimizer, names)
    if unknown:
        raise errors.UsageError(
            "The optimizer updates parameters that the model does not have: "
            f"{', '.join(unknown)}. Pass the module that holds all of them, several modules by "
            "name, or (name, parameter) pairs."
        )
    groups = [[names[id(p)] for p in group["params"]] for group in named.optimizer.param_groups]
    _check_state_keys(named.optimizer, names)
    return groups


def by_name(named: NamedOptimizer) -> dict[str, torch.Tensor]:
    """Returns the optimizer's parameters by name."""
    return {
        name: parameter
        for group, names in zip(named.optimizer.param_groups, group_names(named), strict=True)
        for parameter, name in zip(group["params"], names, strict=True)
    }


def _check_state_keys(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key in cast("Mapping[Any, Any]", optimizer.state):
        if isinstance(key, torch.Tensor):
            if id(key) not in grouped:
                name = names.get(id(key), "a tensor the model does not have")
                raise errors.UsageError(
                    f"The optimizer has state for {name}, which is in none of its groups; "
                    "delete it (del optimizer.state[parameter]) or put the parameter back."
                )
        elif type(key) is not str:
            raise errors.UsageError(
                f"The optimizer has state under the key {key!r}; "
                "only parameters and str keys can be saved."
            )


def loads_its_own_way(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether `load_state_dict` is overridden or has hooks."""
    return (
        type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict
        or bool(optimizer._optimizer_load_state_dict_pre_hooks)
        or bool(optimizer._optimizer_load_state_dict_post_hooks)
    )


def check_not_flattened(optimizer: torch.optim.Optimizer, model: parameter_names.Model) -> None:
    """Raises `UsageError` for parameters that FSDP1 has cut into flat pieces, one for each rank.

    Their state has the same name and often the same shape on all ranks, and is not the same.
    """
    groups = optimizer.param_groups
    if not any(getattr(p, "_fsdp_flattened", False) for group in groups for p in group["params"]):
        return
    named = (("", model),) if isinstance(model, torch.nn.Module) else model
    modules = [each for _, each in named if isinstance(each, torch.nn.Module)]
    if modules:
        inner = (each for module in modules for each in module.modules())
        wrappers: list[Any] = [each for each in inner if classes.is_a(each, classes.FSDP1)]
        if wrappers and all(each.sharding_strategy.name == "NO_SHARD" for each in wrappers):
            return
    raise errors.UsageError(
        "The optimizer updates parameters that FullyShardedDataParallel (FSDP1) has flattened: "
        "each rank has a piece of the state, under no name of its own. Use FSDP2 "
        "(torch.distributed.fsdp.fully_shard); or save the state that torch gathers, as a plain "
        "item, get_optimizer_state_dict(model, optimizer, "
        "options=StateDictOptions(full_state_dict=True)) of "
        "torch.distributed.checkpoint.state_dict, restore it with None as its target, and call "
        "set_optimizer_state_dict(model, optimizer, state, options=...)."
    )


def check_layout(saved: Any) -> None:
    """Raises `MismatchError` for a tree that is not an optimizer's."""
    if (
        isinstance(saved, dict)
        and isinstance(saved.get("state"), dict)
        and isinstance(saved.get("param_groups"), list)
        and all(isinstance(g, dict) and "params" in g for g in saved["param_groups"])
    ):
        return
    raise errors.MismatchError(
        "Not an optimizer saved by parameter name: expected "
        "{'state': {...}, 'param_groups': [...]}, got "
        f"{sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__}."
    )


def check_same_parameters(own: State, saved: State, optimizer: torch.optim.Optimizer) -> None:
    """Raises `MismatchError` unless both have the same parameters in the same groups."""
    here, there = _membership(own), _membership(saved)
    missing = [name for name in here if name not in there]
    unexpected = [name for name in there if name not in here]
    if not loads_its_own_way(optimizer):  # else its hooks may know what to do with them
        unexpected += [str(key) for key in saved if key not in own and key not in RESERVED]
    moved = [
        f"{name}: in group {there[name]} of the checkpoint, in group {here[name]} here"
        for name in here
        if name in there and here[name] != there[name]
    ]
    counts = [len(tree["param_groups"]) for tree in (own, saved)]
    if counts[0] != counts[1]:
        moved.append(f"param_groups: {counts[1]} in the checkpoint, {counts[0]} here")
    if isinstance(optimizer, torch.optim.LBFGS) and not missing and list(here) != list(there):
        moved.append("params: LBFGS flattens them in order, and the order differs")
    if not (missing or unexpected or moved):
        return
    lines = [
        *(f"  not in the checkpoint: {name}" for name in missing),
        *(f"  only in the checkpoint: {name}" for name in unexpected),
        *(f"  {line}" for line in moved),
    ]
    raise errors.MismatchError(
        "The optimizer's parameters are not the checkpoint's:\n" + "\n".join(lines),
        missing=missing,
        unexpected=unexpected,
        mismatched=moved,
    )


def _membership(tree: State) -> dict[str, int]:
    return {
        name: index for index, group in enumerate(tree["param_groups"]) for name in group["params"]
    }


# ------------------------------------------------------------------------------------ numbers


def numbered(saved: State, named: NamedOptimizer) -> dict[int, str]:
    """Number -> name of each parameter, where a checkpoint numbers them; empty where it names them.

    `torch.optim` numbers parameters in the order of the groups, and so do the files of other
    programs.

    Raises:
        MismatchError: The groups have other sizes than the optimizer's.
    """
    numbers: list[list[int]] = []
    for group in saved["param_groups"]:
        params = group["params"]
        if isinstance(params, spec_lib.ArraySpec):  # many plain numbers are stored as one array
            first = sum(map(len, numbers))
            params = list(range(first, first + params.num_elements))
        if any(type(number) is not int for number in params):
            return {}
        numbers.append(list(params))
    if not any(numbers):
        return {}
    names = group_names(named)
    sizes, own = [len(each) for each in numbers], [len(each) for each in names]
    if sizes != own:
        problem = f"groups of {sizes} numbered parameters, the target has groups of {own}"
        raise errors.MismatchError(
            f"The checkpoint has {problem}. Build the optimizer as it was built for the run that "
            "was saved.",
            mismatched=[f"param_groups: {problem}"],
        )
    flat = itertools.chain.from_iterable
    return dict(zip(flat(numbers), flat(names), strict=True))


def named_by(tree: State, names: Mapping[int, str]) -> State:
    """Returns a tree whose parameters are numbered, with names for the numbers."""
    if not names:
        return tree
    remaining = iter(names.values())
    return {
        **tree,
        "state": {names.get(key, key): entry for key, entry in tree["state"].items()},
        "param_groups": [
            {**group, "params": [next(remaining) for _ in range(_count(group["params"]))]}
            for group in tree["param_groups"]
        ],
    }


def by_numbers(tree: State, names: Mapping[int, str]) -> State:
    """Returns the state of the parameters, numbered again: the opposite of `named_by`."""
    numbers = {name: number for number, name in names.items()}
    return {**tree, "state": {numbers.get(key, key): each for key, each in tree["state"].items()}}


def _count(params: Any) -> int:
    return params.num_elements if isinstance(params, spec_lib.ArraySpec) else len(params)


# ------------------------------------------------------------------------------------ same class


def described(tree: State, named: NamedOptimizer) -> structure.Described:
    """Returns the lowered tree with class, options and parameter shapes, which restores compare."""
    groups = zip(named.optimizer.param_groups, tree["param_groups"], strict=True)
    parameters: dict[str, torch.Tensor] = {
        name: parameter
        for group, lowered in groups
        for parameter, name in zip(group["params"], lowered["params"], strict=True)
    }
    state = {
        name: structure.Described(entry, {"shape": list(parameters[name].shape)})
        if type(entry) is dict and all(type(size) is int for size in parameters[name].shape)
        else entry
        for name, entry in tree["state"].items()
    }
    detail = {
        "optimizer": _class_of(named.optimizer),
        "options": sorted(map(str, getattr(named.optimizer, "defaults", {}))),
    }
    return structure.Described({**tree, "state": state}, detail)


def _class_of(optimizer: torch.optim.Optimizer) -> str:
    current: Any = optimizer
    while attribute := next((_WRAPPERS[n] for n in _WRAPPERS if classes.is_a(current, (n,))), None):
        current = getattr(current, attribute)
    return type(current).__name__


def check_same_class(saved: State, optimizer: torch.optim.Optimizer) -> None:
    """Raises `MismatchError` unless the checkpoint is of an optimizer of this class.

    Where the checkpoint does not name the class, another one is recognised by its options: both
    sides have some that the other lacks.
    """
    here, there = _class_of(optimizer), _detail(saved).get("optimizer")
    if there is None:
        options = {
            str(key)
            for group in saved["param_groups"]
            for key in group
            if key not in RUN_FLAGS | _OF_SCHEDULERS
        }
        own = set(map(str, getattr(optimizer, "defaults", {}))) - RUN_FLAGS
        known = own | {str(key) for group in optimizer.param_groups for key in group}
        if not saved["param_groups"] or not (options - known and own - options):
            return
        there = f"an optimizer with the options {', '.join(sorted(options))}"
    elif there == here:
        return
    problem = f"the target is {here}, the checkpoint has {there}"
    raise errors.MismatchError(
        f"The optimizer is of another class: {problem}. Use the class that was saved, or leave the "
        "item out; state and options of one algorithm mean nothing to another.",
        mismatched=[f"optimizer: {problem}"],
    )


def check_same_size(saved: State, optimizer: torch.optim.Optimizer) -> None:
    """Raises `MismatchError` where LBFGS's flat vectors are not of as many numbers as here."""
    if not isinstance(optimizer, torch.optim.LBFGS):
        return
    here = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    for name, entry in saved["state"].items():
        flat = entry.get("prev_flat_grad") if isinstance(entry, dict) else None
        if isinstance(flat, spec_lib.ArraySpec) and flat.shape != (here,):
            problem = f"{name}: state of {flat.shape[0]} numbers, {here} here"
            raise errors.MismatchError(
                f"The optimizer's parameters have other sizes than the checkpoint's: {problem}.",
                mismatched=[problem],
            )


def options_lost(saved: State, group: State) -> frozenset[str]:
    """Options of the saved optimizer that the target's group does not have."""
    options = cast("list[str]", _detail(saved).get("options", []))
    return frozenset(options) - RUN_FLAGS - {str(key) for key in group}


def shape_problem(saved: object, live: object, parameter: torch.Tensor, kind: type) -> str | None:
    """Returns the expected value for state of a parameter with another saved shape."""
    shape = tuple(parameter.shape)
    expected = f"state of a parameter of shape {list(shape)}"
    if (known := _detail(saved).get("shape")) is not None:
        return None if tuple(cast("list[int]", known)) == shape else expected
    if not isinstance(saved, dict):
        return None
    lives = cast("State", live) if isinstance(live, dict) else {}
    for key, spec in cast("State", saved).items():
        if not isinstance(spec, spec_lib.ArraySpec) or spec.shape == shape:
            continue
        own = lives.get(key)
        is_like_parameter = (
            tuple(own.shape) == shape and own.dim() > 0
            if isinstance(own, torch.Tensor)
            else key in _LIKE_PARAMETER and kind.__module__.startswith("torch.optim.")
        )
        if is_like_parameter:
            return expected
    return None


def _detail(tree: object) -> Mapping[str, object]:
    return tree.detail if isinstance(tree, structure.Described) else {}
