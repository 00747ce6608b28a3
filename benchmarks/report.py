"""The measurements as Markdown: medians, spread, ratios to the best peer and to the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["markdown"]

_COLUMNS = {
    "save_durable_seconds": "durable save",
    "restore_warm_seconds": "restore, warm",
    "restore_cold_seconds": "restore, cold",
}
_OURS = "functional_ckpt"


def markdown(summary: Mapping[str, Any]) -> str:
    """The whole report."""
    medians = summary["medians"]
    size = "an eighth of the data" if summary["quick"] else "full size"
    lines = [
        "# Measurements",
        "",
        f"{summary['machine']}; {size}; medians of {summary['rounds']} rounds, each in a process "
        "of its own, peers interleaved. Every save is synced, files and directories, before the "
        "clock stops. GiB/s, with the slowest and fastest round in brackets. Gaps under a quarter "
        "are ties here.",
        "",
    ]
    lines += _limits(medians["limits"])
    loads = sorted({name.partition("/")[0] for name in medians if "/" in name})
    for load in loads:
        lines += _workload(load, medians)
    lines += _latency(medians["latency"])
    return "\n".join(lines) + "\n"


def _rate(size_bytes: float, seconds: float) -> float:
    return size_bytes / seconds / 2**30


def _best(medians: Mapping[str, Any], peers: Sequence[str], key: str) -> float:
    return min(medians[peer][key]["median"] for peer in peers)


def _limits(limits: Mapping[str, Any]) -> list[str]:
    size = limits["size_bytes"]["median"]
    rows = ["## What the machine can do", "", "| | GiB/s |", "| --- | --- |"]
    for key in limits:
        if key.endswith("_seconds"):
            name = key.removesuffix("_seconds").replace("_", " ")
            rows.append(f"| {name} | {_rate(size, limits[key]['median']):.2f} |")
    return [*rows, ""]


def _workload(load: str, medians: Mapping[str, Any]) -> list[str]:
    names = [n for n in medians if n.startswith(f"{load}/") and not n.endswith("/blocked")]
    rows = [
        f"## {load}",
        "",
        "| system | " + " | ".join(_COLUMNS.values()) + " | peak memory, save | files |",
        "| --- " * (len(_COLUMNS) + 3) + "|",
    ]
    for name in names:
        figures = medians[name]
        size = figures["size_bytes"]["median"]
        cells = [
            f"{_rate(size, figures[key]['median']):.2f} ({_rate(size, figures[key]['max']):.2f}-"
            f"{_rate(size, figures[key]['min']):.2f})"
            for key in _COLUMNS
        ]
        peak = figures["save_peak_bytes"]["median"] / 2**20
        files = int(figures["num_files"]["median"])
        rows.append(
            f"| {name.partition('/')[2]} | {' | '.join(cells)} | {peak:.0f} MiB | {files} |"
        )
    peers = [name for name in names if not name.endswith(_OURS)]
    if peers and f"{load}/{_OURS}" in medians:
        cells = [
            f"{_best(medians, peers, key) / medians[f'{load}/{_OURS}'][key]['median']:.2f}x"
            for key in _COLUMNS
        ]
        rows.append(f"| ours against the best peer | {' | '.join(cells)} | | |")
    blocked = medians.get(f"{load}/blocked")
    if blocked:
        size = blocked["size_bytes"]["median"]
        copy = medians["limits"]
        ideal = copy["memcpy_2_threads_seconds"]["median"] * size / copy["size_bytes"]["median"]
        third = blocked["blocked_3_seconds"]["median"]
        rows += [
            "",
            f"An asynchronous save blocks {blocked['blocked_1_seconds']['median']:.3f} s the "
            f"first time and {third:.3f} s the third, {third / ideal:.2f}x a two-thread "
            "copy of the bytes.",
        ]
    return [*rows, ""]


def _latency(latency: Mapping[str, Any]) -> list[str]:
    refused = latency["refused_save_seconds"]["median"] * 1e6
    tiny = latency["tiny_save_committed_seconds"]["median"] * 1e3
    return [
        "## Small costs",
        "",
        "| | median | bar |",
        "| --- | --- | --- |",
        f"| `manager.save` refused by its policy | {refused:.1f} µs | 20 µs |",
        f"| tiny `manager.save` until it is durable | {tiny:.1f} ms | 10 ms |",
        "",
    ]
