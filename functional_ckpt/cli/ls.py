"""`fckpt ls`: the steps in a directory."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from functional_ckpt import errors
from functional_ckpt.cli import output, step_words, targets
from functional_ckpt.format import parts
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps import history
from functional_ckpt.steps.late_metrics import LateMetrics
from functional_ckpt.storage import queries

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

# From this many columns on, times are shown beside ages.
_WIDE = 120
# Blanks between two columns.
_GAP = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A row of the listing."""

    checkpoint: targets.Checkpoint
    info: StepInfo
    state: str
    space: queries.Space
    items: Mapping[str, str]
    is_ours: bool
    problem: str | None

    @property
    def metrics(self) -> dict[str, float]:
        return dict(history.finite_metrics(self.info.metrics or {}))


def run(arguments: argparse.Namespace) -> int:
    """Prints the list; 0, also when a step is damaged: that is for `fckpt verify` to say."""
    target = targets.find(arguments.directory, arguments.prefix)
    storage = target.storage
    late = LateMetrics(storage, target.path)
    if isinstance(target, targets.Root):
        late.look()
    checkpoints = (
        [target.checkpoint(step) for step in target.steps]
        if isinstance(target, targets.Root)
        else [target]
    )
    known: set[object] = set()
    states = target.states() if isinstance(target, targets.Root) else {}
    found = [_row(each, late, known, states) for each in checkpoints]
    rows = [
        row for row in found if row is not None and queries.exists(storage, row.checkpoint.path)
    ]
    metrics = {row.info.step: row.metrics for row in rows}
    ranked = target.ranked() if isinstance(target, targets.Root) else {}
    best = step_words.best_steps(metrics, ranked, arguments.best)
    names = _shown_metrics(metrics, arguments.metrics)
    chosen = _sorted(rows, arguments)
    if arguments.json:
        output.as_json(_record(target, chosen, best, states))
    else:
        wanted = _Columns(names, best, is_long=arguments.long, drops=arguments.metrics is None)
        _print(target, rows, chosen, wanted, states)
    return 0


def _shown_metrics(metrics: Mapping[int, Mapping[str, float]], wanted: str | None) -> list[str]:
    """Returns the metrics to show, in order; raises `UsageError` for one that no step has."""
    names = list(dict.fromkeys(name for each in metrics.values() for name in each))
    if wanted is None or wanted == "all":
        return names
    return [step_words.find_metric(name, names)[0] for name in wanted.split(",")]


def _sorted(rows: Sequence[_Row], arguments: argparse.Namespace) -> list[_Row]:
    """Returns the rows that were asked for, in order; rows without a metric come first."""
    key = arguments.sort
    found = list(rows)
    if key == "size":
        found.sort(key=lambda row: row.space.size_bytes)
    elif key == "time":
        found.sort(key=lambda row: row.info.time)
    elif key not in (None, "step"):
        step_words.find_metric(key, {name for row in rows for name in row.metrics})
        found.sort(key=lambda row: row.metrics.get(key, -math.inf))
    if arguments.reverse:
        found.reverse()
    return found[-arguments.last :] if arguments.last is not None else found


def _row(
    checkpoint: targets.Checkpoint,
    late: LateMetrics,
    known: set[object],
    states: Mapping[str, str],
) -> _Row | None:
    """None where the step was just removed."""
    storage = checkpoint.storage
    items: Mapping[str, str] = {}
    is_ours, problem, space = False, None, queries.Space(0, 0, 0)
    try:
        space = queries.space(storage, checkpoint.path, known)
        opened = checkpoint.open()
        items, is_ours = opened.items, opened.record is not None
    except errors.CheckpointError as error:
        problem = error.message.removeprefix(f"{checkpoint.path}: ")
    info = history.read_step(storage, checkpoint.path, checkpoint.step)
    if info is None:
        return None
    info = late.added_to(info)
    if info.problem is not None:
        problem = problem or info.problem.removeprefix(f"{checkpoint.path}: ")
    return _Row(
        checkpoint=checkpoint,
        info=info,
        state=states.get(os.path.basename(checkpoint.path), ""),
        space=space,
        items=items,
        is_ours=is_ours,
        problem=problem,
    )


def _record(
    target: targets.Root | targets.Checkpoint,
    rows: Sequence[_Row],
    best: Mapping[str, tuple[step_words.Mode, int]],
    states: Mapping[str, str],
) -> dict[str, Any]:
    is_root = isinstance(target, targets.Root)
    abandoned = target.abandoned if isinstance(target, targets.Root) else frozenset[int]()
    return {
        "schema": "fckpt.ls/1",
        "path": target.path,
        "latest": target.latest if is_root else target.step,
        "best": {name: {"mode": mode, "step": step} for name, (mode, step) in best.items()},
        "steps": [
            {
                "step": row.checkpoint.step,
                "path": row.checkpoint.path,
                "time": output.utc(row.info.time),
                "size_bytes": row.space.size_bytes,
                "added_bytes": row.space.added_bytes,
                "items": dict(row.items),
                "metrics": None if row.info.metrics is None else dict(row.info.metrics),
                "writer": "functional_ckpt" if row.is_ours else "other",
                "problem": row.problem,
            }
            | ({"abandoned": True} if row.info.step in abandoned else {})
            | ({"state": row.state} if row.state else {})
            for row in rows
        ],
        **_parts(target, states),
        "unfinished": list(target.unfinished) if is_root else [],
    }


def _parts(target: targets.Root | targets.Checkpoint, states: Mapping[str, str]) -> dict[str, Any]:
    """Returns the members that describe the parts of a node's directory, if there are any."""
    held = target.parts() if isinstance(target, targets.Root) else {}
    return (
        {"parts": held, "states": {name: states.get(name, "committed") for name in held}}
        if held
        else {}
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of the table of steps.

    Attributes:
        metrics: The metrics, the most important first.
        best: Metric -> which value is best, and the step that has it.
        is_long: Whether to show times beside ages.
        drops: Whether metrics that do not fit on a terminal are left out.
    """

    metrics: Sequence[str]
    best: Mapping[str, tuple[step_words.Mode, int]]
    is_long: bool
    drops: bool


def _print(
    target: targets.Root | targets.Checkpoint,
    rows: Sequence[_Row],
    chosen: Sequence[_Row],
    columns: _Columns,
    states: Mapping[str, str],
) -> None:
    from rich.text import Text

    printer = output.Printer()
    heading = output.styled(target.path, "bold")
    heading.no_wrap = True  # a path is copied
    shared = {tuple(row.items) for row in rows if row.problem is None}
    facts: list[str] = []
    if isinstance(target, targets.Root):
        facts.append(f"{len(rows)} step{'' if len(rows) == 1 else 's'}")
        facts.append(output.size(sum(row.space.added_bytes for row in rows)))
    if len(shared) == 1:
        facts.append(f"items {', '.join(*shared)}" if any(shared) else "no items")
    printer.print(heading, output.styled(printer.sign(" · ", ", ").join(facts), "dim"), Text())
    if chosen:
        has_items = len(shared) > 1
        table, left_out = _fitting(printer, target, chosen, columns, has_items=has_items)
        printer.print(table)
        if left_out:
            plus = f"+{len(left_out)} metric{'' if len(left_out) == 1 else 's'}"
            names = output.printable(", ".join(left_out))
            printer.print(Text(f"{plus}: {names} (--metrics all)", "dim"))
    for row in chosen:
        if row.problem is not None:
            line = f"{row.checkpoint.title} is damaged: {row.problem}"
            printer.print(output.styled(line, "red"))
    held = target.parts() if isinstance(target, targets.Root) else {}
    for name, what in target.strays.items() if isinstance(target, targets.Root) else ():
        line = f"{name}: not a step ({what})"
        if name in held:
            line = f"{name}: {states.get(name, 'committed')}, {held[name]}"
        printer.print(output.styled(line, "dim"))
    if held:
        printer.print(output.styled(f"{parts.ADVICE}.", "dim"))
    for name in target.unfinished if isinstance(target, targets.Root) else ():
        line = f"{name}: unfinished (being written, or left by a crash)"
        printer.print(output.styled(line, "dim"))


def _fitting(
    printer: output.Printer,
    target: targets.Root | targets.Checkpoint,
    rows: Sequence[_Row],
    columns: _Columns,
    *,
    has_items: bool,
) -> tuple[Table, list[str]]:
    """Returns the table with as many metrics as fit, and the metrics that do not."""
    table = _table(printer, target, rows, columns, has_items=has_items)
    shown = list(columns.metrics)
    width = printer.width_of(table)
    if columns.drops and not printer.is_pipe:
        widths = {str(column.header): column.min_width or 0 for column in table.columns}
        while shown and width > printer.console.width:
            width -= widths[output.printable(shown.pop())] + _GAP
        narrow = dataclasses.replace(columns, metrics=shown)
        table = _table(printer, target, rows, narrow, has_items=has_items)
    printer.console.width = max(printer.console.width, width)
    return table, list(columns.metrics)[len(shown) :]


def _table(
    printer: output.Printer,
    target: targets.Root | targets.Checkpoint,
    rows: Sequence[_Row],
    columns: _Columns,
    *,
    has_items: bool,
) -> Table:
    from rich.text import Text

    now = datetime.datetime.now(datetime.UTC)
    is_long = columns.is_long or printer.console.width >= _WIDE
    times = ["saved"] if is_long else []
    states = ["state"] if any(row.state for row in rows) else []
    has_shared = any(row.space.added_bytes < row.space.size_bytes for row in rows)
    adds = ["adds"] if has_shared else []
    first = ["step", "", *states, *times, "age", "size", *adds]
    table = output.table(*first, *columns.metrics, *(["items"] if has_items else []))
    for column in (
        table.columns[0],
        *table.columns[2 + len(states) + len(times) : len(first) + len(columns.metrics)],
    ):
        column.justify = "right"
    if has_items:
        table.columns[-1].no_wrap, table.columns[-1].overflow = False, "fold"
    table.add_column("")
    for row in rows:
        step = "" if row.checkpoint.step is None else str(row.checkpoint.step)
        cells = [
            Text(step, "bold cyan"),
            _place(target, row.info.step),
            *([Text(row.state)] if states else []),
            *([Text(output.clock(row.info.time))] if is_long else []),
            Text(output.age(row.info.time, now), "dim"),
            Text(output.size(row.space.size_bytes)),
            *([Text(output.size(row.space.added_bytes))] if has_shared else []),
        ]
        for name in columns.metrics:
            star = " " if name in columns.best else None
            if star and columns.best[name][1] == row.info.step:
                star = printer.sign("★", "*")
            cells.append(_metric(row.metrics.get(name), star))
        if has_items:
            cells.append(output.styled(" ".join(row.items)))
        if row.problem is not None:
            cells.append(Text("damaged", "bold red"))
        elif not row.is_ours:
            cells.append(Text("foreign", "dim"))
        table.add_row(*cells)
    for column in table.columns:
        if column.no_wrap:  # nothing is cut
            column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))
    return table


def _place(target: targets.Root | targets.Checkpoint, step: int) -> Text:
    """Returns the mark of a step: the one to resume from, or abandoned by a rollback."""
    from rich.text import Text

    if isinstance(target, targets.Root) and step == target.latest:
        return Text("latest", "green")
    is_abandoned = isinstance(target, targets.Root) and step in target.abandoned
    return Text("abandoned" if is_abandoned else "", "dim")


def _metric(value: float | None, star: str | None) -> Text:
    """Returns a cell; `star` is None in a column without a best value, else a star or a blank."""
    from rich.text import Text

    if value is None:
        return Text("")
    text = output.number(value)
    if star is None or star == " ":
        return Text(text if star is None else f"{text}  ")
    return Text.assemble((text, "bold"), (f" {star}", "yellow"))
