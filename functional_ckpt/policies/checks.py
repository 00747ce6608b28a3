"""Checks of arguments."""

from __future__ import annotations

from typing import TypeGuard

from functional_ckpt import errors

__all__ = ["check_int", "is_int"]


def is_int(value: object) -> TypeGuard[int]:
    """Returns whether the value is an int and not, by accident, a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(name: str, value: object, at_least: int = 0) -> None:
    """Raises UsageError unless a value is an int, no bool, and large enough."""
    if not is_int(value) or value < at_least:
        raise errors.UsageError(f"{name}: expected an int of at least {at_least}; got {value!r}.")
