"""`torch.nn.Module`: its state dict under clean names."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.nn import parameter

from functional_ckpt import errors
from functional_ckpt.core.arrays import spec as spec_lib
from functional_ckpt.core.tree import memory, structure
from functional_ckpt.core.tree.placeholders import AS_SAVED, Fill
from functional_ckpt.handlers import hub_config, module_metadata, module_names
from functional_ckpt.handlers.base import Handler, Item, item_class
from functional_ckpt.handlers.hub_config import Hub

_MAX_NAMES = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleHandler(Handler):
    """Saves parameters, persistent buffers and extra state by name; restores them in place.

    The module's `state_dict` is saved, with its hooks and overrides. Its tensors that belong to the
    module are filled, so parameters keep their identity. Anything else, and any submodule
    with its own way of loading, goes through the module's `load_state_dict` as well.

    Attributes:
        only: Shell patterns of names; None for all.
        device: Where tensors on the meta device are materialised; None for where restore puts them,
            the CPU.
    """

    only: tuple[str, ...] | None = None
    device: torch.device | None = None

    def lower(self, value: Any) -> dict[str, Any]:
        """Returns name -> detached tensor over the module's own memory, or extra state."""
        raw, entries = _read(value)
        state = self._chosen(value, entries)
        lazy = [name for name, entry in state.items() if _is_uninitialized(entry.value)]
        if lazy:
            raise errors.UnsupportedLeafError(
                f"Parameters of lazy modules have no shape yet: {', '.join(lazy)}; "
                "run a forward pass first.",
                key_path=lazy[0],
            )
        stored = {name: _stored(entry) for name, entry in state.items()}
        metadata = module_metadata.to_store(value, raw, _loads_its_own_way)
        return structure.Described(stored, metadata) if metadata else stored

    def own(self, value: Any) -> dict[str, Any]:
        """Returns name -> current value, of lazy modules too."""
        return {name: _detached(entry.value) for name, entry in self._entries(value).items()}

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> dict[str, Any]:
        """Returns name -> restore target: filled in place, or new memory for meta tensors.

        Raises:
            UsageError: A meta-device module that the checkpoint alone cannot materialise.
        """
        state = self._entries(value)
        _check_meta(value, state, whole=self.only is None)
        specs = cast("Mapping[str, Any]", saved) if isinstance(saved, Mapping) else {}
        spare = _other_names(state, specs)
        own_way = frozenset(each for each in value.modules() if _loads_its_own_way(each))
        # Leaves that the checkpoint lacks stay, so that the error or report names them.
        wanted = {
            name: _wanted(entry, specs[name], own_way) if name in specs else _detached(entry.value)
            for name, entry in state.items()
            if name not in spare
        }
        metadata = module_metadata.stored(saved)
        return structure.Described(wanted, metadata) if metadata else wanted

    def hub(self, value: Any, tree: Any) -> Hub | None:
        """Returns configuration and names of a module of transformers."""
        return hub_config.hub_of(value, tree) if self.only is None else None

    def first_rank_leaves(self, value: Any) -> Mapping[str, bool]:
        """Buffers that DDP broadcasts from the first rank; the statistics of batch norm."""
        return module_names.first_rank_buffers(value)

    def selects(self, name: str) -> bool:
        """Returns whether `only` selects a stored leaf, or the extra state that it is part of."""
        head, extra, _ = name.partition("_extra_state")
        return self.only is None or _matches(head + extra, self.only)

    def lift(self, value: Any, tree: Any) -> Any:
        """Returns the module, materialised and loaded where filling memory was not enough."""
        state = self._entries(value)
        values = cast("dict[str, Any]", tree)
        for name, entry in state.items():
            # A tied tensor is met under each of its names, and is no longer meta the second time.
            is_restored = name in values and not _is_meta(values[name])
            if is_restored and entry.is_own and _is_meta(entry.value):
                _materialize(entry.value, values[name], self.device)
        own_way = any(map(_loads_its_own_way, value.modules()))
        if own_way or any(name in values and not entry.is_own for name, entry in state.items()):
            self._load(value, state, values)
        return value

    def _load(self, module: Any, state: Mapping[str, _Entry], values: Mapping[str, Any]) -> None:
        """Calls `load_state_dict`; tensors that are filled already are not copied again."""
        loaded = {
            entry.raw_name: entry.value
            if entry.is_own and _is_same(entry.value, values[name])
            else values[name]
            for name, entry in state.items()
            if name in values and not _is_meta(values[name])
        }
        loaded = module_metadata.attach(module, loaded, values)
        if self.only is None and len(loaded) == len(state):
            module.load_state_dict(loaded)
        else:
            module.load_state_dict(loaded, strict=False)

    def _entries(self, module: Any) -> dict[str, _Entry]:
        return self._chosen(module, _read(module)[1])

    def _chosen(self, module: Any, entries: dict[str, _Entry]) -> dict[str, _Entry]:
        if self.only is None:
            return entries
        unused = [p for p in self.only if not any(_matches(name, (p,)) for name in entries)]
        if unused:
            raise errors.UsageError(
                f"only={unused[0]!r} matches no tensor of {type(module).__name__}; "
                f"it has {_some(entries)}."
            )
        return {name: entry for name, entry in entries.items() if _matches(name, self.only)}


@item_class
class Module(Item):
    """A module, filled in place by restore.

    Args:
        value: The module; prefixes of DDP, `torch.compile`, FSDP and activation checkpointing are
            removed from the names.
        only: Shell patterns (`"encoder.*"`) of the names to save, or to restore.
        device: Where restore materialises tensors of the meta device; None for the CPU.
        replicated: `checked` makes plain tensors that differ between ranks an error (samples are
            compared; not those of batch norm, nor buffers below a DDP that broadcasts them: the
            first rank's are saved); `unchecked` saves the first rank's of all.

    Raises:
        UsageError: Not a module.
    """

    value: torch.nn.Module
    only: str | Sequence[str] | None = dataclasses.field(default=None, kw_only=True)
    device: torch.device | str | None = dataclasses.field(default=None, kw_only=True)

    @property
    def handler(self) -> ModuleHandler:
        """The handler that the options describe."""
        return ModuleHandler(only=cast("Any", self.only), device=cast("Any", self.device))

    def __post_init__(self) -> None:
        """Raises `UsageError` for other values than modules."""
        self.check()
        if self.only is not None:
            patterns = (self.only,) if isinstance(self.only, str) else tuple(self.only)
            object.__setattr__(self, "only", patterns)
        if self.device is not None:
            object.__setattr__(self, "device", torch.device(self.device))

    def check(self) -> None:
        """Raises `UsageError` for other values than modules."""
        Item.check(self)
        if not isinstance(cast("object", self.value), torch.nn.Module):
            raise errors.UsageError(f"Expected a torch.nn.Module, got {type(self.value).__name__}.")


class _Entry(NamedTuple):
    """One entry of a module's state dict."""

    raw_name: str
    value: Any
    is_own: bool
    """The value is the tensor that the module keeps under this name: filling it restores it."""
    owner: torch.nn.Module | None

    @property
    def is_lazy(self) -> bool:
        return _is_uninitialized(self.value)


def _read(module: torch.nn.Module) -> tuple[Mapping[str, Any], dict[str, _Entry]]:
    """Returns the state dict, and its entries by clean name."""
    # First, since it shards the parameters of FSDP2 again and refuses a module with a cycle.
    own = {name: slot for name, slot in module_names.slots(module) if slot.persistent}
    state = _state_dict(module)
    entries: dict[str, _Entry] = {}
    prefixes: dict[str, str] = {}
    for raw_name, value in state.items():
        prefix, _, last = raw_name.rpartition(".")
        start = prefixes.get(prefix)
        if start is None:
            start = prefixes[prefix] = module_names.clean_prefix(module, prefix)
        name = start + last
        slot = own.get(name)
        is_own = slot is not None and _is_same(slot.tensor, value)
        if name in entries:
            raise errors.NameCollisionError(
                f"{raw_name!r} and {entries[name].raw_name!r} would both be named {name!r} "
                "without the wrappers' prefixes.",
                key_path=name,
            )
        entries[name] = _Entry(
            raw_name=raw_name,
            value=slot.tensor if slot is not None and is_own else value,
            is_own=is_own,
            owner=None if slot is None else slot.owner,
        )
    return state, entries


def _state_dict(module: torch.nn.Module) -> Mapping[str, Any]:
    # With keep_vars the live tensors themselves come back; an override need not know the argument.
    parameters = inspect.signature(module.state_dict).parameters.values()
    if any(p.name == "keep_vars" or p.kind is p.VAR_KEYWORD for p in parameters):
        return module.state_dict(keep_vars=True)
    return module.state_dict()


def _is_same(tensor: torch.Tensor, value: object) -> bool:
    if value is tensor:
        return True
    if not isinstance(value, torch.Tensor) or tensor.is_meta or _is_uninitialized(tensor):
        return False
    if memory.is_opaque(tensor) or memory.is_opaque(value):
        return False
    if tensor.layout != torch.strided or value.layout != torch.strided:
        return False
    key = memory.storage_key(value)
    return key is not None and key == memory.storage_key(tensor)


def _is_uninitialized(value: Any) -> bool:
    return parameter.is_lazy(value)


def _detached(value: Any) -> Any:
    # A Parameter is a role in a module, not a kind of data: without the module it comes back as a
    # tensor. Opaque tensors cannot be detached: they are refused by name.
    is_tensor = isinstance(value, torch.Tensor) and not memory.is_opaque(value)
    return value.detach() if is_tensor else value


def _stored(entry: _Entry) -> Any:
    """Returns the saved value of an entry, without the class of the module's own tensors."""
    value = _detached(entry.value)
    has_class = isinstance(value, torch.Tensor) and not memory.can_be_imitated(value)
    if has_class and entry.is_own and not hasattr(value, "__tensor_flatten__"):
        is_wrapper = value.numel() > 0 and value.untyped_storage().data_ptr() == 0
        return value if is_wrapper else value.as_subclass(torch.Tensor)
    return value


def _wanted(entry: _Entry, saved: object, own_way: Collection[torch.nn.Module]) -> Any:
    value = entry.value
    if not isinstance(value, torch.Tensor) or entry.is_lazy:
        return AS_SAVED
    if memory.is_opaque(value):
        return value
    if value.is_meta or not entry.is_own:
        return value.detach()
    if entry.owner in own_way and not _fits(value, saved):
        return AS_SAVED  # the submodule may know how to take another shape
    return Fill(value.detach())


def _other_names(state: Mapping[str, _Entry], specs: Mapping[str, Any]) -> set[str]:
    """Names that the checkpoint lacks and does not need: their memory is filled under another."""
    missing = [name for name, entry in state.items() if name not in specs and _is_tied(entry)]
    if not missing:
        return set()
    filled = {
        memory.tie_key(entry.value)
        for name, entry in state.items()
        if name in specs and _is_tied(entry)
    }
    return {name for name in missing if memory.tie_key(state[name].value) in filled - {None}}


def _is_tied(entry: _Entry) -> bool:
    """Returns whether an entry may be another name of the module's own memory."""
    return entry.is_own and isinstance(entry.value, torch.Tensor) and not entry.is_lazy


def _fits(tensor: torch.Tensor, saved: object) -> bool:
    return not isinstance(saved, spec_lib.ArraySpec) or tuple(tensor.shape) == saved.shape


def _loads_its_own_way(module: torch.nn.Module) -> bool:
    """Returns whether loading does more than copying tensors: there are overrides or hooks."""
    kind = type(module)
    load = kind._load_from_state_dict
    return (
        kind.load_state_dict is not torch.nn.Module.load_state_dict
        or (
            load is not torch.nn.Module._load_from_state_dict
            # Batch norm and its kin override it for checkpoints older than 0.4 only.
            and not load.__module__.startswith("torch.nn.modules.")
        )
        or bool(module._load_state_dict_pre_hooks)
        or bool(module._load_state_dict_post_hooks)
    )


def _check_meta(module: torch.nn.Module, state: Mapping[str, _Entry], *, whole: bool) -> None:
    """Everything that would go wrong while materialising, before anything is touched."""
    meta = [name for name, entry in state.items() if _is_meta(entry.value)]
    if not meta:
        return
    watched = [name for name in meta if weakref.getweakrefs(state[name].value)]
    if watched:
        raise errors.UsageError(
            "Tensors on the meta device are weakly referenced and cannot be materialised in place: "
            f"{_some(watched)}; call module.to_empty(device=...) before the restore.",
            key_path=watched[0],
        )
    if not whole:
        return
    left = [n for n, slot in module_names.slots(module) if slot.tensor.is_meta and n not in state]
    if left:
        raise errors.UsageError(
            f"On the meta device and not part of the state dict: {_some(left)}; no checkpoint has "
            "them. Replace them by real tensors before the restore, or make them persistent.",
            key_path=left[0],
        )


def _is_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _materialize(meta: torch.Tensor, data: Any, device: torch.device | None) -> None:
    """Gives a meta tensor memory; the object stays, and with it its ties, class and attributes."""
    fresh: torch.Tensor = data.detach()
    if device is not None:
        fresh = fresh.to(device)
    if isinstance(meta, torch.nn.Parameter):
        fresh = torch.nn.Parameter(fresh, requires_grad=meta.requires_grad)
    if type(fresh) is not type(meta):
        fresh.__class__ = cast("Any", type(meta))
    vars(fresh).update(vars(meta))
    torch.utils.swap_tensors(meta, fresh)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MAX_NAMES} more" if len(listed) > _MAX_NAMES else ""
    return ", ".join(listed[:_MAX_NAMES]) + more
