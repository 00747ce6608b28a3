"""Medians and spreads of a run, and their ratios to the best peer and to the machine's limit."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import Result, Run

__all__ = [
    "OURS",
    "Spread",
    "Summary",
    "UnequalWorkError",
    "is_ours",
    "kind_of_staging",
    "limit_seconds",
    "summarize",
]

OURS = "functional_ckpt"
MIB = 2**20
GIB = 2**30

# Figure -> the limits of which the fastest counts. A save into the page cache and a restore from
# it are a copy; only durable writes and cold reads wait for the disk.
_COPIES = ("memcpy_1_seconds", "memcpy_2_seconds")
_WRITES = (
    "write_buffered_1_seconds",
    "write_buffered_2_seconds",
    "write_direct_1_seconds",
    "write_direct_2_seconds",
)
_COLD_READS = ("read_cold_1_seconds", "read_cold_2_seconds")
LIMITS: Mapping[str, tuple[str, ...]] = {
    "save_seconds": _COPIES,
    "save_durable_seconds": _WRITES,
    "restore_warm_seconds": _COPIES,
    "restore_unverified_seconds": _COPIES,
    "restore_cold_seconds": _COLD_READS,
    "restore_new_seconds": _COPIES,
    "blocked_1_seconds": _COPIES,
    "blocked_3_seconds": _COPIES,
    "durable_3_seconds": _WRITES,
}


class UnequalWorkError(Exception):
    """Systems were given, or restored, different bytes: nothing can be compared."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over the repeats."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(
            median=statistics.median(values), low=min(values), high=max(values), count=len(values)
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run in figures.

    Attributes:
        settings: The run's.
        spreads: Key of the task -> figure -> its spread.
        reasons: Key of the task -> why it has no figures, or fewer.
    """

    settings: Mapping[str, Any]
    spreads: Mapping[str, Mapping[str, Spread]]
    reasons: Mapping[str, str]

    def spread(self, key: str, figure: str) -> Spread | None:
        """One figure, or None where it was not measured."""
        return self.spreads.get(key, {}).get(figure)

    def median(self, key: str, figure: str) -> float | None:
        """Its median, or None."""
        found = self.spread(key, figure)
        return None if found is None else found.median

    def peers(self, measure: str, workload: str) -> list[str]:
        """The systems that have figures, this library last."""
        prefix = f"{measure}/{workload}/"
        names = [key.removeprefix(prefix) for key in self.spreads if key.startswith(prefix)]
        return sorted(names, key=lambda name: (is_ours(name), names.index(name)))

    def best_peer(
        self, measure: str, workload: str, figure: str, *, among: Sequence[str] | None = None
    ) -> tuple[str, float] | None:
        """The fastest (or smallest) of the others, and its median."""
        names = among if among is not None else self.peers(measure, workload)
        found = [
            (value, name)
            for name in names
            if not is_ours(name)
            and (value := self.median(f"{measure}/{workload}/{name}", figure)) is not None
        ]
        return (min(found)[1], min(found)[0]) if found else None


def is_ours(peer: str) -> bool:
    """Whether a name is this project's, in any of its ways."""
    return peer.partition(".")[0] == OURS


def kind_of_staging(peer: str) -> str:
    """`overlapped` where `save` may return before the state is captured; else `eager`.

    A system that returns early leaves the waiting to a fence, so that only those of one kind are
    compared by blocked time.
    """
    return "overlapped" if peer.endswith(".overlapped") else "eager"


def summarize(run: Run) -> Summary:
    """Medians and spreads of every task.

    Raises:
        UnequalWorkError: Tasks of one workload saved or restored different bytes.
    """
    _check_equal_work(run.results)
    values: dict[str, dict[str, list[float]]] = {}
    reasons: dict[str, str] = {}
    for result in run.results:
        reason = result.error or result.skipped
        if reason is not None:
            reasons[result.task.key] = ("failed: " if result.error else "") + reason
        for name, value in (result.figures or {}).items():
            if isinstance(value, int | float):
                figures = values.setdefault(result.task.key, {})
                figures.setdefault(name, []).append(float(value))
    spreads = {
        key: {name: Spread.of(each) for name, each in figures.items()}
        for key, figures in values.items()
    }
    return Summary(settings=run.settings, spreads=spreads, reasons=reasons)


def _check_equal_work(results: Sequence[Result]) -> None:
    first: dict[tuple[str, str], Result] = {}
    for result in results:
        if result.figures is None or "digest" not in result.figures:
            continue
        other = first.setdefault((result.task.measure, result.task.workload), result)
        for name in ("digest", "size_bytes"):
            expected = (other.figures or {})[name]
            if result.figures[name] != expected:
                raise UnequalWorkError(
                    f"{result.task.key} has {name} {result.figures[name]}, {other.task.key} "
                    f"{expected}: they did not do the same work"
                )


def limit_seconds(summary: Summary, figure: str, size_bytes: float) -> float | None:
    """The machine's best time for as many bytes, by the run's own raw figures."""
    of_size = summary.median("limits", "size_bytes")
    found = [
        value
        for name in LIMITS.get(figure, ())
        if (value := summary.median("limits", name)) is not None
    ]
    return min(found) * size_bytes / of_size if found and of_size else None
