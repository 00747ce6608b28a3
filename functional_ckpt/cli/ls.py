"""`fckpt ls`: the steps in a directory."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from functional_ckpt import errors
from functional_ckpt.cli import output, targets
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps import history
from functional_ckpt.steps.late_metrics import LateMetrics
from functional_ckpt.storage import queries

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

# Metrics whose names hold one of these words are best when lowest.
_LOWER_IS_BETTER = frozenset(
    [
        *("loss", "losses", "error", "errors", "err", "nll", "ce", "xent", "perplexity", "ppl"),
        *("mse", "mae", "rmse", "wer", "cer", "fid", "bpb", "bits", "kl", "divergence"),
        *("distance", "regret", "time", "seconds", "latency"),
    ]
)
_Mode = Literal["min", "max"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A row of the listing."""

    checkpoint: targets.Checkpoint
    info: StepInfo
    size_bytes: int
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
    found = [_row(each, late) for each in checkpoints]
    rows = [
        row for row in found if row is not None and queries.exists(storage, row.checkpoint.path)
    ]
    best = _best(rows, arguments.best)
    if arguments.json:
        output.as_json(_record(target, rows, best))
    else:
        _print(target, rows, best)
    return 0


def _row(checkpoint: targets.Checkpoint, late: LateMetrics) -> _Row | None:
    """None where the step was just removed."""
    storage = checkpoint.storage
    items: Mapping[str, str] = {}
    is_ours, problem, size_bytes = False, None, 0
    try:
        size_bytes = queries.total_bytes(storage, checkpoint.path)
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
        size_bytes=size_bytes,
        items=items,
        is_ours=is_ours,
        problem=problem,
    )


def _best(rows: Sequence[_Row], chosen: Sequence[str]) -> dict[str, tuple[_Mode, int]]:
    """Metric -> which of its values is best, and the step that has it; of equal ones the newest."""
    values: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        for name, value in row.metrics.items():
            values.setdefault(name, []).append((value, row.info.step))
    modes: dict[str, _Mode] = {name: _mode(name) for name in values}
    for text in chosen:
        name, colon, mode = text.rpartition(":")
        name, mode = (name, mode) if colon and mode in ("min", "max") else (text, "")
        if name not in modes:
            known = ", ".join(sorted(modes)) or "none"
            raise errors.UsageError(f"--best {text}: no step has this metric; they have: {known}.")
        if mode:
            modes[name] = "min" if mode == "min" else "max"
    sign = {"max": 1, "min": -1}
    return {
        name: (mode, max(values[name], key=lambda pair: (sign[mode] * pair[0], pair[1]))[1])
        for name, mode in modes.items()
    }


def _mode(metric: str) -> _Mode:
    words = re.split(r"[^a-z]+", metric.lower())
    return "max" if _LOWER_IS_BETTER.isdisjoint(words) else "min"


def _record(
    target: targets.Root | targets.Checkpoint,
    rows: Sequence[_Row],
    best: Mapping[str, tuple[_Mode, int]],
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
                "size_bytes": row.size_bytes,
                "items": dict(row.items),
                "metrics": None if row.info.metrics is None else dict(row.info.metrics),
                "writer": "functional_ckpt" if row.is_ours else "other",
                "problem": row.problem,
            }
            | ({"abandoned": True} if row.info.step in abandoned else {})
            for row in rows
        ],
        "unfinished": list(target.unfinished) if is_root else [],
    }


def _print(
    target: targets.Root | targets.Checkpoint,
    rows: Sequence[_Row],
    best: Mapping[str, tuple[_Mode, int]],
) -> None:
    from rich.text import Text

    printer = output.Printer()
    heading = output.styled(target.path, "bold")
    shared = {tuple(row.items) for row in rows if row.problem is None}
    facts: list[str] = []
    if isinstance(target, targets.Root):
        facts.append(f"{len(rows)} step{'' if len(rows) == 1 else 's'}")
        facts.append(output.size(sum(row.size_bytes for row in rows)))
    if len(shared) == 1:
        facts.append(f"items {', '.join(*shared)}" if any(shared) else "no items")
    printer.print(heading, output.styled(printer.sign(" · ", ", ").join(facts), "dim"), Text())
    if rows:
        printer.print(_table(printer, target, rows, best, has_items=len(shared) > 1))
    for row in rows:
        if row.problem is not None:
            line = f"{row.checkpoint.title} is damaged: {row.problem}"
            printer.print(output.styled(line, "red"))
    for name, what in target.strays.items() if isinstance(target, targets.Root) else ():
        printer.print(output.styled(f"{name}: not a step ({what})", "dim"))
    for name in target.unfinished if isinstance(target, targets.Root) else ():
        line = f"{name}: unfinished (being written, or left by a crash)"
        printer.print(output.styled(line, "dim"))


def _table(
    printer: output.Printer,
    target: targets.Root | targets.Checkpoint,
    rows: Sequence[_Row],
    best: Mapping[str, tuple[_Mode, int]],
    *,
    has_items: bool,
) -> Table:
    from rich.text import Text

    now = datetime.datetime.now(datetime.UTC)
    table = output.table("step", "", "saved", "", "size", *best, *(["items"] if has_items else []))
    for column in (table.columns[0], *table.columns[4 : 5 + len(best)]):
        column.justify = "right"
    if has_items:
        table.columns[-1].no_wrap = False
    table.add_column("")
    for row in rows:
        step = "" if row.checkpoint.step is None else str(row.checkpoint.step)
        cells = [
            Text(step, "bold cyan"),
            _place(target, row.info.step),
            Text(output.clock(row.info.time)),
            Text(output.age(row.info.time, now), "dim"),
            Text(output.size(row.size_bytes)),
        ]
        for name, (_, step_of_best) in best.items():
            is_best = step_of_best == row.info.step
            cells.append(_metric(printer, row.metrics.get(name), is_best=is_best))
        if has_items:
            cells.append(output.styled(" ".join(row.items)))
        if row.problem is not None:
            cells.append(Text("damaged", "bold red"))
        elif not row.is_ours:
            cells.append(Text("foreign", "dim"))
        table.add_row(*cells)
    return table


def _place(target: targets.Root | targets.Checkpoint, step: int) -> Text:
    """Whether a step is the one that a run resumes from, or one that a rollback left behind."""
    from rich.text import Text

    if isinstance(target, targets.Root) and step == target.latest:
        return Text("latest", "green")
    is_abandoned = isinstance(target, targets.Root) and step in target.abandoned
    return Text("abandoned" if is_abandoned else "", "dim")


def _metric(printer: output.Printer, value: float | None, *, is_best: bool) -> Text:
    from rich.text import Text

    if value is None:
        return Text("")
    text = output.number(value)
    if not is_best:
        return Text(f"{text}  ")
    return Text.assemble((text, "bold"), (f" {printer.sign('★', '*')}", "yellow"))
