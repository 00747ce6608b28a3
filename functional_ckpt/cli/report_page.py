"""The report of a run as one HTML page: no script, no request, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from functional_ckpt.cli import output
from functional_ckpt.cli import report_plots as plots
from functional_ckpt.cli.report_record import (
    Comparison,
    LayerChange,
    ModuleSize,
    ReportStep,
    RunReport,
)
from functional_ckpt.cli.report_style import CSS
from functional_ckpt.steps.plot import Series

_MAX_ROWS, _MAX_COLUMNS, _MAX_LAYERS = 500, 12, 20
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_LEGEND = (
    '<p class="legend"><span><i>●</i>kept</span><span><i>○</i>removed</span>'
    '<span><i class="best">★</i>best</span><span><i class="latest">◯</i>latest</span></p>'
)


def page(report: RunReport) -> str:
    """Returns the page."""
    body = "".join(
        [
            _head(report),
            _plots("Metrics", plots.series_of_metrics(report), 0, _LEGEND),
            _plots("Saves", plots.series_of_costs(report), 1000),
            _steps(report),
            _modules(report),
            _changes(report),
            "" if report.comparison is None else _comparison(report.comparison),
        ]
    )
    title = escape(f"Run {_name(report.path)}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{CSS}</style></head>'
        f"<body><main>{body}<footer>fckpt report, {output.utc(report.time)}</footer></main>"
        "</body></html>\n"
    )


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path


def _head(report: RunReport) -> str:
    kept = [step for step in report.steps if step.is_kept]
    damaged = [step for step in kept if step.health == "damaged"]
    facts = [
        ("steps", str(len(kept))),
        ("removed", str(len(report.steps) - len(kept))),
        ("latest", "none" if report.latest is None else str(report.latest)),
        ("on disk", output.size(sum(step.size_bytes or 0 for step in kept))),
        ("damaged", str(len(damaged))),
        ("uploading", str(sum(step.is_uploading for step in kept))),
    ]
    cells = "".join(
        f'<div><span class="dim">{name}</span><b>{escape(v)}</b></div>' for name, v in facts
    )
    policies = ", ".join(f"<code>{escape(each)}</code>" for each in report.policies)
    lines = [f'<p class="dim">Kept by {policies}.</p>'] if policies else []
    lines += [
        f'<p class="readable">Being written, or left by a crash: <code>{escape(name)}</code></p>'
        for name in report.unfinished
    ]
    path, name = escape(report.path), escape(_name(report.path))
    return (
        f'<h1>{name}</h1><p class="dim"><code>{path}</code></p>'
        f"{''.join(lines)}<div class='facts'>{cells}</div>"
    )


def _plots(title: str, every: Sequence[Series], start: int, legend: str = "") -> str:
    shown = [series for series in every if series.values]
    if not shown:
        return ""
    cards = "".join(
        f'<div class="card">{plots.svg(series, start + number)}</div>'
        for number, series in enumerate(shown)
    )
    return f'<h2>{title}</h2>{legend}<div class="plots">{cards}</div>'


# ------------------------------------------------------------------------------------ steps


def _steps(report: RunReport) -> str:
    metrics = report.metrics[:_MAX_COLUMNS]
    head = _cells("th", [("n", "step"), ("", ""), ("why", "why it stays")])
    head += _cells("th", [("", "saved, UTC"), ("n", "size"), ("n", "seconds")])
    head += _cells("th", [("n", escape(name)) for name in metrics])
    rows = "".join(_step(report, step, metrics) for step in report.steps[::-1][:_MAX_ROWS])
    hidden = len(report.steps) - _MAX_ROWS
    more = f'<p class="dim">and {hidden} earlier steps</p>' if hidden > 0 else ""
    if not report.steps:
        return "<p>There is no step yet.</p>"
    table = f"<table><tr>{head}</tr>{rows}</table>"
    return f'<h2>Steps</h2><div class="card wide high">{table}</div>{more}'


def _step(report: RunReport, step: ReportStep, metrics: Iterable[str]) -> str:
    why = escape(", ".join(step.reasons))
    if step.problem:
        why += f' <span class="damaged">{escape(step.problem)}</span>'
    cells = [
        ("n", f"<b>{step.step}</b>"),
        ("", " ".join(_badges(report, step))),
        ("why", why),
        ("", step.time.strftime("%Y-%m-%d %H:%M:%S")),
        ("n", "" if step.size_bytes is None else output.size(step.size_bytes)),
        ("n", "" if step.seconds is None else output.number(step.seconds)),
    ]
    for name in metrics:
        value = step.metrics.get(name)
        star = ' <span class="star">★</span>' if report.best.get(name) == step.step else ""
        cells.append(("n", "" if value is None else output.number(value) + star))
    kind = "" if step.is_kept else ' class="gone"'
    return f"<tr{kind}>{_cells('td', cells)}</tr>"


def _cells(tag: str, cells: Iterable[tuple[str, str]]) -> str:
    return "".join(
        f'<{tag} class="{kind}">{text}</{tag}>' if kind else f"<{tag}>{text}</{tag}>"
        for kind, text in cells
    )


def _badges(report: RunReport, step: ReportStep) -> Iterator[str]:
    words = ["latest"] if step.step == report.latest else []
    words += [step.health] if step.health is not None else ["removed"]
    words += ["uploading"] if step.is_uploading else []
    words += ["abandoned"] if step.is_abandoned else []
    for word in words:
        yield f'<span class="badge {word.split()[0]}">{word}</span>'


# ------------------------------------------------------------------------------------ the latest


def _modules(report: RunReport) -> str:
    total = sum(each.size_bytes for each in report.modules)
    if not total:
        return ""
    rows = "".join(_module(each, total, depth=0) for each in report.modules)
    return f'<h2>Size of step {report.latest} by module</h2><div class="card tree">{rows}</div>'


def _module(module: ModuleSize, total: int, depth: int) -> str:
    arrays = f"{module.num_arrays} array{'' if module.num_arrays == 1 else 's'}"
    row = (
        f'<code title="{escape(module.name)}, {arrays}">{escape(module.name)}</code>'
        f'<span class="n">{output.size(module.size_bytes)}</span>{_bar(module.size_bytes / total)}'
    )
    if not module.children:
        return f'<div class="row leaf">{row}</div>'
    children = "".join(_module(each, total, depth + 1) for each in module.children)
    is_open = " open" if depth == 0 else ""
    return f'<details{is_open}><summary class="row">{row}</summary><div>{children}</div></details>'


def _bar(share: float) -> str:
    return f'<div><div class="bar" style="width:{100 * min(1.0, share):.2f}%"></div></div>'


def _changes(report: RunReport) -> str:
    if not report.changes:
        return ""
    rows = "".join(
        f"<tr><td class='n'>{each.before} → <b>{each.after}</b></td>"
        f"<td class='text'><code>{escape(each.name)}</code></td>"
        f"<td class='text'>{escape(each.old)}</td><td class='text'>{escape(each.new)}</td></tr>"
        for each in report.changes
    )
    head = _cells("th", [("n", "steps"), ("", "value"), ("", "before"), ("", "after")])
    table = f"<table><tr>{head}</tr>{rows}</table>"
    return f'<h2>Changes of the configuration</h2><div class="card wide">{table}</div>'


# ------------------------------------------------------------------------------------ two steps


def _comparison(comparison: Comparison) -> str:
    parts = [
        f"<h2>Relative change from step {comparison.before} to step {comparison.after}</h2>"
        '<p class="dim">‖after − before‖ / ‖before‖ of each array; the bars are logarithmic. '
        f"Equal arrays: {comparison.num_equal}.</p>"
    ]
    for item, changes in comparison.changes.items():
        found = [each.relative for each in changes if each.relative]
        scale = (math.log10(min(found)), math.log10(max(found))) if found else (0.0, 0.0)
        rows = "".join(_layer(each, scale) for each in changes[:_MAX_LAYERS])
        hidden = len(changes) - _MAX_LAYERS
        more = f'<p class="dim">and {hidden} with smaller changes</p>' if hidden > 0 else ""
        title = f"<h3>{escape(item)}</h3>"
        parts.append(f'<div class="card tree layers">{title}{rows}{more}</div>')
    return "".join(parts)


def _layer(change: LayerChange, scale: tuple[float, float]) -> str:
    if change.relative is None:
        text, share = "other", 0.0
    else:
        low, high = scale
        size = math.log10(change.relative) if change.relative else low
        share = 1.0 if high == low else 0.03 + 0.97 * (size - low) / (high - low)
        text = output.number(change.relative)
    name = escape(change.name)
    return (
        f'<div class="row"><code title="{name}">{name}</code><span class="n">{text}</span>'
        f"{_bar(share)}</div>"
    )
