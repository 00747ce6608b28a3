"""Names of a module's tensors without the prefixes of DDP, `torch.compile` and other wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from functional_ckpt import errors
from functional_ckpt.handlers import classes

# The class of a wrapper -> the attribute under which it holds the wrapped module. Only these are
# stripped: a user's own attribute that happens to be called `module` is part of the name.
_WRAPPERS: Mapping[str, str] = MappingProxyType(
    {
        "torch.nn.parallel.distributed.DistributedDataParallel": "module",
        "torch.nn.parallel.data_parallel.DataParallel": "module",
        "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
        "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
            "_fsdp_wrapped_module"
        ),
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
            "_checkpoint_wrapped_module"
        ),
    }
)
_FSDP2 = frozenset(
    {
        "torch.distributed.fsdp.FSDPModule",
        "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule",
    }
)
_DDP = frozenset({"torch.nn.parallel.distributed.DistributedDataParallel"})


class Slot(NamedTuple):
    """Where a module keeps one of its tensors; two slots may hold the same tensor."""

    owner: torch.nn.Module
    attribute: str
    tensor: torch.Tensor
    persistent: bool
    """False for a buffer that is not part of the state dict."""


def clean_prefix(root: torch.nn.Module, prefix: str) -> str:
    """Returns the prefix of the names of a module's own tensors: its path below `root`, a dot.

    The attributes of wrappers on the way are left out, and so is the dot after an empty path.

    Wrappers whose own hooks have removed their attribute already (activation checkpointing) are
    stepped over.
    """
    module: torch.nn.Module | None = root
    parts = prefix.split(".") if prefix else []
    kept: list[str] = []
    while parts:
        attribute = _wrapped_attribute(module)
        if module is not None and attribute is not None:
            if parts[0] == attribute:
                del parts[0]
            module = module._modules.get(attribute)
            continue
        kept.append(parts[0])
        module = None if module is None else module._modules.get(parts[0])
        del parts[0]
    return "".join([f"{part}." for part in kept])


def slots(root: torch.nn.Module) -> Iterator[tuple[str, Slot]]:
    """Yields every parameter and buffer under every clean name it has, in the state dict's order.

    Raises:
        UsageError: The module contains itself: its tensors would have names without end.
    """
    modules = _named_modules(root)
    for _, module in modules:
        if classes.is_a(module, _FSDP2):
            # After a forward pass without a backward, the parameters are still unsharded copies.
            cast("Any", module).reshard()
    for prefix, module in modules:
        start = clean_prefix(root, prefix)
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield start + attribute, Slot(module, attribute, parameter, True)
        for attribute, buffer in module._buffers.items():
            if buffer is not None:
                persistent = attribute not in module._non_persistent_buffers_set
                yield start + attribute, Slot(module, attribute, buffer, persistent)


def _named_modules(root: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    try:
        return list(root.named_modules(remove_duplicate=False))
    except RecursionError as error:
        raise errors.UsageError(
            f"{type(root).__name__} contains itself, or its submodules are nested too deeply: its "
            "tensors have no finite names. Keep the reference to a parent outside of "
            "torch.nn.Module's attributes (in a tuple, or as a weakref)."
        ) from error


def first_rank_buffers(root: torch.nn.Module) -> dict[str, bool]:
    """Clean names of the buffers that legitimately differ between ranks -> whether to warn of it.

    A DistributedDataParallel that broadcasts buffers overwrites them with the first rank's in the
    next forward pass. Running statistics differ without one too, and none of the ranks' are more
    right.
    """
    broadcast = {
        id(module)
        for wrapper in root.modules()
        if classes.is_a(wrapper, _DDP) and getattr(wrapper, "broadcast_buffers", False)
        for module in wrapper.modules()
    }
    found: dict[str, bool] = {}
    for prefix, module in _named_modules(root):
        is_broadcast = id(module) in broadcast
        if module._buffers and (is_broadcast or isinstance(module, _NormBase)):
            start = clean_prefix(root, prefix)
            found |= {start + name: not is_broadcast for name in module._buffers}
    return found


def _wrapped_attribute(module: torch.nn.Module | None) -> str | None:
    if module is None:
        return None
    names = classes.class_names(type(module))
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)
