"""Items kept as one readable JSON file: configurations, notes, lineage."""

from __future__ import annotations

import collections
import dataclasses
import enum
from typing import Any, Literal, cast

from functional_ckpt import errors
from functional_ckpt.core.tree import context, plain_json
from functional_ckpt.core.tree.placeholders import AS_SAVED
from functional_ckpt.handlers.base import Handler, Item, item_class

# Python's reader recurses: deeper values could be written but not read.
_MAX_DEPTH = 200


@dataclasses.dataclass(frozen=True, slots=True)
class JsonHandler(Handler):
    """Saves JSON values, and plain values of Python's library, as one readable JSON file.

    A value that JSON would not return equal (tuples, paths, times, sets, infinities ...) is stored
    as an object that names its kind. A value that only foreign code could rebuild is an error.
    """

    format: Literal["tree", "json"] = "json"
    changes_value: bool = False

    def lower(self, value: Any) -> Any:
        """Returns the value as JSON.

        Raises:
            UnsupportedLeafError: Naming the key path of the first value that would not come back
                equal.
        """
        _check(value)
        return context.pack(value)

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        """Whatever was saved."""
        return AS_SAVED

    def lift(self, value: Any, tree: Any) -> Any:
        """Returns the restored value itself."""
        return context.unpack(tree)


@item_class
class Json(Item):
    """A JSON value, kept readable on disk.

    Args:
        value: Dicts, lists and plain values: those of JSON, and tuples, sets, paths, times, UUIDs,
            decimals, namespaces, dtypes and their like. A restore does not use the value:
            `fc.Json()` suffices.
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
    if kind not in (dict, list, tuple, set, frozenset, collections.OrderedDict):
        if not (plain_json.is_plain(value) or context.is_of_torch(value)):
            raise _error(path, _way_out(value))
        return
    if id(value) in parents:
        raise _error(path, "contains itself")
    if len(parents) == _MAX_DEPTH:
        where = f"{path[:40]}..."
        raise _error(where, f"is nested more than {_MAX_DEPTH} deep; JSON readers refuse that")
    inside = (*parents, id(value))
    if isinstance(value, dict):
        for key, child in cast("dict[object, object]", value).items():
            _check(key, f"{path}: the key {key!r}", inside)
            _check(child, f"{path}[{key!r}]", inside)
        return
    for index, child in enumerate(cast("list[object]", value)):
        _check(child, f"{path}[{index}]", inside)


def _way_out(value: object) -> str:
    kind = type(value).__name__
    if isinstance(value, enum.Enum):
        return (
            f"is an enum of the class {kind}, which is not stored; pass value.name or value.value"
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"is a {kind}, a class that is not stored; pass dataclasses.asdict(value)"
    if hasattr(value, "tolist"):
        return f"is a {kind}; pass value.tolist(), or the tree as a PyTree item instead of Json"
    for base in (dict, list, tuple, set, frozenset, str, int, float):
        if isinstance(value, base):
            return f"is a {kind}, a class that is not stored; pass {base.__name__}(value)"
    if callable(value):
        return f"is a {kind}, which is code, and code is never stored; pass its name"
    if hasattr(value, "__dict__"):
        return f"is a {kind}, a class that is not stored; pass vars(value), or str(value)"
    return f"is a {kind}, a class that is not stored; pass str(value)"


def _error(path: str, why: str) -> errors.UnsupportedLeafError:
    return errors.UnsupportedLeafError(f"{path or 'the value'} {why}.", key_path=path or None)
