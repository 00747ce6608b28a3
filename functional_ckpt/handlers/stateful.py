"""Objects with `state_dict` and `load_state_dict`: LR schedulers, GradScaler, data loaders ..."""

from __future__ import annotations

import collections
import dataclasses
import sys
from typing import Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.arrays.spec import CARRIED_BY, ArraySpec
from functional_ckpt.core.tree import encode, structure
from functional_ckpt.core.tree.placeholders import AS_SAVED, Fill
from functional_ckpt.handlers import classes, dtensor_parts
from functional_ckpt.handlers.base import Handler, Item, item_class

_DATA_LOADERS = frozenset(
    {
        "torchdata.stateful_dataloader.stateful_dataloader.StatefulDataLoader",
        "torchdata.nodes.loader.Loader",
    }
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StatefulHandler(Handler):
    """Saves the result of `state_dict()`, and passes it to `load_state_dict()` unchanged."""

    per_rank: bool = False

    def lower(self, value: Any) -> Any:
        """`value.state_dict()`."""
        return value.state_dict()

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        """Everything as saved, since a fresh object's state may lack entries of a used one.

        A DTensor of the object is filled: its state is restored in its sharding.
        """
        has_dtensors = "torch.distributed.tensor" in sys.modules
        if self.per_rank or not has_dtensors or not _has_arrays(saved):
            return AS_SAVED
        return _sharded(value.state_dict(), saved)

    def lift(self, value: Any, tree: Any) -> Any:
        """Returns the value, after `load_state_dict`."""
        value.load_state_dict(tree)
        return value


@item_class
class Stateful(Item):
    """An object with `state_dict()` and `load_state_dict(state)`, filled in place by restore.

    `state_dict` may return any pytree. Code is never stored: a `LambdaLR` keeps its functions, and
    saves only the attributes of callable objects, as PyTorch does.

    Args:
        value: The object.
        per_rank: Whether each rank has a state of its own to save; None for torchdata's loaders
            only.
        replicated: `checked` makes plain tensors that differ between ranks an error (samples are
            compared); `unchecked` saves the first rank's.

    Raises:
        UsageError: The object lacks one of the two methods.
    """

    per_rank: bool | None = dataclasses.field(default=None, kw_only=True)

    @property
    def handler(self) -> StatefulHandler:
        """The handler that the options describe."""
        is_loader = classes.is_a(self.value, _DATA_LOADERS)
        return StatefulHandler(per_rank=is_loader if self.per_rank is None else self.per_rank)

    def check(self) -> None:
        """Raises `UsageError` for an object that lacks one of the two methods."""
        Item.check(self)
        if not is_stateful(self.value):
            raise errors.UsageError(
                f"Expected an object with state_dict() and load_state_dict(), got {self.value!r}."
            )


def is_stateful(value: object) -> bool:
    """Returns whether an object (not a class) can give and take its state."""
    return not isinstance(value, type) and all(
        callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict")
    )


def _has_arrays(saved: Any) -> bool:
    """Returns whether a stored tree has arrays of one dim or more, which may be sharded."""
    if isinstance(saved, structure.Handled):
        return _has_arrays(saved.tree)
    if isinstance(saved, dict):
        return any(map(_has_arrays, cast("dict[Any, Any]", saved).values()))
    if isinstance(saved, (list, tuple)) and not isinstance(saved, torch.Size):
        return any(map(_has_arrays, cast("list[Any]", saved)))
    return isinstance(saved, ArraySpec) and saved.shape != ()


def _sharded(live: Any, saved: Any) -> Any:
    """Returns the stored tree with `AS_SAVED` for all leaves but the DTensors of the live one."""
    if isinstance(live, torch.Tensor) and sharding.sharding_of(live) is not None:
        if isinstance(saved, structure.Handled):
            return Fill(live)
        return _shard(live, saved) if isinstance(saved, ArraySpec) else AS_SAVED
    if isinstance(live, dict) and isinstance(saved, dict):
        lives = cast("dict[Any, Any]", live)
        return _of_children(saved, {key: _sharded(lives.get(key), saved[key]) for key in saved})
    if type(live) in (list, tuple) and type(live) is type(saved) and len(live) == len(saved):
        return _of_children(saved, type(live)(map(_sharded, live, saved)))
    return AS_SAVED


def _of_children(saved: Any, target: Any) -> Any:
    """Returns the target; `AS_SAVED` if all of it is, so that the stored container is returned."""
    children = target.values() if isinstance(target, dict) else target
    if all(child is AS_SAVED for child in children):
        return AS_SAVED
    if isinstance(target, dict) and type(saved) is collections.OrderedDict:
        whole = collections.OrderedDict(target)
        vars(whole).update(vars(saved))
        return whole
    return target


def _shard(live: torch.Tensor, saved: ArraySpec) -> Any:
    """Memory for a stored array in the sharding of a live DTensor: its own, where that fits."""
    name = encode.torch_dtype_name(live.dtype)
    if (tuple(live.shape), CARRIED_BY.get(name, name)) != (saved.shape, saved.dtype):
        return dtensor_parts.shard_like(live, saved)
    return live.detach() if live.is_meta else Fill(live.detach())
