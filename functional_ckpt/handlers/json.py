"""Items kept as one readable JSON file: configurations, notes, lineage."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, cast

from functional_ckpt import errors
from functional_ckpt.core.tree.placeholders import AS_SAVED
from functional_ckpt.handlers.base import Handler, Item, item_class

__all__ = ["Json", "JsonHandler"]


# Python's reader recurses: deeper values could be written but not read.
_MAX_DEPTH = 200


@dataclasses.dataclass(frozen=True, slots=True)
class JsonHandler(Handler):
    """Saves plain JSON values, and only those that JSON restores exactly.

    Tuples (they would come back as lists), keys that are not `str` (as `str`), subclasses such as
    enums and numpy scalars (as their base), NaN and infinities (no JSON, RFC 8259 section 6) are
    errors, not repaired: a `PyTree` item carries all of them exactly.
    """

    format: Literal["tree", "json"] = "json"
    changes_value: bool = False

    def lower(self, value: Any) -> Any:
        """Returns the value itself, once it is known to survive.

        Raises:
            UnsupportedLeafError: Naming the key path of the first value that would not come back
                equal.
        """
        _check(value)
        return value

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        """Whatever was saved."""
        del value, saved
        return AS_SAVED

    def lift(self, value: Any, tree: Any) -> Any:
        """Returns the restored value itself."""
        del value
        return tree


@item_class
class Json(Item):
    """A JSON value, kept readable on disk.

    Args:
        value: Dicts with string keys, lists, strings, finite numbers, booleans and None. Its value
            is not used by a restore: `fc.Json()` suffices.
        replicated: `checked` makes a value that differs between ranks an error; `unchecked` saves
            the first rank's.
    """

    value: Any = None

    @property
    def handler(self) -> JsonHandler:
        """The handler that the options describe."""
        return JsonHandler()


def _check(value: object, path: str = "", parents: tuple[int, ...] = ()) -> None:
    kind = type(value)
    if kind in (dict, list):
        if id(value) in parents:
            raise _error(path, "contains itself")
        if len(parents) == _MAX_DEPTH:
            where = f"{path[:40]}..."
            raise _error(where, f"is nested more than {_MAX_DEPTH} deep; JSON readers refuse that")
        inside = (*parents, id(value))
        if kind is list:
            for index, child in enumerate(cast("list[object]", value)):
                _check(child, f"{path}[{index}]", inside)
            return
        for key, child in cast("dict[object, object]", value).items():
            if type(key) is not str:
                raise _error(
                    path, f"has the key {key!r}, which would come back as a str; use str keys"
                )
            _check(child, f"{path}[{key!r}]", inside)
        return
    if kind is float and not math.isfinite(cast("float", value)):
        raise _error(path, f"is {value!r}, which JSON has no word for; use None or a str")
    if value is not None and kind not in (bool, int, float, str):
        raise _error(path, _way_out(value))


def _way_out(value: object) -> str:
    kind = type(value).__name__
    if isinstance(value, tuple):
        return f"is a {kind}, which would come back as a list; pass list(value)"
    if isinstance(value, dict):
        return f"is a {kind}, which would come back as a dict; pass dict(value)"
    if hasattr(value, "tolist"):
        return f"is a {kind}; pass value.tolist()"
    return f"is a {kind}, which JSON cannot hold"


def _error(path: str, why: str) -> errors.UnsupportedLeafError:
    return errors.UnsupportedLeafError(
        f"{path or 'the value'} {why}. (A PyTree item carries it as it is.)", key_path=path or None
    )
