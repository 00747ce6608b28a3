"""Spans of training written as people write them: `500ba`, `3e4tok`, `0.25dur`, `1h20m40s`.

The suffixes are those of Composer's time strings; wall-clock spans may also be written with days,
hours, minutes and seconds in any combination, largest first.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, TypeAlias

from functional_ckpt import errors

Unit: TypeAlias = Literal["iteration", "epoch", "batch", "sample", "token", "duration", "second"]
"""The unit of a span; `duration` is the fraction of the entire training, from 0 to 1."""

_UNITS: Final[dict[str, Unit]] = {
    "iter": "iteration",
    "ep": "epoch",
    "ba": "batch",
    "sp": "sample",
    "tok": "token",
    "dur": "duration",
    "sec": "second",
}
_SUFFIXES: Final[dict[Unit, str]] = {unit: suffix for suffix, unit in _UNITS.items()}
# Half a batch makes no sense; half an epoch, a quarter of the training and 0.5 s do.
_WHOLE_UNITS: Final[frozenset[Unit]] = frozenset({"iteration", "batch", "sample", "token"})
_CLOCK_SECONDS: Final[dict[str, int]] = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_COUNTED = re.compile(rf"({_NUMBER}(?:e[+-]?[0-9]{{1,3}})?)({'|'.join(_UNITS)})", re.IGNORECASE)
_CLOCK = re.compile(
    rf"(?=.)(?:({_NUMBER})d)?(?:({_NUMBER})h)?(?:({_NUMBER})m)?(?:({_NUMBER})s)?", re.IGNORECASE
)
_TOO_MUCH: Final = 1e308
_MAX_TEXT_CHARS: Final = 400  # every value below _TOO_MUCH can be spelled out
_EXPECTED: Final = (
    "a whole number of batches, or a number and one of iter, ep, ba, sp, tok, dur, sec "
    "('500ba', '3e4tok', '0.25dur'), or a wall-clock time ('1h20m40s', '90m', '2d')"
)


@dataclass(frozen=True, slots=True)
class Timespan:
    """An amount of training or of wall-clock time.

    `str()` gives the time string back: `parse_timespan(str(span)) == span`.

    Attributes:
        value: How many units: finite and not negative; exact if an int.
        unit: Its unit.

    >>> str(parse_timespan("3e4tok"))
    '30000tok'
    >>> str(Timespan(5400, "second"))
    '1h30m'
    """

    value: int | float
    unit: Unit

    def __post_init__(self) -> None:
        """Raises UsageError unless it is a span."""
        if self.unit not in _SUFFIXES:
            raise errors.UsageError(
                f"unit of a time span: expected one of {', '.join(_SUFFIXES)}; got {self.unit!r}."
            )
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise errors.UsageError(f"value of a time span: expected a number; got {self.value!r}.")
        if not 0 <= self.value < _TOO_MUCH:  # nan is refused too
            raise errors.UsageError(
                f"value of a time span: expected a finite number, zero or more; got {self.value!r}."
            )
        if self.unit in _WHOLE_UNITS and not isinstance(self.value, int):
            raise errors.UsageError(
                f"value of a time span in {self.unit} units: expected a whole number; "
                f"got {self.value!r}."
            )

    def __str__(self) -> str:
        """Returns the shortest usual spelling, such as `500ba` or `1h20m40s`."""
        # repr(4.791944360669179e+16) is another integer than the float: print integers exactly.
        whole = int(self.value) if self.value == int(self.value) else None
        if whole and self.unit == "second":
            return _clock(whole)
        return f"{self.value if whole is None else whole!r}{_SUFFIXES[self.unit]}"


TimespanLike: TypeAlias = int | str | datetime.timedelta | Timespan
"""The arguments of `parse_timespan`."""


def parse_timespan(span: TimespanLike) -> Timespan:
    """Returns the span that an int, a time string or a timedelta means.

    Args:
        span: A number of batches (which are steps), a time string (upper or lower case, no blanks),
            a timedelta, or a span already parsed.

    Raises:
        UsageError: It is none of these, or no finite amount, or a fraction of a batch.

    >>> parse_timespan(500)
    Timespan(value=500, unit='batch')
    >>> parse_timespan("1h20m40s")
    Timespan(value=4840, unit='second')
    >>> parse_timespan("0.25DUR")
    Timespan(value=0.25, unit='duration')
    """
    if isinstance(span, Timespan):
        return span
    if isinstance(span, int) and not isinstance(span, bool):
        return Timespan(span, "batch")
    if isinstance(span, datetime.timedelta):
        # `days * 86400 + seconds` keeps seconds integral, whatever the size.
        whole = span.days * 86_400 + span.seconds
        return Timespan(whole if not span.microseconds else span.total_seconds(), "second")
    if isinstance(span, str) and len(span) <= _MAX_TEXT_CHARS:  # pyright: ignore[reportUnnecessaryIsInstance]
        if match := _COUNTED.fullmatch(span):
            unit = _UNITS[match[2].lower()]
            return Timespan(_number(Fraction(match[1]), unit, span), unit)
        if match := _CLOCK.fullmatch(span):
            parts = zip(match.groups(), _CLOCK_SECONDS.values(), strict=True)
            seconds = sum(
                (Fraction(number) * scale for number, scale in parts if number), Fraction()
            )
            return Timespan(_number(seconds, "second", span), "second")
    raise errors.UsageError(f"time span: expected {_EXPECTED}; got {span!r}.")


def _number(value: Fraction, unit: Unit, text: str) -> int | float:
    """Returns an int if the number is integral, so that counts beyond 2**53 stay exact."""
    if value.denominator == 1:
        return value.numerator
    if unit in _WHOLE_UNITS:
        raise errors.UsageError(
            f"time span in {unit} units: expected a whole number; got {text!r}."
        )
    return float(value)


def _clock(seconds: int) -> str:
    parts: list[str] = []
    for suffix, scale in _CLOCK_SECONDS.items():
        count, seconds = divmod(seconds, scale)
        if count:
            parts.append(f"{count}{suffix}")
    return "".join(parts)
