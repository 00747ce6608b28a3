"""Handlers, items that bind a value to one, and the registry that chooses one for a value.

A handler is a pair of pure functions, `lower` and `lift`, plus `target`, which says what a restore
expects. One piece of code writes arrays and one reads them, whatever the item; handlers touch no
storage.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

from functional_ckpt import errors

__all__ = ["CheckpointItem", "Handler", "Registry", "Replicated"]

Replicated: TypeAlias = Literal["checked", "unchecked"]
"""Whether what several ranks hold under one name must be the same."""


class Handler(abc.ABC):
    """How values of one kind become a pytree and come back.

    Handlers hold options, never a value. `format` is how the item is laid out on disk: `tree`
    (arrays and a structure) or `json` (one readable file). `per_rank` items are stored once for
    every rank. `changes_value` says whether `lift` may change the value that it is given.
    """

    __slots__ = ()

    format: ClassVar[Literal["tree", "json"]] = "tree"
    per_rank: ClassVar[bool] = False
    changes_value: ClassVar[bool] = True

    @abc.abstractmethod
    def lower(self, value: Any) -> Any:
        """The value as a pytree of live references: no copies, and the value is left as it was."""

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        """The pytree that a restore into `value` expects: same shape as `lower(value)`.

        Leaves that are filled in place are `Fill(tensor)`; tensors and arrays are imitated in new
        memory; `AS_SAVED` takes what the checkpoint holds. Called before anything is read; must not
        change `value`.

        Args:
            value: What the user passed to restore.
            saved: The checkpoint's tree, with an `ArraySpec` in place of every array. Where the
                restore leaves leaves alone (`ignore`, `only`), the target's own stand in it.
            strict: Whether a difference that the handler itself finds is an error.

        Raises:
            MismatchError: The checkpoint cannot be restored into `value`.
        """
        del saved, strict
        return self.lower(value)

    def own(self, value: Any) -> Any:
        """The tree that leaves are taken from which a restore leaves alone: `lower(value)`."""
        return self.lower(value)

    def unchanged(self, value: Any) -> Any:
        """What restore returns for a value that it leaves alone: the caller's object."""
        return value

    def optimizers(self, value: Any) -> Sequence[Any]:
        """The torch optimizers whose steps alone change what this item holds below `state`.

        A save with `staging=fc.Overlapped()` copies that, and the parameters that they update,
        while training goes on to their next step.
        """
        del value
        return ()

    def first_rank_leaves(self, value: Any) -> Mapping[str, bool]:
        """Names of leaves that may differ between ranks: those of the first rank are saved.

        Of all other tensors that are not sharded, a save makes sure that they are equal on all
        ranks that have them.

        Returns:
            Name -> whether a difference is worth a warning.
        """
        del value
        return {}

    def resize(self, trees: Sequence[Any], rank: int, num_ranks: int) -> Any:
        """The tree of one rank out of those of every rank that saved, when their number changed.

        Only asked of `per_rank` handlers. The default is to refuse.

        Args:
            trees: What each rank saved, in order.
            rank: This rank.
            num_ranks: How many there are now.

        Raises:
            MismatchError: This state has no meaning for another number of ranks.
        """
        raise errors.MismatchError(
            f"saved by {len(trees)} ranks, restoring on {num_ranks}: omit this item, or implement "
            "Handler.resize()"
        )

    def selects(self, name: str) -> bool:
        """Whether a stored leaf concerns this handler; one that does not is no unexpected leaf."""
        del name
        return True

    @abc.abstractmethod
    def lift(self, value: Any, tree: Any) -> Any:
        """What restore returns, from a tree like `target`'s; only this may change `value`."""


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointItem:
    """A value bound to the handler, and the handler's options, that save and restore it.

    Attributes:
        value: The live object.
        handler: How it is lowered and lifted.
        replicated: Whether a save compares what several ranks hold under one name (samples of
            plain tensors and of replicas, and JSON), of which it keeps one. `unchecked`: they may
            differ, and the first rank's is kept.
    """

    value: Any
    handler: Handler
    replicated: Replicated = "checked"

    def __post_init__(self) -> None:
        """Raises UsageError for anything but the two words."""
        if self.replicated not in ("checked", "unchecked"):
            raise errors.UsageError(
                f"replicated must be 'checked' or 'unchecked'; got {self.replicated!r}."
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """An immutable, ordered choice of handlers; the latest rule that fits a value wins.

    Attributes:
        rules: `(fits, make)` pairs: a predicate on the value and what binds it.
    """

    rules: tuple[tuple[Callable[[Any], bool], Callable[[Any], CheckpointItem]], ...] = ()

    def with_handler(self, kind: type, handler: Handler) -> Registry:
        """A new registry in which values of `kind` (and its subclasses) use `handler`."""
        if not isinstance(handler, Handler):
            raise errors.UsageError(
                f"Expected a Handler instance for {kind.__name__}, got {handler!r}."
            )
        return self.with_rule(
            lambda value: isinstance(value, kind), lambda value: CheckpointItem(value, handler)
        )

    def with_rule(
        self, fits: Callable[[Any], bool], bind: Callable[[Any], CheckpointItem]
    ) -> Registry:
        """A new registry in which values that fit are bound by `bind`."""
        return dataclasses.replace(self, rules=((fits, bind), *self.rules))

    def bind(self, value: Any, name: str = "item") -> CheckpointItem:
        """The item for a value: itself if it is one already."""
        if isinstance(value, CheckpointItem):
            return value
        for fits, bind in self.rules:
            if fits(value):
                return bind(value)
        raise errors.UsageError(
            f"No handler for {name}, a {type(value).__name__}; wrap it in a CheckpointItem or "
            "register a handler (registry.with_handler).",
            key_path=name,
        )
