"""`torch.optim.Optimizer`: state and groups by parameter name, filled in place.

On disk: `{"state": {name: {key: value}}, "param_groups": [{option: value, "params": [name,
...]}]}`, and whatever else the optimizer's `state_dict` (its hooks, an override) adds beside these
two.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.arrays import spec as spec_lib
from functional_ckpt.core.tree import encode, memory, structure
from functional_ckpt.core.tree import flatten as tree_lib
from functional_ckpt.core.tree.placeholders import AS_SAVED, NOTHING, Fill, Refused
from functional_ckpt.core.tree.structure import MergedNames
from functional_ckpt.handlers import classes, dtensor_parts, optimizer_names, parameter_names
from functional_ckpt.handlers.base import Handler, Item, item_class
from functional_ckpt.handlers.optimizer_names import NamedOptimizer, State

# Parameters by index and by the user's names: replaced by the model's names.
_NAMING = frozenset({"params", "param_names"})
# Scalars that torch.optim keeps on the CPU unless the step is fused or capturable (see "special
# device hosting for step" in torch/optim/optimizer.py); all other state lives with its parameter.
_HOST_SCALARS = frozenset({"step", "mu_product"})
# Each rank has an optimizer of its own for its share of the parameters, `optim`.
_ZERO = frozenset({"torch.distributed.optim.zero_redundancy_optimizer.ZeroRedundancyOptimizer"})


@dataclasses.dataclass(frozen=True, slots=True)
class OptimizerHandler(Handler):
    """Saves an optimizer's state by parameter name; restores lazily created state too.

    The groups must be those of the checkpoint: as many, holding the same parameters. Within a group
    order does not matter, save to LBFGS, which flattens its parameters in order.

    Attributes:
        model: Names the parameters that it updates.
    """

    model: parameter_names.Model

    def lower(self, value: Any) -> State:
        """State and groups by name, as live references, and the optimizer's identity."""
        return optimizer_names.described(self.own(value), self._named(value))

    def own(self, value: Any) -> State:
        """State and groups by name, as live references."""
        named = self._named(value)
        names = optimizer_names.group_names(named)
        packed: Mapping[str, Any] = named.optimizer.state_dict()
        if not {"state", "param_groups"} <= packed.keys():
            raise errors.UsageError(
                f"{type(named.optimizer).__name__}.state_dict() is not laid out like "
                f"torch.optim's: it has {sorted(map(str, packed))}; "
                "save it with fc.Stateful(optimizer)."
            )
        flat = [name for group in names for name in group]
        lowered: State = {k: v for k, v in packed.items() if k not in optimizer_names.RESERVED}
        shared = {key: entry for key, entry in packed["state"].items() if type(key) is not int}
        if shared:
            lowered[optimizer_names.SHARED] = shared
        lowered["state"] = {
            flat[key]: entry for key, entry in packed["state"].items() if type(key) is int
        }
        lowered["param_groups"] = [
            {**{k: v for k, v in group.items() if k not in _NAMING}, "params": MergedNames(params)}
            for group, params in zip(packed["param_groups"], names, strict=True)
        ]
        return cast("State", tree_lib.map_leaves(_off_graph, lowered))

    def optimizers(self, value: Any) -> tuple[torch.optim.Optimizer, ...]:
        """Returns the optimizer, and the one that wraps it."""
        named = self._named(value)
        return (named.optimizer,) if named.outer is None else (named.optimizer, named.outer)

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> State:
        """Returns the stored tree, with the live tensors as targets.

        Args:
            value: The optimizer.
            saved: The checkpoint's tree.
            strict: Whether other parameters than the checkpoint's are an error. If not, those that
                both sides know are restored and the others keep the state they have.

        Raises:
            MismatchError: Another class of optimizer, whether strict or not; other parameters, or
                parameters in other groups, than the checkpoint has.
        """
        named = self._named(value)
        own = self.own(value)
        optimizer_names.check_layout(saved)
        names = optimizer_names.numbered(saved, named)
        saved = optimizer_names.named_by(saved, names)
        optimizer_names.check_same_class(saved, named.optimizer)
        optimizer_names.check_same_size(saved, named.optimizer)
        if strict:
            optimizer_names.check_same_parameters(own, saved, named.optimizer)
        match = _Matching(own, saved, type(named.optimizer))
        by_name = optimizer_names.by_name(named)
        # State of a parameter that is not here (of another pipeline stage) is not read.
        known = {name for group in own["param_groups"] for name in group["params"]}
        target = {
            **dict.fromkeys(saved, AS_SAVED),
            "state": {
                name: match.entry(own["state"].get(name), entry, by_name[name])
                for name, entry in saved["state"].items()
                if name in known
            },
            "param_groups": [
                match.group(own["param_groups"][index], group)
                if index < len(own["param_groups"])
                else AS_SAVED
                for index, group in enumerate(saved["param_groups"])
            ],
        }
        return optimizer_names.by_numbers(target, names)

    def lift(self, value: Any, tree: Any) -> torch.optim.Optimizer:
        """Returns the optimizer, with the saved options of groups and state of parameters."""
        named = self._named(value)
        tree = optimizer_names.named_by(tree, optimizer_names.numbered(tree, named))
        _restore_options(named.optimizer, tree)
        _restore_state(named, tree)
        if named.outer is not None:
            # It hands its options to the one inside at every step.
            _restore_options(named.outer, tree)
        return value

    def _named(self, optimizer: Any) -> NamedOptimizer:
        if classes.is_a(optimizer, _ZERO):
            return NamedOptimizer(optimizer.optim, self.model, optimizer)
        return NamedOptimizer(optimizer, self.model)


@item_class
class Optimizer(Item):
    """An optimizer, saved by the names of its parameters and filled in place by restore.

    Args:
        value: Any `torch.optim.Optimizer`. Of a `ZeroRedundancyOptimizer`, every rank saves the
            state of the parameters that it updates, and restores that of those it updates then.
        model: The module whose parameters it updates (wrapped or not); several modules by name,
            which is the prefix of their parameters' names; or `(name, parameter)` pairs.
        replicated: `checked` makes plain tensors that differ between ranks an error (samples are
            compared); `unchecked` saves the first rank's.

    Raises:
        UsageError: Not an optimizer, or nothing that names parameters; or parameters that FSDP1 has
            flattened.
    """

    value: torch.optim.Optimizer
    model: (
        torch.nn.Module
        | Mapping[str, torch.nn.Module]
        | Iterable[tuple[str, torch.Tensor | torch.nn.Module]]
    )

    def __post_init__(self) -> None:
        """Raises `UsageError` for other values than optimizers."""
        if isinstance(self.value, torch.nn.Module):
            raise errors.UsageError(
                "fc.Optimizer(optimizer, model) got a module first; are the two exchanged?"
            )
        if not isinstance(self.model, torch.nn.Module):
            given = cast("Any", self.model)
            if not isinstance(given, Iterable):
                raise errors.UsageError(
                    "fc.Optimizer(optimizer, model): model must be a module, modules by name, or "
                    f"(name, parameter) pairs; got {type(given).__name__}."
                )
            pairs = given.items() if isinstance(given, Mapping) else given
            object.__setattr__(self, "model", tuple(pairs))
        self.check()

    @property
    def handler(self) -> OptimizerHandler:
        """The handler that the options describe."""
        return OptimizerHandler(cast("Any", self.model))

    def check(self) -> None:
        """Raises `UsageError` for other values than optimizers."""
        Item.check(self)
        if not isinstance(cast("object", self.value), torch.optim.Optimizer):
            raise errors.UsageError(
                f"Expected a torch.optim.Optimizer, got {type(self.value).__name__}; "
                "fc.Stateful saves any object with state_dict() and load_state_dict()."
            )
        optimizer_names.check_not_flattened(self.value, cast("Any", self.model))


# ------------------------------------------------------------------------------------ matching


class _Matching:
    """Puts live tensors where the checkpoint has arrays like them."""

    def __init__(self, own: State, saved: State, kind: type) -> None:
        self.saved = saved
        self.kind = kind
        counts = collections.Counter(
            memory.storage_key(tensor) for tensor in _tensors([own["state"], own["param_groups"]])
        )
        # Memory that two live entries share is not filled: in the checkpoint the two may differ.
        self.aliased: frozenset[Hashable] = frozenset(
            key for key, count in counts.items() if key is not None and count > 1
        )

    def entry(self, live: Any, saved: Any, parameter: torch.Tensor) -> Any:
        """Returns the state of a parameter; a mismatch if the saved one had another shape."""
        problem = optimizer_names.shape_problem(saved, live, parameter, self.kind)
        if problem is None:
            return self.state(live, saved, parameter)
        return Refused(problem, NOTHING if live is None else live)

    def state(self, live: Any, saved: Any, parameter: torch.Tensor | None = None) -> Any:
        """Live tensors of the same spec are filled; all else comes as saved.

        State that a sharded parameter does not have yet is made with the parameter's sharding.
        """
        if isinstance(saved, structure.Handled):
            if saved.detail.get(structure.HANDLER) != dtensor_parts.DTensorPartsHandler.__name__:
                return AS_SAVED
            is_live = isinstance(live, torch.Tensor)
            return Fill(live) if is_live else dtensor_parts.made_like(parameter, saved)
        if isinstance(live, torch.Tensor):
            if isinstance(saved, dict) and hasattr(live, "__tensor_flatten__"):
                return live  # a new tensor of the live one's class, made of the saved parts
            return Fill(live) if self._fits(live, saved) else AS_SAVED
        if isinstance(saved, structure.Described) and "class" in saved.detail:
            return AS_SAVED  # one tensor of a subclass
        is_entry = isinstance(live, dict) or (live is None and parameter is not None)
        if isinstance(saved, dict) and is_entry:
            lives = cast("State", live or {})
            return {
                key: self.state(lives.get(key), child, parameter)
                for key, child in cast("State", saved).items()
            }
        if isinstance(saved, spec_lib.ArraySpec):
            return _new_shard(parameter, saved)
        one, other = cast("Any", live), cast("Any", saved)
        if type(one) in (list, tuple) and type(one) is type(other) and len(one) == len(other):
            return type(one)(map(self.state, one, other))
        return AS_SAVED

    def group(self, live: State, saved: State) -> State:
        """Like `state`; an option that is a tensor on both sides stays this tensor."""
        lost = optimizer_names.options_lost(self.saved, live)
        return {
            key: Refused(f"no option {key!r} of {self.kind.__name__}")
            if key in lost
            else Fill(live[key])
            if isinstance(live.get(key), torch.Tensor) and isinstance(option, spec_lib.ArraySpec)
            else self.state(live.get(key), option)
            for key, option in saved.items()
        }

    def _fits(self, live: torch.Tensor, saved: object) -> bool:
        return (
            isinstance(saved, spec_lib.ArraySpec)
            and _is_strided(live)
            and tuple(live.shape) == saved.shape
            and encode.torch_dtype_name(live.dtype) == saved.dtype
            and memory.storage_key(live) not in self.aliased
        )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if _is_strided(value):
            yield value
    elif isinstance(value, dict):
        for child in cast("dict[Any, Any]", value).values():
            yield from _tensors(child)
    elif isinstance(value, (list, tuple)):
        for child in cast("list[Any]", value):
            yield from _tensors(child)


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def _new_shard(parameter: torch.Tensor | None, saved: spec_lib.ArraySpec) -> Any:
    """Memory for state that a sharded parameter does not have yet: sharded as the parameter is."""
    if parameter is None or saved.shape == () or sharding.sharding_of(parameter) is None:
        return AS_SAVED
    return dtensor_parts.shard_like(parameter, saved)


def _off_graph(leaf: Any) -> Any:
    # With differentiable=True the state hangs on the autograd graph.
    return leaf.detach() if isinstance(leaf, torch.Tensor) and not leaf.is_leaf else leaf


# ------------------------------------------------------------------------------------ restoring


def _restore_options(optimizer: torch.optim.Optimizer, tree: State) -> None:
    for group, options in zip(optimizer.param_groups, tree["param_groups"], strict=False):
        for key, option in options.items():
            if key not in optimizer_names.RUN_FLAGS | _NAMING:
                group[key] = _as_run_wants(group.get(key), option)


def _restore_state(named: NamedOptimizer, tree: State) -> None:
    optimizer = named.optimizer
    restored = _restored_state(named, tree)
    if optimizer_names.loads_its_own_way(optimizer):
        optimizer.load_state_dict(_packed(optimizer, restored, tree))
        return
    for parameter, entry in restored.items():
        if entry is None:
            optimizer.state.pop(parameter, None)
        else:
            optimizer.state[parameter] = entry
    state = cast("dict[Any, Any]", optimizer.state)
    for key in [key for key in state if type(key) is str]:
        del state[key]
    state.update(tree.get(optimizer_names.SHARED, {}))


def _as_run_wants(live: Any, option: Any) -> Any:
    """Returns a group's option in the form of the live one: a tensor, a plain number, a tuple."""
    if isinstance(live, torch.Tensor):
        if option is not live:
            with memory.writing(live):
                live.copy_(torch.as_tensor(option, device="cpu"))
        return live
    if type(live) in (int, float) and isinstance(option, torch.Tensor):
        return option.item()
    if type(live) is tuple and type(option) in (list, tuple) and len(live) == len(option):
        return tuple(map(_as_run_wants, live, option))
    return option


def _place(entry: Any, live: Any, parameter: torch.Tensor, group: State, key: Any = None) -> Any:
    """State on the device where torch.optim keeps it; filled tensors stay unchanged."""
    if isinstance(entry, torch.Tensor):
        if entry is live or parameter.is_meta:
            return entry
        on_device = bool(group.get("fused") or group.get("capturable"))
        if key in _HOST_SCALARS and not on_device:
            return entry
        dtype = torch.float32 if key == "step" and on_device else entry.dtype
        return entry.to(device=parameter.device, dtype=dtype)
    if type(entry) is dict:
        known: Any = live if isinstance(live, dict) else {}
        return {k: _place(v, known.get(k), parameter, group, k) for k, v in entry.items()}
    if type(entry) in (list, tuple):
        same = type(live) is type(entry) and len(live) == len(entry)
        lives: Any = live if same else [None] * len(entry)
        return type(entry)(
            _place(v, x, parameter, group) for v, x in zip(entry, lives, strict=True)
        )
    return entry


def _restored_state(named: NamedOptimizer, tree: State) -> dict[torch.Tensor, Any]:
    """Returns each parameter that the checkpoint knows -> its state; None where it had none yet."""
    known = {name for group in tree["param_groups"] for name in group["params"]}
    state: dict[torch.Tensor, Any] = {}
    names = optimizer_names.group_names(named)
    for group, params in zip(named.optimizer.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], params, strict=True):
            if name in tree["state"]:
                live = named.optimizer.state.get(parameter)
                state[parameter] = _place(tree["state"][name], live, parameter, group)
            elif name in known:
                state[parameter] = None
    return state


def _packed(
    optimizer: torch.optim.Optimizer, restored: Mapping[torch.Tensor, Any], tree: State
) -> State:
    """Returns the restored state in the layout of the optimizer's own `state_dict`."""
    packed: State = {k: v for k, v in tree.items() if k not in optimizer_names.RESERVED}
    packed["state"] = dict(tree.get(optimizer_names.SHARED, {}))
    packed["param_groups"] = []
    index = 0
    for group in optimizer.param_groups:
        size = len(group["params"])
        options = {key: option for key, option in group.items() if key != "params"}
        packed["param_groups"].append({**options, "params": list(range(index, index + size))})
        for position, parameter in enumerate(group["params"], index):
            # A parameter that the checkpoint does not know keeps the state it has.
            entry = restored.get(parameter, optimizer.state.get(parameter))
            if entry is not None:
                packed["state"][position] = entry
        index += size
    return packed
