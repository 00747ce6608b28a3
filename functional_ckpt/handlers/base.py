"""Handlers, items that bind a value to one, and the registry that chooses one for a value.

`Handler.lower` is pure: it returns a pytree of live references. `Handler.lift` is where a restore
has its effects. `Handler.target` returns the expected structure. Handlers do no I/O: one module
writes arrays and one reads them, whatever the item.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, dataclass_transform, final

import torch

from functional_ckpt import errors
from functional_ckpt.core.tree import containers, html_tree
from functional_ckpt.handlers.hub_config import Hub

_Kind = TypeVar("_Kind", bound="type[Item]")
_MAX_CHARS = 60

Replicated: TypeAlias = Literal["checked", "unchecked"]
"""Whether several ranks' values under one name must be equal."""


class Handler(abc.ABC):
    """How values of one kind become a pytree and come back.

    A handler holds options, never the value. A subclass sets the attributes below on the class, or
    makes them fields of a frozen dataclass.

    Attributes:
        format: The layout on disk: `tree` (arrays and a structure) or `json` (one readable file).
        per_rank: Whether every rank stores a value of its own.
        changes_value: Whether `lift` may change the value that it is given.
        holds_values: Whether the tree may contain values that have other handlers.
    """

    __slots__ = ()

    format: Literal["tree", "json"] = "tree"
    per_rank: bool = False
    changes_value: bool = True
    holds_values: bool = False

    @abc.abstractmethod
    def lower(self, value: Any) -> Any:
        """Returns the value as a pytree of live references; copies and changes nothing."""

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        """Returns the pytree that a restore into `value` expects: same shape as `lower(value)`.

        Leaves that are filled in place are `Fill(tensor)`; tensors and arrays are restored to new
        memory; `AS_SAVED` accepts any stored value. Called before anything is read; must not change
        `value`.

        Args:
            value: The value passed to restore.
            saved: The checkpoint's tree, with an `ArraySpec` for every array. Where the
                restore leaves leaves alone (`ignore`, `only`), the target's own stand in it.
            strict: Whether a difference that the handler itself finds is an error.

        Raises:
            MismatchError: The checkpoint cannot be restored into `value`.
        """
        return self.lower(value)

    def own(self, value: Any) -> Any:
        """Returns the tree with the values of leaves that a restore keeps: `lower(value)`."""
        return self.lower(value)

    def hub(self, value: Any, tree: Any) -> Hub | None:
        """Returns how the directory of a model is one of the Hugging Face hub; None for others.

        Args:
            value: The value.
            tree: Its leaves, from `lower`.
        """
        return None

    def optimizers(self, value: Any) -> Sequence[Any]:
        """Returns the torch optimizers whose steps alone change this item's values below `state`.

        A save with `staging=fc.Overlapped()` copies that, and the parameters that they update,
        while training continues to their next step.
        """
        return ()

    def first_rank_leaves(self, value: Any) -> Mapping[str, bool]:
        """Names of leaves that may differ between ranks: those of the first rank are saved.

        Of all other tensors that are not sharded, a save makes sure that they are equal on all
        ranks that have them.

        Returns:
            Name -> whether a difference is worth a warning.
        """
        return {}

    def can_resize(self) -> bool:
        """Returns whether `resize` is implemented: asked before a restore reads anything."""
        return type(self).resize is not Handler.resize

    def resize(self, trees: Sequence[Any], rank: int, num_ranks: int) -> Any:
        """Returns the tree of one rank, made of the trees of another number of ranks.

        Called for `per_rank` handlers only. The default refuses.

        Args:
            trees: The trees that the ranks saved, in order.
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
        """Returns whether the handler restores a stored leaf; others are not unexpected leaves."""
        return True

    @abc.abstractmethod
    def lift(self, value: Any, tree: Any) -> Any:
        """Returns the restored value, from a tree like `target`'s; only this may change `value`."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Item(abc.ABC):
    """A value with the options of the handler that saves and restores it.

    Items are immutable records and pytree nodes: the value is the child, the options are the
    context. Two items are equal if they have one class, equal options and equal values; tensors and
    arrays compare by dtype, shape and content.

    Attributes:
        value: The live object.
        replicated: Whether a save compares several ranks' values under one name (samples of
            plain tensors and of replicas, and JSON), of which it stores one. `unchecked`: they may
            differ, and the first rank's is stored.
    """

    value: Any
    replicated: Replicated = dataclasses.field(default="checked", kw_only=True)

    def __post_init__(self) -> None:
        """Raises `UsageError` for an option or a value that cannot be."""
        self.check()

    @property
    @abc.abstractmethod
    def handler(self) -> Handler:
        """The handler that the options describe."""

    def check(self) -> None:
        """Raises `UsageError` unless the record is valid; `tree_map` may have put any value in."""
        if self.replicated not in ("checked", "unchecked"):
            raise errors.UsageError(
                f"replicated must be 'checked' or 'unchecked'; got {self.replicated!r}."
            )

    def __repr__(self) -> str:
        first, *fields = dataclasses.fields(self)
        given = {field.name: getattr(self, field.name) for field in fields}
        options = [
            f"{field.name}={_brief(given[field.name])}"
            for field in fields
            if given[field.name] is not field.default and given[field.name] != field.default
        ]
        is_default = first.default is not dataclasses.MISSING and not self.value
        value = [] if is_default else [_brief(self.value)]
        return f"{type(self).__name__}({', '.join([*value, *options])})"

    def _repr_html_(self) -> str:
        """Returns the tree that a save would store, for notebooks."""
        try:
            tree = self.handler.lower(self.value)
        except errors.CheckpointError as error:
            return html_tree.page(repr(self), {}, {"cannot be saved": error.message})
        return html_tree.page(repr(self), {"value": tree}, {})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Item) or type(self) is not type(other):
            return NotImplemented
        names = [field.name for field in dataclasses.fields(self)]
        return all(containers.is_equal(getattr(self, f), getattr(other, f)) for f in names)

    def __hash__(self) -> int:
        # Values may be mutable, and equal tensors have no equal hash: neither takes part.
        return hash((type(self), self.replicated))


def _brief(value: Any) -> str:
    """Returns a value in a few words; models and optimizers by class and size."""
    kind = type(value).__name__
    if isinstance(value, torch.nn.Module):
        count = sum(1 for _ in value.parameters())
    elif isinstance(value, torch.optim.Optimizer):
        count = sum(len(group["params"]) for group in value.param_groups)
    elif isinstance(value, torch.Tensor):
        return f"{kind} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    elif isinstance(value, (Mapping, list, tuple)) and value:
        return f"{kind} of {len(value)}"  # pyright: ignore[reportUnknownArgumentType]
    else:
        if type(value).__repr__ is object.__repr__:  # the address of an object
            return kind
        text = " ".join(repr(value).split())
        return text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 3]}..."
    return f"{kind}, {count} parameter{'' if count == 1 else 's'}"


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field,))
def item_class(kind: _Kind) -> _Kind:
    """Makes a class a frozen dataclass and a node of `torch.utils._pytree`.

    Args:
        kind: A direct subclass of `Item`, with its options as fields.
    """
    made: Any = dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)(kind)
    containers.register_record(made)
    return made


@final
@item_class
class CheckpointItem(Item):
    """A value bound to a handler of any class.

    Args:
        value: The live object.
        handler: How it is lowered and lifted.
        replicated: See `Item`.
    """

    # A field instead of the property.
    handler: Handler = dataclasses.field()  # pyright: ignore[reportIncompatibleMethodOverride]

    def check(self) -> None:
        """Raises `UsageError` for anything but a handler."""
        Item.check(self)
        if not isinstance(self.handler, Handler):
            raise errors.UsageError(f"Expected a Handler instance, got {self.handler!r:.80}.")


class _Rule(NamedTuple):
    """Which values are bound to a handler, and how."""

    fits: Callable[[Any], bool]
    bind: Callable[[Any], Item]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """An immutable, ordered choice of handlers; the latest rule that fits a value wins.

    The handlers apply to items and to values that stand in the tree of an item.

    Attributes:
        rules: The user's rules, the latest first.
        defaults: Rules that are asked after these.
        named: The user's handlers of types, by the name that checkpoints have for them.
    """

    rules: tuple[_Rule, ...] = ()
    defaults: tuple[_Rule, ...] = ()
    named: Mapping[str, Handler] = dataclasses.field(default_factory=dict[str, Handler])

    def with_handler(self, kind: type, handler: Handler) -> Registry:
        """Returns a new registry in which values of `kind` (and its subclasses) use `handler`.

        If the target has no live value (in the state of a `Stateful`, say), a restore calls
        `handler.lift(None, tree)`.
        """
        if not isinstance(handler, Handler):
            raise errors.UsageError(
                f"Expected a Handler instance for {kind.__name__}, got {handler!r}."
            )
        name = f"{type(handler).__name__}[{kind.__name__}]"
        extended = self.with_rule(
            lambda value: isinstance(value, kind), lambda value: CheckpointItem(value, handler)
        )
        return dataclasses.replace(extended, named={**self.named, name: handler})

    def with_rule(self, fits: Callable[[Any], bool], bind: Callable[[Any], Item]) -> Registry:
        """Returns a new registry in which values that fit are bound by `bind`."""
        return dataclasses.replace(self, rules=(_Rule(fits, bind), *self.rules))

    def find(self, value: Any, *, is_own: bool = False) -> Item | None:
        """Returns the item for a value by the first rule that fits; None if there is none.

        Args:
            value: Any value.
            is_own: Whether only the user's rules count.
        """
        for rule in self.rules if is_own else (*self.rules, *self.defaults):
            if rule.fits(value):
                return rule.bind(value)
        return None

    def bind(self, value: Any, name: str = "item") -> Item:
        """Returns the item for a value: itself if it is one already."""
        if isinstance(value, Item):
            try:
                value.check()
            except errors.UsageError as error:
                raise error.replace(f"{name}: {error.message}", key_path=name) from error.__cause__
            return value
        item = self.find(value)
        if item is None:
            raise errors.UsageError(
                f"No handler for {name}, a {type(value).__name__}; wrap it in a CheckpointItem or "
                "register a handler (registry.with_handler).",
                key_path=name,
            )
        return item
