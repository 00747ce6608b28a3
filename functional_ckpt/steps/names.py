"""The names of step directories: `23`, `0023`, `step_23`, `step_0023`.

The names are those of Orbax's `standard_name_format(step_prefix=, step_format_fixed_length=)`. A
name is parsed only if `build_name` returns exactly the same: temporary, hidden and look-alike names
are never steps.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

from functional_ckpt import errors
from functional_ckpt.policies.checks import check_int, is_int
from functional_ckpt.policies.spelled import Spelled

_TMP_MARK: Final = ".orbax-checkpoint-tmp"
# No file system takes a longer component, and `int()` refuses thousands of digits by raising.
_MAX_NAME_CHARS: Final = 255


@runtime_checkable
class NameFormat(Protocol):
    """How steps are named on disk. Pure: it never reads a directory."""

    def build_name(self, step: int) -> str:
        """Returns the directory name under which `step` is written."""
        ...

    def names(self, step: int) -> tuple[str, ...]:
        """Returns every name of `step`, the preferred one first."""
        ...

    def parse(self, name: str) -> int | None:
        """Returns the step of a name; None if it is not a name of a step."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StepName(Spelled):
    """A step's number, optionally zero-padded and behind a prefix.

    Attributes:
        prefix: Put before the number with an underscore: `step` gives `step_23`.
        zero_pad: Digits to fill with zeros: 4 gives `0023`; longer numbers are not cut.

    >>> StepName(prefix="step", zero_pad=4).build_name(23)
    'step_0023'
    >>> StepName(prefix="step", zero_pad=4).parse("step_12345")
    12345
    >>> StepName().parse("007") is None
    True
    """

    prefix: str | None = None
    zero_pad: int | None = None

    def __post_init__(self) -> None:
        """Raises UsageError if the names could not be directories or could not be listed."""
        if self.prefix is not None:
            _check_prefix(self.prefix)
        pad = self.zero_pad
        if pad is not None and (not is_int(pad) or not 1 <= pad <= 100):
            raise errors.UsageError(
                f"zero_pad of a step name: expected 1 to 100 digits; got {pad!r}."
            )

    def build_name(self, step: int) -> str:
        """Returns the directory name of `step`; raises UsageError for a negative one."""
        check_int("step", step)
        return f"{self._start}{step:0{self.zero_pad or 1}d}"

    def names(self, step: int) -> tuple[str, ...]:
        """Returns the one name of `step`."""
        return (self.build_name(step),)

    def parse(self, name: str) -> int | None:
        """Returns the step of exactly such a name, else None."""
        if len(name) > _MAX_NAME_CHARS or not name.startswith(self._start):
            return None
        digits = name[len(self._start) :]
        # `isdigit` alone accepts digits of other scripts, which are never written.
        if not (digits.isascii() and digits.isdigit()):
            return None
        step = int(digits)
        return step if name == self.build_name(step) else None

    @property
    def _start(self) -> str:
        return "" if self.prefix is None else f"{self.prefix}_"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositeStepName:
    """Writes steps under one format and reads those of several.

    Attributes:
        write: The format of new steps.
        read: The formats that are recognised, the preferred one first; `write` is among them.
    """

    write: NameFormat
    read: tuple[NameFormat, ...]

    def __post_init__(self) -> None:
        """Raises UsageError if the written steps would not be recognised."""
        if self.write not in self.read:
            raise errors.UsageError(
                f"read formats of a composite step name: expected the written format {self.write} "
                f"among them; got {self.read}."
            )

    def build_name(self, step: int) -> str:
        """Returns the name that the written format gives to `step`."""
        return self.write.build_name(step)

    def names(self, step: int) -> tuple[str, ...]:
        """Returns the names of `step` in the order of the read formats."""
        return tuple(dict.fromkeys(name for each in self.read for name in each.names(step)))

    def parse(self, name: str) -> int | None:
        """Returns the step according to the first read format that knows the name."""
        for each in self.read:
            if (step := each.parse(name)) is not None:
                return step
        return None


def as_name_format(
    name_format: NameFormat | None, *, adapt: Callable[[Any], Any] = lambda value: value
) -> NameFormat:
    """Converts a user's argument to a format.

    Args:
        name_format: A format; None is the plain number.
        adapt: Called with it first, to convert foreign formats.

    Raises:
        UsageError: It is no name format.
    """
    if name_format is None:
        return StepName()
    adapted = adapt(name_format)
    if isinstance(adapted, type) or not isinstance(adapted, NameFormat):
        raise errors.UsageError(
            "step name format: expected an instance of StepName, CompositeStepName or of a class "
            f"with build_name, names and parse; got {adapted!r}."
        )
    return adapted


def is_taken_name(name: str, names: NameFormat) -> bool:
    """Returns whether `name` in a directory of steps is a step's, or one of its own files'."""
    return name.startswith(".") or _TMP_MARK in name or names.parse(name) is not None


def _check_prefix(prefix: str) -> None:
    if not isinstance(prefix, str) or not prefix:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.UsageError(
            f"prefix of a step name: expected a non-empty string or None; got {prefix!r}."
        )
    check_component("prefix of a step name", prefix)


def check_component(what: str, text: str) -> None:
    """Raises UsageError if no listed directory can have a name with this prefix."""
    if text.startswith(".") or _TMP_MARK in text or re.search(r"[/\\\x00-\x1f\x7f]", text):
        raise errors.UsageError(
            f"{what}: expected no leading dot (hidden), no slash, no control "
            f"character and no {_TMP_MARK!r} (temporary); got {text!r}."
        )


def check_step(step: Any) -> int:
    """Validates and returns the number of a step."""
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0 or isinstance(step, bool):
        raise errors.UsageError(f"A step must be an int >= 0; got {step!r:.80}.")
    return number
