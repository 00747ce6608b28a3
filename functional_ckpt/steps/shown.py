"""A manager as a line for logs and prompts, and as a table of its steps for notebooks.

Nothing is read from disk: the steps are those that the manager knows.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from functional_ckpt.policies import lines
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps.run_steps import Steps

_MAX_ROWS = 20


def line(steps: Steps, saving: int | None, *, is_over: bool) -> str:
    """Returns the `repr` of a manager.

    Args:
        steps: Its steps.
        saving: The step whose commit is in progress, if any.
        is_over: Whether it was closed, or belongs to another process.
    """
    facts = [repr(steps.root)]
    if is_over:
        facts.append("closed")
    else:
        infos = steps.all_infos()
        latest = lines.newest(infos)
        facts.append(f"{len(infos)} step{'' if len(infos) == 1 else 's'}")
        facts += [] if latest is None else [f"latest {latest.step}"]
        facts += [] if saving is None else [f"saving {saving}"]
        facts += ["read-only"] if steps.read_only else []
    return f"CheckpointManager({', '.join(facts)})"


def table(steps: Steps, saving: int | None, *, is_over: bool) -> str:
    """Returns a manager as HTML: its line and its last 20 steps; for the arguments see `line`."""
    caption = html.escape(line(steps, saving, is_over=is_over))
    infos = () if is_over else steps.all_infos()[-_MAX_ROWS:]
    if not infos:
        return f"<code>{caption}</code>"
    names = list(dict.fromkeys(name for info in infos for name in info.metrics or {}))
    latest = lines.newest(infos)
    rows = [_row("th", ["step", "", "saved", *names])]
    rows += [_row("td", _cells(info, names, is_latest=info is latest)) for info in infos]
    return f"<table><caption><code>{caption}</code></caption>{''.join(rows)}</table>"


def _cells(info: StepInfo, names: Sequence[str], *, is_latest: bool) -> list[str]:
    mark = "latest" if is_latest else "abandoned" if info.is_abandoned else ""
    values = [(info.metrics or {}).get(name, "") for name in names]
    texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    return [str(info.step), mark, info.time.strftime("%Y-%m-%d %H:%M:%S %Z"), *texts]


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
