"""Output: tables for people, JSON for programs, progress bars on terminals."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import json
import math
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from functional_ckpt.runtime import progress_bars

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from functional_ckpt.verify.findings import Progress

# Wide enough that nothing is truncated in a file or a pipe.
_WIDTH_OF_PIPES = 160
_MAX_WIDTH = 10_000


class Printer:
    """Prints on the terminal, or wherever standard output goes.

    Attributes:
        console: Rich's console. All output uses `print` below, so that a closed pipe is an error
            here and not in the library.
        is_pipe: Whether the output goes to a file or a program, which have no width.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self.is_pipe = not sys.stdout.isatty() and "COLUMNS" not in os.environ
        self.console: Console = Console(
            file=sys.stdout,
            width=_WIDTH_OF_PIPES if self.is_pipe else None,
            markup=False,
            highlight=False,
            emoji=False,
        )

    @property
    def is_ascii(self) -> bool:
        """Whether the terminal can show nothing but ASCII."""
        return not self.console.encoding.lower().startswith("utf")

    def sign(self, fancy: str, plain: str) -> str:
        """Returns a symbol, or its ASCII replacement if it cannot be shown."""
        return plain if self.is_ascii else fancy

    def width_of(self, table: Table) -> int:
        """Returns how many columns a table needs, however narrow the terminal is."""
        options = self.console.options.update(max_width=_MAX_WIDTH)
        return self.console.measure(table, options=options).minimum

    def print(self, *what: RenderableType) -> None:
        """Prints renderables, one below the other, without trailing blanks."""
        with self.console.capture() as capture:
            for each in what:
                is_one_line = isinstance(each, str) or getattr(each, "no_wrap", None) is True
                self.console.print(each, soft_wrap=is_one_line)
        self.write(line.rstrip() for line in capture.get().splitlines())

    def write(self, lines: Iterable[str]) -> None:
        """Prints lines as they are."""
        for line in lines:
            sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def as_json(record: dict[str, Any]) -> None:
    """Prints a record as JSON; non-finite numbers become text (`"nan"`, `"inf"`)."""
    text = json.dumps(plain(record), indent=2, allow_nan=False)
    sys.stdout.write(f"{text}\n")


def summary(command: str, arguments: argparse.Namespace, source: str, path: str) -> None:
    """Prints which checkpoint was made of which."""
    if arguments.json:
        as_json({"schema": f"fckpt.{command}/1", "path": path, "checkpoint": source})
    else:
        print(printable(f"{source} -> {path}"))


def plain(value: Any) -> Any:
    """Returns a value as JSON can carry it; non-finite numbers and other objects become text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, (list, tuple, collections.deque)):
        return [plain(each) for each in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        # Lone surrogates are no text; JSON would carry them, and its readers choke on them.
        return value.encode("utf-8", "backslashreplace").decode()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


def printable(text: str) -> str:
    """Returns the text with everything escaped that could move the cursor or change colours."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def styled(text: str, style: str = "") -> Text:
    """Printable text in a style."""
    from rich.text import Text

    return Text(printable(text), style)


def table(*columns: str) -> Table:
    """Returns a table in the style of this command: a line below the head, no frame."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    for name in columns:
        made.add_column(styled(name), no_wrap=True)
    return made


# ------------------------------------------------------------------------------------ quantities


def size(num_bytes: int) -> str:
    """Returns a size for people.

    >>> size(0), size(1023), size(1536), size(1_048_064), size(5 * 2**30)
    ('0 B', '1023 B', '1.5 KiB', '1.0 MiB', '5.0 GiB')
    """
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1023.5 or unit == "PiB":
            return (
                f"{num_bytes} B" if unit == "B" else f"{value:.{1 if value < 99.95 else 0}f} {unit}"
            )
        value /= 1024
    raise AssertionError  # the loop always returns


def number(value: float) -> str:
    """Returns a metric for people: at most four digits, or the integer part.

    >>> number(0.98765), number(12345.678), number(3), number(1.5e12)
    ('0.9877', '12,346', '3', '1.5e+12')
    """
    if 9999.5 <= abs(value) < 1e10:
        return f"{value:,.0f}" if isinstance(value, float) else str(value)
    return f"{value:.4g}" if isinstance(value, float) or abs(value) >= 1e10 else str(value)


def age(time: datetime.datetime, now: datetime.datetime) -> str:
    """Returns the time since a moment, in its largest unit."""
    seconds = (now - time).total_seconds()
    return "in the future" if seconds <= -1 else f"{duration(seconds)} ago"


def duration(seconds: float) -> str:
    """Returns a duration in its largest unit.

    >>> duration(59.9), duration(60), duration(7300)
    ('59 s', '1 min', '2 h')
    """
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds) // length} {unit}"
    return f"{int(seconds)} s"


def clock(time: datetime.datetime) -> str:
    """Returns a time in the local time zone."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def utc(time: datetime.datetime) -> str:
    """Returns a time for programs: ISO 8601, UTC."""
    return time.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ------------------------------------------------------------------------------------ progress


def progress_bar(title: str) -> contextlib.AbstractContextManager[Progress]:
    """Returns a bar on standard error while the work lasts, if that is a terminal; else nothing."""
    return progress_bars.bar(printable(title))
