"""A run as Markdown: the bars, then every figure with its spread and its ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.bars import Bar, bars
from benchmarks.plots import figure_markdown
from benchmarks.summary import GIB, MIB, Spread, Summary, is_ours, kind_of_staging, limit_seconds

__all__ = ["SYNC", "bars_table", "figures_table", "markdown", "plots_markdown"]

# Figure -> how tables name it.
SYNC = {
    "save_durable_seconds": "save, durable",
    "save_seconds": "save, not synced",
    "restore_after_save_seconds": "restore in place, right after the save",
    "restore_warm_seconds": "restore in place, warm",
    "restore_unverified_seconds": "restore in place, warm, unverified",
    "restore_cold_seconds": "restore in place, cold",
    "restore_new_seconds": "restore into new memory, warm",
}
_ASYNC = {
    "blocked_1_seconds": "blocked, 1st save",
    "blocked_3_seconds": "blocked, 3rd save",
    "durable_3_seconds": "until durable, 3rd save",
}
_RESOURCES = {
    "sync": {
        "save_peak_bytes": "peak, save",
        "restore_warm_peak_bytes": "peak, restore in place",
        "restore_new_peak_bytes": "peak, restore new",
    },
    "async": {"peak_1_bytes": "peak, 1st save", "peak_bytes": "peak, three saves"},
    "ranks": {"save_peak_bytes": "peak, save"},
}
_CPU = {"sync": "save_cpu_seconds", "async": "cpu_seconds", "ranks": "save_cpu_seconds"}
_TITLES = {
    "sync": "synchronous",
    "async": "asynchronous, three saves of a state that changes",
    "ranks": "two ranks, FSDP2 shards, synchronous",
}
# The reference of figures of the loops and of a GPU.
_BASES = {
    **{f"loop_{mode}_seconds": "loop_other_seconds" for mode in ("alone", "eager", "overlapped")},
    **{
        f"{system}_{name}": base.format(system)
        for system in ("eager", "overlapped", "dcp_pinned", "dcp_pinned_overlapped")
        for name, base in {
            "blocked_3_seconds": "pinned_d2h_seconds",
            "restore_warm_seconds": "pinned_h2d_seconds",
            "loop_saving_seconds": "{}_loop_alone_seconds",
        }.items()
    },
}
_MAX_RESIDENT = 0.02


def markdown(summary: Summary, plots: Sequence[str]) -> str:
    """The complete report, as a page next to its plots."""
    settings = summary.settings
    counts = [spread.count for each in summary.spreads.values() for spread in each.values()]
    fewest, most = min(counts, default=0), max(counts, default=0)
    repeats = f"{most}" if fewest == most else f"{fewest} to {most}"
    size = f"a {settings['divisor']}th of the data" if settings["divisor"] > 1 else "full size"
    lines = [
        "# Measurements",
        "",
        "Written by `scripts/bench`; do not edit. [Performance](../performance.md) explains it.",
        "",
        f"{settings['machine']}; {size}; medians of {repeats}, with the lowest and the highest in "
        "brackets, up to three rounds in a process of its own, systems in turn. "
        + ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
        + ".",
        "",
        "Durable: every file and directory is synced before the clock stops, by the system or "
        "after it. *Of best* is the speed over that of the best other system, *of limit* over the "
        "raw limit of the same run: copies for data that stays in memory, otherwise the best raw "
        "write or cold read.",
        "",
        *plots_markdown(plots),
        *_limits(summary),
        *_latency(summary),
        *figures_table(summary, "loop/big", "A training loop on one thread"),
        *figures_table(summary, "cuda/big", "A GPU"),
    ]
    for measure in _TITLES:
        for load in _workloads(summary, measure):
            lines += _times(summary, measure, load)
            lines += _resources(summary, measure, load)
    lines += [*_reasons(summary), "## Bars", "", *bars_table(bars(summary))]
    return "\n".join(lines).rstrip() + "\n"


def plots_markdown(plots: Sequence[str]) -> list[str]:
    """Lines of Markdown that show the plots, on any page."""
    return [line for name in plots for line in figure_markdown(name)]


def bars_table(found: Sequence[Bar]) -> list[str]:
    """One row for each bar: the figure, the bar, reached or not."""
    rows = ["| | measured | bar | |", "| --- | ---: | ---: | --- |"]
    for bar in found:
        measured = "" if bar.measured is None else _quantity(bar.measured, bar.unit)
        word = {True: "reached", False: "**missed**", None: "not measured"}[bar.is_reached]
        bound = f"{'≤' if bar.at_most else '≥'} {_quantity(bar.bound, bar.unit)}"
        rows.append(f"| {bar.name} | {measured} | {bound} | {word} |")
    return [*rows, ""]


def _quantity(value: float, unit: str) -> str:
    return f"{value:.2f}x" if unit == "x" else f"{value:.3g} {unit}"


def _workloads(summary: Summary, measure: str) -> list[str]:
    found = [key.split("/")[1] for key in summary.spreads if key.startswith(f"{measure}/")]
    return list(dict.fromkeys(found))


def _seconds(spread: Spread) -> str:
    if spread.count == 1:
        return _short(spread.median)
    return f"{_short(spread.median)} ({_short(spread.low)}–{_short(spread.high)})"


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _times(summary: Summary, measure: str, load: str) -> list[str]:
    figures = _ASYNC if measure == "async" else SYNC
    rows = [
        f"## `{load}`, {_TITLES[measure]}",
        "",
        "| | system | seconds | GiB/s | of best | of limit |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    peers = summary.peers(measure, load)
    for figure, title in figures.items():
        for peer in peers:
            alike = [p for p in peers if kind_of_staging(p) == kind_of_staging(peer)]
            among = alike if figure.startswith("blocked") else peers
            best = summary.best_peer(measure, load, figure, among=among)
            key = f"{measure}/{load}/{peer}"
            spread = summary.spread(key, figure)
            size = summary.median(key, "size_bytes")
            if spread is None or size is None:
                continue
            if figure == "restore_cold_seconds" and not _was_cold(summary, key):
                rows.append(f"| {title} | {_name(peer)} | the cache was not dropped | | | |")
                continue
            limit = limit_seconds(summary, figure, size)
            cells = [
                title,
                _name(peer),
                _seconds(spread),
                f"{size / spread.median / GIB:.3g}",
                f"{best[1] / spread.median:.2f}x" if best else "",
                f"{limit / spread.median:.2f}x" if limit else "",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


def _was_cold(summary: Summary, key: str) -> bool:
    return (summary.median(key, "cold_resident") or 0) <= _MAX_RESIDENT


def _name(peer: str) -> str:
    return f"**{peer}**" if is_ours(peer) else peer


def _resources(summary: Summary, measure: str, load: str) -> list[str]:
    peaks = _RESOURCES[measure]
    head = ["system", *peaks.values(), "CPU, save", "on disk", "files"]
    if measure == "async":
        head += ["new on disk, 3rd save", "fence, 3rd save"]
    rows = [f"| {' | '.join(head)} |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for peer in summary.peers(measure, load):
        found = summary.spreads[f"{measure}/{load}/{peer}"]
        size = found["size_bytes"].median
        cells = [_name(peer)]
        for figure in peaks:
            spread = found.get(figure)
            cells.append("" if spread is None else f"{spread.median / size:.2f}x")
        cells += [
            f"{found[_CPU[measure]].median:.2f} s",
            f"{found['disk_bytes'].median / size:.3f}x",
            f"{found['num_files'].median:.0f}",
        ]
        if measure == "async":
            new = found["new_disk_bytes"].median / size
            cells += [f"{new:.3f}x", _short(found["fence_3_seconds"].median)]
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


def _limits(summary: Summary) -> list[str]:
    figures = summary.spreads.get("limits")
    if figures is None:
        return []
    size = figures["size_bytes"].median
    rows = [
        "## Limits of the machine",
        "",
        f"{size / MIB:.0f} MiB; into warm memory, written and synced, read.",
        "",
        "| threads or files | seconds | GiB/s |",
        "| --- | --- | ---: |",
    ]
    for name, spread in figures.items():
        if name.endswith("_seconds"):
            words = name.removesuffix("_seconds").replace("_", " ")
            rows.append(f"| {words} | {_seconds(spread)} | {size / spread.median / GIB:.3g} |")
    return [*rows, ""]


def _latency(summary: Summary) -> list[str]:
    figures = {
        name: spread
        for key in ("latency", "tier")
        for name, spread in (summary.spreads.get(key) or {}).items()
        if name.endswith("_seconds")
    }
    if not figures:
        return []
    rows = ["## Small costs", "", "| | seconds |", "| --- | --- |"]
    for name, spread in figures.items():
        words = name.removesuffix("_seconds").replace("_", " ")
        rows.append(
            f"| {words} | {spread.median * 1e6:.3g} µs ({spread.low * 1e6:.3g}–"
            f"{spread.high * 1e6:.3g}) |"
        )
    return [*rows, ""]


def figures_table(summary: Summary, key: str, title: str) -> Iterator[str]:
    """Every figure of a measurement: of the loops on one thread, or of a GPU."""
    found = summary.spreads.get(key)
    if found is None:
        return
    yield from (f"## {title}", "", "| | | | over |", "| --- | --- | ---: | --- |")
    for name, spread in found.items():
        ratio = " | "
        base = _BASES.get(name, "")
        if base in found:
            words = base.removesuffix("_seconds").replace("_", " ")
            ratio = f"{spread.median / found[base].median:.3f}x | {words}"
        value = _seconds(spread) if name.endswith("_seconds") else f"{spread.median:.0f}"
        yield f"| {name.removesuffix('_seconds').replace('_', ' ')} | {value} | {ratio} |"
    yield ""


def _reasons(summary: Summary) -> list[str]:
    if not summary.reasons:
        return []
    rows = ["## Not measured", "", "| | why |", "| --- | --- |"]
    for key, reason in summary.reasons.items():
        words = " ".join(reason.split()).replace("|", "\\|")
        rows.append(f"| {key} | {words[:300]} |")
    return [*rows, ""]
