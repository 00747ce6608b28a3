"""Plots of a run with matplotlib: a metric over the steps, with those kept, best and latest marked.

Matplotlib is the extra `report`; its pyplot, which has global state, is not used.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from functional_ckpt import errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_MARKERS = 300
# A metric whose values are positive and span more than this is drawn on a log scale.
_LOG_RANGE = 1000.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A quantity over the steps.

    Attributes:
        name: The title of its plot.
        values: Step -> finite value, ascending.
        kept: The steps that are there; others were removed.
        best: The step with the best value; None if no value is best.
        latest: The step that a run resumes from.
        starts_at_zero: Whether its axis does.
    """

    name: str
    values: Mapping[int, float]
    kept: Collection[int]
    best: int | None = None
    latest: int | None = None
    starts_at_zero: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Colors:
    """The colours of a plot, as matplotlib takes them."""

    line: str = "#5b7db1"
    point: str = "#2f5d9e"
    best: str = "#c98500"
    latest: str = "#1a8a4a"
    inside: str = "white"


def figure_class() -> type[Figure]:
    """Returns matplotlib's figure; raises `UsageError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise errors.UsageError(
            "Plots need matplotlib: pip install 'functional-ckpt[report]'."
        ) from error
    return Figure


def draw(axes: Axes, series: Series, colors: Colors) -> None:
    """Draws one series: a line, a dot for each step that is there, a ring for each that is not."""
    from matplotlib.ticker import MaxNLocator

    steps, values = list(series.values), list(series.values.values())
    axes.plot(steps, values, color=colors.line, linewidth=1.2, zorder=2)
    for is_kept in (False, True):
        chosen = [step for step in steps if (step in series.kept) == is_kept]
        if 0 < len(chosen) <= _MAX_MARKERS:
            axes.plot(
                *(chosen, [series.values[step] for step in chosen]),
                **_marker("o", 4.5, colors.point, colors.point if is_kept else colors.inside),
            )
    for step, style in (
        (series.latest, _marker("o", 10, colors.latest, "none", 1.6)),
        (series.best, _marker("*", 11, colors.best, colors.best)),
    ):
        if step is not None and step in series.values:
            axes.plot([step], [series.values[step]], **style)
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_RANGE:
        axes.set_yscale("log")
    axes.set_title(series.name, loc="left", parse_math=False)
    axes.margins(x=0.04, y=0.12)
    if series.starts_at_zero:
        axes.set_ylim(0, high * 1.15 or 1)
    axes.grid(visible=True, axis="y", linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("step")


def _marker(shape: str, size: float, edge: str, inside: str, width: float = 1.1) -> dict[str, Any]:
    return {
        "linestyle": "none",
        "marker": shape,
        "markersize": size,
        "zorder": 3,
        "markeredgecolor": edge,
        "markerfacecolor": inside,
        "markeredgewidth": width,
    }


def plot(every: Iterable[Series], title: str) -> Figure:
    """Returns a figure with a plot for each series."""
    shown = list(every)
    num_columns = min(3, len(shown)) or 1
    num_rows = math.ceil(len(shown) / num_columns) or 1
    size = (4.6 * num_columns, 0.5 + 2.7 * num_rows)
    figure = figure_class()(figsize=size, layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid: Any = figure.subplots(num_rows, num_columns, squeeze=False)
    cells: Sequence[Axes] = list(grid.flat)
    for axes, series in zip(cells, shown, strict=False):
        draw(axes, series, Colors())
    for axes in cells[len(shown) :]:
        axes.set_axis_off()
    vars(figure)["_repr_png_"] = functools.partial(_png, figure)
    return figure


def _png(figure: Figure) -> bytes:
    """Returns the picture that a notebook shows of a figure made without pyplot."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
