"""Displays a manager: as a line for logs and prompts, and as a table of its steps for notebooks.

Lines and tables do not read the disk: they show the steps that the manager has in memory.
"""

from __future__ import annotations

import abc
import dataclasses
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from functional_ckpt import errors
from functional_ckpt.policies import keep, lines
from functional_ckpt.policies.base import KeepPolicy, StepInfo
from functional_ckpt.steps import history, plot, run_log
from functional_ckpt.steps.run_steps import Steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_ROWS = 20


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """The parts of a manager that are shown.

    Attributes:
        steps: Its steps.
        policies: Its keep policies.
        saving: The step whose commit is in progress, if any.
        is_over: Whether it was closed, or belongs to another process.
    """

    steps: Steps
    policies: Sequence[KeepPolicy]
    saving: int | None
    is_over: bool


class Shown(abc.ABC):
    """A manager in prompts, notebooks and plots."""

    @abc.abstractmethod
    def _shown(self) -> State: ...

    def __repr__(self) -> str:
        return line(self._shown())

    def _repr_html_(self) -> str:
        return table(self._shown())

    def plot(self, *metrics: str) -> Figure:
        """Returns a matplotlib figure of metrics over the steps, also of steps that were removed.

        Args:
            metrics: Their names; without any, all of them.

        Raises:
            UsageError: matplotlib is not installed, or no step has a metric of that name.
        """
        return plotted(self._shown(), metrics)


def line(state: State) -> str:
    """Returns the `repr` of a manager."""
    steps, facts = state.steps, [repr(state.steps.root)]
    if state.is_over:
        facts.append("closed")
    else:
        infos = steps.all_infos()
        latest = lines.newest(infos)
        facts.append(f"{len(infos)} step{'' if len(infos) == 1 else 's'}")
        facts += [] if latest is None else [f"latest {latest.step}"]
        facts += [] if state.saving is None else [f"saving {state.saving}"]
        facts += ["read-only"] if steps.read_only else []
    return f"CheckpointManager({', '.join(facts)})"


def table(state: State) -> str:
    """Returns a manager as HTML: its line and its last 20 steps."""
    caption = html.escape(line(state))
    infos = () if state.is_over else state.steps.all_infos()[-_MAX_ROWS:]
    if not infos:
        return f"<code>{caption}</code>"
    names = list(dict.fromkeys(name for info in infos for name in info.metrics or {}))
    latest = lines.newest(infos)
    rows = [_row("th", ["step", "", "saved", *names])]
    rows += [_row("td", _cells(info, names, is_latest=info is latest)) for info in infos]
    return f"<table><caption><code>{caption}</code></caption>{''.join(rows)}</table>"


def plotted(state: State, wanted: Sequence[str]) -> Figure:
    """Returns the figure of `Shown.plot`."""
    steps = state.steps
    steps.look_at_metrics()
    infos = [info for info in steps.all_infos() if not info.is_abandoned]
    here = {info.step for info in infos}
    past = [each.info for each in run_log.read(steps.storage, steps.hidden)]
    every = sorted([*infos, *(i for i in past if i.step not in here)], key=lambda i: i.step)
    metrics = {info.step: dict(history.finite_metrics(info.metrics or {})) for info in every}
    names = list(dict.fromkeys(name for each in metrics.values() for name in each))
    for name in wanted:
        if name not in names:
            raise errors.UsageError(f"No step has the metric {name!r}; they have: {names}.")
    best = {each.metric: each for each in state.policies if isinstance(each, keep.BestN)}
    newest = lines.newest(infos)
    return plot.plot(
        [
            plot.Series(
                name=name,
                values={step: each[name] for step, each in metrics.items() if name in each},
                kept=here,
                best=_best(infos, best.get(name)),
                latest=None if newest is None else newest.step,
            )
            for name in wanted or names
        ],
        title=steps.root,
    )


def _best(infos: Sequence[StepInfo], policy: keep.BestN | None) -> int | None:
    sound = [info for info in infos if info.problem is None]
    if policy is None:
        return None
    return keep.best_step(sound, policy.metric, policy.mode, ())


def _cells(info: StepInfo, names: Sequence[str], *, is_latest: bool) -> list[str]:
    mark = "latest" if is_latest else "abandoned" if info.is_abandoned else ""
    values = [(info.metrics or {}).get(name, "") for name in names]
    texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    return [str(info.step), mark, info.time.strftime("%Y-%m-%d %H:%M:%S %Z"), *texts]


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
