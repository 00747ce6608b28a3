"""The plots of a run, as SVG files; drawn from its summary alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.summary import GIB, Summary, is_ours, limit_seconds

__all__ = ["draw"]

_OURS_COLOUR = "#3f51b5"
_OTHERS = ("#90a4ae", "#ffb74d", "#a1887f", "#81c784", "#ba68c8", "#e57373")
_WORKLOADS = ("big", "small", "tiny", "gpt2")


def draw(summary: Summary, folder: Path) -> list[str]:
    """Draws the measurements.

    Returns:
        The names of the plots, without `.svg`.
    """
    import matplotlib

    matplotlib.use("svg")
    # The same figures make the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "functional_ckpt", "font.size": 9})
    drawn: list[str] = []
    for name, measure, figure, title in (
        ("durable", "sync", "save_durable_seconds", "Durable save, GiB/s"),
        ("restore_warm", "sync", "restore_warm_seconds", "Restore in place, warm, GiB/s"),
        ("restore_cold", "sync", "restore_cold_seconds", "Restore in place, cold, GiB/s"),
    ):
        if _draw_one(summary, folder / f"{name}.svg", (measure, figure, title), _rate):
            drawn.append(name)
    what = ("async", "blocked_3_seconds", "Blocked in the third save, seconds")
    if _draw_one(summary, folder / "blocked.svg", what, _plain):
        drawn.append("blocked")
    what = ("async", "peak_bytes", "Memory of three asynchronous saves, over the state")
    if _draw_one(summary, folder / "memory.svg", what, _over_size):
        drawn.append("memory")
    return drawn


def _rate(value: float, size: float) -> float:
    return size / value / GIB


def _plain(value: float, size: float) -> float:
    del size
    return value


def _over_size(value: float, size: float) -> float:
    return value / size


def _draw_one(
    summary: Summary,
    path: Path,
    what: tuple[str, str, str],
    scale: Callable[[float, float], float],
) -> bool:
    """Bars of every system for every workload, whiskers for the spread, a line for the limit."""
    from matplotlib import pyplot

    measure, figure, title = what
    loads = [load for load in _WORKLOADS if summary.peers(measure, load)]
    systems = list(dict.fromkeys(p for load in loads for p in summary.peers(measure, load)))
    if not systems:
        return False
    colours = _colours(systems)
    figure_, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.85 / len(systems)
    for place, load in enumerate(loads):
        for index, system in enumerate(systems):
            key = f"{measure}/{load}/{system}"
            spread, size = summary.spread(key, figure), summary.median(key, "size_bytes")
            if spread is None or size is None:
                continue
            middle = scale(spread.median, size)
            ends = sorted((scale(spread.low, size), scale(spread.high, size)))
            axes.bar(
                place + (index - (len(systems) - 1) / 2) * width,
                middle,
                width,
                yerr=[[middle - ends[0]], [ends[1] - middle]],
                error_kw={"linewidth": 0.8},
                color=colours[system],
                label=system if place == 0 else None,
            )
        _draw_limit(axes, summary, (measure, load, figure), place, scale)
    axes.set_xticks(range(len(loads)), loads)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure_.legend(loc="outside right center", frameon=False, fontsize=8)
    figure_.savefig(path, metadata={"Date": None})
    pyplot.close(figure_)
    return True


def _colours(systems: Sequence[str]) -> Mapping[str, str]:
    others = [system for system in systems if not is_ours(system)]
    colours = {system: _OTHERS[index % len(_OTHERS)] for index, system in enumerate(others)}
    ours = [system for system in systems if is_ours(system)]
    return colours | dict(zip(ours, (_OURS_COLOUR, "#7986cb"), strict=False))


def _draw_limit(
    axes: Any,
    summary: Summary,
    what: tuple[str, str, str],
    place: int,
    scale: Callable[[float, float], float],
) -> None:
    measure, load, figure = what
    key = f"{measure}/{load}/{summary.peers(measure, load)[-1]}"
    size = summary.median(key, "size_bytes") or 0
    limit = limit_seconds(summary, figure, size)
    if limit:
        level = scale(limit, size)
        label = "limit of the machine" if place == 0 else None
        axes.hlines(level, place - 0.45, place + 0.45, color="#d32f2f", linestyle="--", label=label)
