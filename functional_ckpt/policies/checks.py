"""Checks of arguments."""

from __future__ import annotations

from typing import TypeGuard

from functional_ckpt import errors


def is_int(value: object) -> TypeGuard[int]:
    """Returns whether the value is an int and not, by accident, a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_bool(name: str, value: object) -> None:
    """Raises UsageError for anything but True and False: the text "no" would count as True."""
    if type(value) is not bool:
        raise errors.UsageError(f"{name} must be True or False; got {value!r:.80}.")


def check_seconds(name: str, value: object) -> None:
    """Raises UsageError unless a value is None or a number of seconds, at least 0."""
    is_valid = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    if value is not None and not is_valid:
        raise errors.UsageError(f"{name} must be None or >= 0 seconds; got {value!r:.80}.")


def check_int(name: str, value: object, at_least: int = 0) -> None:
    """Raises UsageError unless a value is an int, no bool, and large enough."""
    if not is_int(value) or value < at_least:
        raise errors.UsageError(f"{name}: expected an int of at least {at_least}; got {value!r}.")
