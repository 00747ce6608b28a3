"""The plots of a run, as SVG files; drawn from its summary alone."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.summary import Spread, Summary, is_ours

__all__ = ["PLOTS", "Plot", "draw", "figure_markdown"]

# One colour for each system in every plot, readable on white and on dark grey.
_COLOURS: Mapping[str, str] = {
    "functional_ckpt": "#5c6bc0",
    "torch": "#90a4ae",
    "safetensors": "#43a047",
    "dcp": "#fb8c00",
    "orbax": "#ab47bc",
    "torch_checkpointing": "#e57373",
}
_OTHER_COLOUR = "#78909c"
_TITLES: Mapping[str, str] = {
    "big": "big: 2 GiB in 16 arrays",
    "small": "small: 2 GiB in 2,000 arrays",
    "tiny": "tiny: 78 MiB in 20,000 arrays",
    "gpt2": "gpt2: GPT-2 with AdamW, 1.2 GiB",
}
_TEXT = "#010203"  # stands for the page's own colour until the file is written
_GRID = "#8a8d91"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A figure of every system, for each workload.

    Attributes:
        name: The file's name without `.svg`.
        measure: The measure of `schedule.MEASURES` that has the figure.
        figure: The figure.
        caption: The text below the plot.
        per_size: Whether the figure is divided by the size of the state.
    """

    name: str
    measure: str
    figure: str
    caption: str
    per_size: bool = False


PLOTS = (
    Plot(
        name="durable",
        measure="sync",
        figure="save_durable_seconds",
        caption="Save: seconds until every file and directory is synced.",
    ),
    Plot(
        name="blocked",
        measure="async",
        figure="blocked_3_seconds",
        caption="Save in the background: seconds that training waits, in the third save.",
    ),
    Plot(
        name="restore_cold",
        measure="sync",
        figure="restore_cold_seconds",
        caption="Restore in place after a restart: seconds, read from the disk.",
    ),
    Plot(
        name="restore_warm",
        measure="sync",
        figure="restore_warm_seconds",
        caption="Restore in place, files cached in memory: seconds. "
        "torch.save and safetensors verify nothing.",
    ),
    Plot(
        name="memory",
        measure="async",
        figure="peak_bytes",
        caption="Memory of three saves in the background, in multiples of the state.",
        per_size=True,
    ),
)


def draw(summary: Summary, folder: Path) -> list[str]:
    """Draws the measurements.

    Returns:
        The names of the plots, without `.svg`.
    """
    import matplotlib

    matplotlib.use("svg")
    settings = {
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _TEXT,
        "font.size": 9,
        "grid.color": _GRID,
        "svg.fonttype": "none",
        "svg.hashsalt": "functional_ckpt",  # the same figures make the same file
        "text.color": _TEXT,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
    }
    with matplotlib.rc_context(settings):
        return [plot.name for plot in PLOTS if _draw_one(summary, plot, folder)]


def figure_markdown(name: str) -> list[str]:
    """Lines of Markdown that show a plot inside of the page, so that it has the page's colours."""
    (caption,) = [plot.caption for plot in PLOTS if plot.name == name]
    return [
        '<figure class="plot" markdown="0">',
        f"<figcaption>{caption} Less is better.</figcaption>",
        f'--8<-- "docs/benchmarks/{name}.svg"',
        "</figure>",
        "",
    ]


def _draw_one(summary: Summary, plot: Plot, folder: Path) -> bool:
    """A dot for each system's median and a line from its lowest to its highest value."""
    from matplotlib import pyplot

    rows = {load: _rows(summary, plot, load) for load in _TITLES}
    rows = {load: found for load, found in rows.items() if found}
    if not rows:
        return False
    heights = [len(found) + 1.4 for found in rows.values()]
    figure, panels = pyplot.subplots(
        len(rows),
        squeeze=False,
        sharex=True,
        figsize=(5.2, 0.2 * sum(heights) + 0.35),
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for axes, (load, found) in zip(panels[:, 0], rows.items(), strict=True):
        _draw_panel(axes, _TITLES[load], found, plot)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    path = folder / f"{plot.name}.svg"
    path.write_text(_for_a_page(text.getvalue(), plot.caption), encoding="utf-8")
    return True


def _rows(summary: Summary, plot: Plot, load: str) -> list[tuple[str, Spread]]:
    """The systems with their figures, the least first."""
    found: list[tuple[str, Spread]] = []
    for system in summary.peers(plot.measure, load):
        key = f"{plot.measure}/{load}/{system}"
        spread, size = summary.spread(key, plot.figure), summary.median(key, "size_bytes")
        if spread is None or size is None:
            continue
        scale = 1 / size if plot.per_size else 1.0
        scaled = {name: getattr(spread, name) * scale for name in ("median", "low", "high")}
        found.append((system, dataclasses.replace(spread, **scaled)))
    return sorted(found, key=lambda each: each[1].median)


def _draw_panel(axes: Any, title: str, rows: list[tuple[str, Spread]], plot: Plot) -> None:
    for row, (system, spread) in enumerate(rows):
        colour = _COLOURS.get(system.partition(".")[0], _OTHER_COLOUR)
        axes.plot([spread.low, spread.high], [row, row], color=colour, linewidth=2, alpha=0.6)
        axes.plot([spread.median], [row], "o", color=colour, markersize=6 + is_ours(system))
        weight = "bold" if is_ours(system) else "normal"
        label = f"{spread.median:.2f}x" if plot.per_size else _seconds(spread.median)
        at = (max(spread.high, spread.median), row)
        axes.annotate(
            label, at, (6, 0), textcoords="offset points", va="center", fontsize=8, weight=weight
        )
    names = axes.set_yticks(range(len(rows)), [system for system, _ in rows])
    for tick, (system, _) in zip(names, rows, strict=True):
        tick.label1.set_fontweight("bold" if is_ours(system) else "normal")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(title, loc="left", fontsize=9)
    if not plot.per_size:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: _seconds(value))
    else:
        axes.set_xlim(left=0)
    axes.margins(x=0.16)
    axes.grid(axis="x", alpha=0.35, linewidth=0.6)
    axes.tick_params(length=0)
    axes.tick_params(which="minor", length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def _for_a_page(svg: str, caption: str) -> str:
    """The element alone, in the colours of the page, without ids that several plots would share."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would hold for all the page
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib)[\w.]*"', "", svg)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    while "<g/>" in svg or "<g></g>" in svg:
        svg = re.sub(r"\s*(?:<g/>|<g></g>)", "", svg)
        svg = re.sub(r"<g>\s*</g>", "<g></g>", svg)
    svg = svg.replace(_TEXT, "currentColor").replace("<svg ", '<svg role="img" ', 1)
    svg = svg.replace(">", f"><title>{caption}</title>", 1)
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"
