"""Any pytree of tensors, arrays and plain values: the handler that changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from functional_ckpt.handlers.base import CheckpointItem, Handler, Replicated

__all__ = ["PerRankPyTreeHandler", "PyTree", "PyTreeHandler"]


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


@dataclasses.dataclass(frozen=True, slots=True)
class PerRankPyTreeHandler(PyTreeHandler):
    """The same for trees that every rank has one of its own of."""

    per_rank: ClassVar[bool] = True


class PyTree(CheckpointItem):
    """A pytree of tensors, arrays and plain values; restore returns a new one.

    Args:
        value: The pytree to save, or one like it to restore.
        per_rank: Whether each rank has a tree of its own to save.
        replicated: `checked` makes plain tensors that differ between ranks an error (samples are
            compared); `unchecked` saves the first rank's.
    """

    __slots__ = ()

    def __init__(
        self, value: Any, *, per_rank: bool = False, replicated: Replicated = "checked"
    ) -> None:
        handler = PerRankPyTreeHandler() if per_rank else PyTreeHandler()
        super().__init__(value, handler, replicated)
