"""Objects with `state_dict` and `load_state_dict`: LR schedulers, GradScaler, data loaders ..."""

from __future__ import annotations

import dataclasses
from typing import Any

from functional_ckpt import errors
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
        """Whatever was saved: a fresh object's state need not have the shape of a used one's."""
        del value, saved
        return AS_SAVED

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
