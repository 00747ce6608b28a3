"""Objects with `state_dict` and `load_state_dict`: LR schedulers, GradScaler, data loaders ..."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding, spec
from functional_ckpt.core.tree.placeholders import AS_SAVED
from functional_ckpt.handlers import classes
from functional_ckpt.handlers.base import Handler, Item, item_class

__all__ = ["Stateful", "StatefulHandler", "is_stateful"]

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

        A saved value becomes a DTensor if the present state has one.
        """
        if self.per_rank or "torch.distributed.tensor" not in sys.modules:
            return AS_SAVED
        return _like_sharded(value.state_dict(), saved)

    def lift(self, value: Any, tree: Any) -> Any:
        """Returns the value, after `load_state_dict`."""
        value.load_state_dict(tree)
        return value


def _like_sharded(live: Any, saved: Any) -> Any:
    """Returns a target in which every DTensor of the live state stands for its saved value."""
    if isinstance(live, torch.Tensor):
        is_sharded = isinstance(saved, spec.ArraySpec) and sharding.sharding_of(live) is not None
        return live.detach() if is_sharded else AS_SAVED
    if isinstance(live, dict) and isinstance(saved, dict):
        lives = cast("dict[Any, Any]", live)
        found = {
            key: _like_sharded(lives.get(key), child)
            for key, child in cast("dict[Any, Any]", saved).items()
        }
        return found if any(child is not AS_SAVED for child in found.values()) else AS_SAVED
    if type(live) in (list, tuple) and type(live) is type(saved) and len(live) == len(saved):
        items = type(live)(map(_like_sharded, live, saved))
        return items if any(child is not AS_SAVED for child in items) else AS_SAVED
    return AS_SAVED


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
