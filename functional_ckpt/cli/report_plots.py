"""Plots as SVG whose colours are those of the page, light or dark."""

from __future__ import annotations

import io
import operator
import re
from collections.abc import Callable
from html import escape
from typing import Any

from functional_ckpt.cli.report_record import ReportStep, RunReport
from functional_ckpt.steps import plot
from functional_ckpt.steps.plot import Series

_MAX_METRICS = 24
_COSTS = ("size, MiB", "save, seconds")
# Matplotlib has no colours of the page: these stand for the properties of its style sheet.
_PROPERTIES = {
    "#010101": "--ink",
    "#010102": "--faint",
    "#010103": "--line",
    "#010104": "--point",
    "#010105": "--best",
    "#010106": "--latest",
    "#010107": "--card",
}
_COLORS = plot.Colors("#010103", "#010104", "#010105", "#010106", "#010107")
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    **dict.fromkeys(
        (
            "text.color",
            "axes.titlecolor",
            "axes.labelcolor",
            "xtick.labelcolor",
            "ytick.labelcolor",
        ),
        "#010101",
    ),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), "#010102"),
}


def series_of_metrics(report: RunReport) -> list[Series]:
    """Returns a series for each metric; of very many, the first ones."""
    return [
        _series(report, name, operator.methodcaller("metric", name), report.best.get(name))
        for name in report.metrics[:_MAX_METRICS]
    ]


def series_of_costs(report: RunReport) -> list[Series]:
    """Returns the sizes and the durations of the saves."""
    return [
        _series(report, _COSTS[0], lambda step: step.size_bytes and step.size_bytes / 2**20),
        _series(report, _COSTS[1], lambda step: step.seconds),
    ]


def _series(
    report: RunReport, name: str, of: Callable[[ReportStep], float | None], best: int | None = None
) -> Series:
    steps = [step for step in report.steps if not step.is_abandoned]
    return Series(
        name=name,
        values={step.step: value for step in steps if (value := of(step)) is not None},
        kept={step.step for step in steps if step.is_kept},
        best=best,
        latest=report.latest,
        starts_at_zero=name in _COSTS,
    )


def svg(series: Series, number: int) -> str:
    """Returns a plot as an SVG element for a page; `number` keeps its names apart from others."""
    figure_class = plot.figure_class()
    import matplotlib

    style: Any = {**_STYLE, "svg.hashsalt": str(number)}
    with matplotlib.rc_context(style):
        figure = figure_class(figsize=(4.4, 2.5), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        plot.draw(axes, series, _COLORS)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _for_page(file.getvalue(), series.name)


def _for_page(text: str, name: str) -> str:
    """Returns the element with the colours of the page and only the names that it refers to."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    for color, name_of_property in _PROPERTIES.items():
        text = text.replace(color, f"var({name_of_property})")
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)
    label = escape(f"{name} over the steps", quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
