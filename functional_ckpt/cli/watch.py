"""`fckpt watch`: the steps of a run, as they are written, committed and uploaded."""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from functional_ckpt import errors
from functional_ckpt.cli import output, targets
from functional_ckpt.cli.prune import waiting_for_upload
from functional_ckpt.cli.rm import root_of
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps import history

# How many steps judge when the next one is due, and after how many times their gap none is.
_MIN_JUDGED, _MAX_JUDGED, _MAX_LATE = 3, 6, 10

if TYPE_CHECKING:
    from rich.console import RenderableType


def run(arguments: argparse.Namespace) -> int:
    """Shows the steps until Ctrl-C; on a terminal as a table, else a line for each new step."""
    if arguments.json:
        raise errors.UsageError("fckpt watch is for people; for programs there is fckpt ls --json.")
    root = root_of(arguments.directory, arguments.prefix)
    if sys.stdout.isatty():
        _show(root, arguments)
    else:
        _print_lines(root, arguments)
    return 0


def _show(root: targets.Root, arguments: argparse.Namespace) -> None:
    from rich.live import Live

    printer = output.Printer()
    with Live(console=printer.console, auto_refresh=False, transient=False) as live:
        while True:
            live.update(_picture(printer, root, arguments.last), refresh=True)
            time.sleep(arguments.interval)
            root = _again(root, arguments)


def _print_lines(root: targets.Root, arguments: argparse.Namespace) -> None:
    printer = output.Printer()
    known = {(info.step, info.time) for info in root.history()[: -arguments.last]}
    while True:
        for info in root.history():
            if (info.step, info.time) not in known:
                known.add((info.step, info.time))
                facts = [f"step {info.step}", f"saved {output.clock(info.time)}", *_metrics(info)]
                printer.write([output.printable("  ".join(facts))])
        time.sleep(arguments.interval)
        root = _again(root, arguments)


def _again(root: targets.Root, arguments: argparse.Namespace) -> targets.Root:
    if root.has_known_names:
        return root.again()
    return root_of(arguments.directory, arguments.prefix)


def _metrics(info: StepInfo) -> list[str]:
    found = history.finite_metrics(info.metrics or {})
    return [f"{name}={output.number(value)}" for name, value in found]


def next_due(infos: Sequence[StepInfo], now: datetime.datetime) -> str:
    """Returns when the next step is due, judged by the last ones; empty if they do not say.

    Args:
        infos: The steps, ascending; of the last six on the present line, time and number count.
        now: The time, with a time zone.
    """
    last = [info for info in infos if not info.is_abandoned][-_MAX_JUDGED:]
    if len(last) < _MIN_JUDGED:
        return ""
    pairs = list(itertools.pairwise(last))
    gap = statistics.median((after.time - before.time).total_seconds() for before, after in pairs)
    numbers = {after.step - before.step for before, after in pairs}
    name = f"step {last[-1].step + numbers.pop()}" if len(numbers) == 1 else "the next step"
    seconds = (last[-1].time - now).total_seconds() + gap
    if seconds < -_MAX_LATE * gap:
        return ""  # the run is over, or saves by another rule
    if seconds < 0:
        return f"{name} was due {output.duration(-seconds)} ago"
    return f"{name} is due in about {output.duration(seconds)}"


def _picture(printer: output.Printer, root: targets.Root, last: int) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    now = datetime.datetime.now(datetime.UTC)
    waiting = waiting_for_upload(root)
    table = output.table("step", "", "age", "metrics")
    table.columns[0].justify = table.columns[2].justify = "right"
    for info in root.history()[-last:]:
        words = ["latest"] if info.step == root.latest else []
        words += ["uploading"] if info.step in waiting else []
        words += ["abandoned"] if info.is_abandoned else []
        table.add_row(
            Text(str(info.step), "bold cyan"),
            Text(", ".join(words), "green"),
            Text(output.age(info.time, now), "dim"),
            output.styled("  ".join(_metrics(info))),
        )
    count = f"{len(root.steps)} step{'' if len(root.steps) == 1 else 's'}"
    heading = Text.assemble((output.printable(root.path), "bold"), (f"  {count}", "dim"))
    lines = [output.styled(f"{name}: being written", "yellow") for name in root.unfinished]
    lines += [Text(due, "dim")] if (due := next_due(root.history(), now)) else []
    return Group(heading, Text(), table, *lines, Text(f"{output.clock(now)}, Ctrl-C ends", "dim"))
