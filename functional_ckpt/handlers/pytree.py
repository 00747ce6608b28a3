"""Any pytree of tensors, arrays and plain values: the handler that changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from functional_ckpt.handlers.base import Handler, Item, item_class


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PyTreeHandler(Handler):
    """Saves a pytree as it is; restores a new one like the target and leaves the target alone.

    Values with handlers that stand in it are saved and restored by these.
    """

    per_rank: bool = False
    changes_value: bool = False
    holds_values: bool = True

    def lower(self, value: Any) -> Any:
        """Returns the value itself."""
        return value

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        """Returns the value itself: its containers and arrays are imitated, in new memory."""
        return value

    def lift(self, value: Any, tree: Any) -> Any:
        """Returns the restored tree itself."""
        return tree


@item_class
class PyTree(Item):
    """A pytree of tensors, arrays and plain values; restore returns a new one.

    Args:
        value: The pytree to save, or one like it to restore.
        per_rank: Whether each rank has a tree of its own to save.
        replicated: `checked` makes plain tensors that differ between ranks an error (samples are
            compared); `unchecked` saves the first rank's.
    """

    per_rank: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def handler(self) -> PyTreeHandler:
        """The handler that the options describe."""
        return PyTreeHandler(per_rank=self.per_rank)
