"""What a restore left out, and the one error that says so for all items."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from functional_ckpt import errors

__all__ = ["RestoreReport", "raise_report"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What a restore left out, as `item['key']` texts; all empty when checkpoint and target agree.

    Attributes:
        missing: Expected by the target, absent from the checkpoint; the target kept its own value.
        unexpected: In the checkpoint, without a place in the target; not read.
        mismatched: Different in kind, shape or dtype; the target kept its own value.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = {
            "missing from the checkpoint": self.missing,
            "not expected by the target": self.unexpected,
            "different": self.mismatched,
        }
        lines = [f"  {what}: {leaf}" for what, found in parts.items() for leaf in found]
        return "\n".join(lines) or "  everything matched"


def raise_report(reports: Mapping[str, RestoreReport], *, step: int | None, path: str) -> None:
    """Raises one `MismatchError` for everything that did not fit, in all items."""
    missing = [leaf for report in reports.values() for leaf in report.missing]
    unexpected = [leaf for report in reports.values() for leaf in report.unexpected]
    mismatched = [leaf for report in reports.values() for leaf in report.mismatched]
    if not (missing or unexpected or mismatched):
        return
    body = "\n".join(str(report) for report in reports.values() if report)
    where = "checkpoint" if step is None else f"step {step}"
    raise errors.MismatchError(
        f"Cannot restore {where} of {path} into the target; nothing was touched.\n"
        f"{_shorten(body)}\n"
        "Give a target that fits, choose leaves with only=, or pass strict=False to keep the "
        "target's own values for these.",
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
        step=step,
        path=path,
    )


def _shorten(text: str, num_lines: int = 200) -> str:
    lines: Sequence[str] = text.splitlines()
    if len(lines) <= num_lines:
        return text
    more = f"  ... and {len(lines) - num_lines} more (see the error's fields)"
    return "\n".join([*lines[:num_lines], more])
