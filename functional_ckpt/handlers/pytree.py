"""Any pytree of tensors, arrays and plain values: the handler that changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from functional_ckpt.handlers.base import CheckpointItem, Handler

__all__ = ["PyTree", "PyTreeHandler"]


@dataclasses.dataclass(frozen=True, slots=True)
class PyTreeHandler(Handler):
    """Saves a pytree as it is; restores a new one like the target and leaves the target alone."""

    changes_value: ClassVar[bool] = False

    def lower(self, value: Any) -> Any:
        """The value itself."""
        return value

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        """The value itself: its containers and arrays are imitated, in new memory."""
        del saved
        return value

    def lift(self, value: Any, tree: Any) -> Any:
        """The restored tree itself."""
        del value
        return tree


class PyTree(CheckpointItem):
    """A pytree of tensors, arrays and plain values; restore returns a new one.

    Args:
        value: The pytree to save, or one like it to restore.
    """

    __slots__ = ()

    def __init__(self, value: Any) -> None:
        super().__init__(value, PyTreeHandler())
