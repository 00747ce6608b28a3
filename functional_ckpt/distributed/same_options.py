"""Compares the arguments that all ranks pass to one call, in a round that it makes anyway."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

from functional_ckpt import errors

_MAX_SHOWN_CHARS = 300


def to_bytes(options: Mapping[str, Any]) -> bytes:
    """Returns a rank's options, for `check` on the primary."""
    return json.dumps(texts(options)).encode()


def check(values: Sequence[bytes]) -> bytes:
    """On the primary: raises `CoordinationError` unless all ranks gave the same options."""
    check_texts([json.loads(value) for value in values])
    return b""


def texts(options: Mapping[str, Any]) -> dict[str, str]:
    """Returns the description of each option."""
    return {name: describe(value) for name, value in options.items()}


def check_texts(given: Sequence[Mapping[str, str]]) -> None:
    """As `check`, with the `texts` of each rank."""
    first = given[0]
    for rank, own in enumerate(given):
        if wrong := [name for name in {**first, **own} if own.get(name) != first.get(name)]:
            name, expected = wrong[0], _cut(first.get(wrong[0]))
            others = f" They differ in {', '.join(wrong[1:])} too." if wrong[1:] else ""
            raise errors.CoordinationError(
                f"Rank {rank} has {name}={_cut(own.get(name))}, rank 0 has {expected}: "
                f"every rank must pass the same arguments.{others}",
                ranks=(rank,),
            )


def describe(value: object) -> str:
    """Returns a text that is the same for equal options of two processes.

    An object that is neither plain data nor a dataclass is described by its class.

    >>> describe((1, {"b": None}))
    "[1, {'b': None}]"
    """
    if value is None or type(value) in (bool, int, float, str):
        return repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f for f in dataclasses.fields(value) if f.init and f.compare)
        inside = ", ".join(f"{f.name}={describe(getattr(value, f.name))}" for f in fields)
        return f"{type(value).__qualname__}({inside})"
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return "{" + ", ".join(f"{describe(k)}: {describe(v)}" for k, v in pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(describe, cast("Sequence[Any]", value))) + "]"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(describe, cast("frozenset[Any]", value)))) + "}"
    if isinstance(value, functools.partial):
        call = cast("functools.partial[Any]", value)
        return f"partial({describe(call.func)}, {describe(call.args)}, {describe(call.keywords)})"
    if isinstance(value, os.PathLike):
        return repr(os.fspath(cast("os.PathLike[str]", value)))
    if isinstance(value, enum.Enum) or type(value).__module__ == "datetime":
        return repr(value)
    name = getattr(value, "__qualname__", None)
    return str(name or type(value).__qualname__)


def _cut(text: str | None) -> str:
    shown = text or "the default"
    return shown if len(shown) <= _MAX_SHOWN_CHARS else f"{shown[:_MAX_SHOWN_CHARS]}..."
