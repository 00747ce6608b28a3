"""The bars that this project sets itself, each with the figure measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from benchmarks.schedule import BEFORE
from benchmarks.summary import MIB, OURS, Summary, kind_of_staging, limit_seconds

__all__ = ["Bar", "bars"]

_EAGER = f"{OURS}.eager"
_OVERLAPPED = f"{OURS}.overlapped"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        name: The measure.
        measured: The figure, or None where it was not measured.
        bound: The target.
        unit: Of both; `x` for ratios.
        at_most: Whether the figure must stay below the bound.
    """

    name: str
    measured: float | None
    bound: float
    unit: str = "x"
    at_most: bool = False

    @property
    def is_reached(self) -> bool | None:
        """Whether it is; None where it was not measured."""
        if self.measured is None:
            return None
        shown = round(self.measured, 2)  # the rounded value of the table counts
        return shown <= self.bound if self.at_most else shown >= self.bound


def bars(summary: Summary) -> list[Bar]:
    """Every bar, in the order of a user's experience."""
    return [
        *_blocked(summary),
        *_durable(summary),
        *_unchanged(summary),
        *_restored(summary),
        *_memory(summary),
        *_latency(summary),
    ]


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _blocked(summary: Summary) -> Iterator[Bar]:
    figure = "blocked_3_seconds"
    for load in ("big", "gpt2"):
        key = f"async/{load}/{_EAGER}"
        blocked = summary.median(key, figure)
        limit = limit_seconds(summary, figure, summary.median(key, "size_bytes") or 0)
        eager = [p for p in summary.peers("async", load) if kind_of_staging(p) == "eager"]
        best = summary.best_peer("async", load, figure, among=eager)
        yield Bar(
            name=f"`{load}`: blocked in the third save, eager, over a copy of the bytes",
            measured=_ratio(blocked, limit),
            bound=1.3,
            at_most=True,
        )
        yield Bar(
            name=f"`{load}`: the same over the best peer{_named(best)}",
            measured=_ratio(blocked, best and best[1]),
            bound=1.1,
            at_most=True,
        )
    overlapped = summary.median(f"async/big/{_OVERLAPPED}", figure)
    yield Bar(
        name="`big`: blocked in the third save, overlapped",
        measured=None if overlapped is None else overlapped * 1e3,
        bound=10,
        unit="ms",
        at_most=True,
    )
    slowdown = _ratio(
        summary.median("loop/big", "loop_overlapped_seconds"),
        summary.median("loop/big", "loop_other_seconds"),
    )
    yield Bar(
        name="a training loop that saves overlapped, slower than beside another writer",
        measured=None if slowdown is None else (slowdown - 1) * 100,
        bound=3,
        unit="%",
        at_most=True,
    )


def _named(best: tuple[str, float] | None) -> str:
    return f" ({best[0]})" if best else ""


def _against_best(
    summary: Summary, load: str, figure: str, bound: float, what: str
) -> Iterator[Bar]:
    best = summary.best_peer("sync", load, figure)
    yield Bar(
        name=f"`{load}`: {what}, speed over the best peer{_named(best)}",
        measured=_ratio(best and best[1], summary.median(f"sync/{load}/{OURS}", figure)),
        bound=bound,
    )


def _against_limit(
    summary: Summary, load: str, figure: str, bound: float, what: str, limit: str
) -> Iterator[Bar]:
    key = f"sync/{load}/{OURS}"
    seconds = limit_seconds(summary, figure, summary.median(key, "size_bytes") or 0)
    yield Bar(
        name=f"`{load}`: {what}, speed over {limit}",
        measured=_ratio(seconds, summary.median(key, figure)),
        bound=bound,
    )


def _durable(summary: Summary) -> Iterator[Bar]:
    figure = "save_durable_seconds"
    for load in ("big", "small", "gpt2"):
        yield from _against_best(summary, load, figure, 1.4, "durable save")
        limit = "the best raw durable write"
        yield from _against_limit(summary, load, figure, 0.85, "durable save", limit)
        yield Bar(
            name=f"`{load}`: durable save, speed over the earlier version",
            measured=_ratio(
                summary.median(f"sync/{load}/{BEFORE}", figure),
                summary.median(f"sync/{load}/{OURS}", figure),
            ),
            bound=0.97,
        )
    for load in ("big-16", "gpt2-16", "tiny-16"):
        yield from _against_best(summary, load, figure, 1.2, "durable save")
    ours = summary.median(f"sync/tiny/{OURS}", figure)
    for peer, bound in (("safetensors", 1.0), ("dcp", 5.0), ("orbax", 5.0)):
        yield Bar(
            name=f"`tiny`: durable save, speed over {peer}",
            measured=_ratio(summary.median(f"sync/tiny/{peer}", figure), ours),
            bound=bound,
        )


def _unchanged(summary: Summary) -> Iterator[Bar]:
    key = f"async/frozen/{_EAGER}"
    yield Bar(
        name="`frozen`: bytes written, over the bytes that changed",
        measured=_ratio(
            summary.median(key, "new_disk_bytes"), summary.median(key, "changed_bytes")
        ),
        bound=1.1,
        at_most=True,
    )
    yield Bar(
        name="`frozen`: background time, over that of `gpt2`, which is all changed",
        measured=_ratio(
            _background_seconds(summary, key), _background_seconds(summary, f"async/gpt2/{_EAGER}")
        ),
        bound=0.2,
        at_most=True,
    )


def _background_seconds(summary: Summary, key: str) -> float | None:
    durable = summary.median(key, "durable_3_seconds")
    blocked = summary.median(key, "blocked_3_seconds")
    return None if durable is None or blocked is None else durable - blocked


def _restored(summary: Summary) -> Iterator[Bar]:
    warm, cold = "restore_warm_seconds", "restore_cold_seconds"
    what = "restore in place, warm"
    yield from _against_limit(summary, "big", warm, 0.7, what, "a copy of the bytes")
    for load, bound in (("big", 0.85), ("small", 1.0), ("tiny", 0.9)):
        yield from _against_best(summary, load, warm, bound, f"{what}, verified")
    for load in ("big", "small", "tiny"):
        unverified = "restore_unverified_seconds"
        yield from _against_best(summary, load, unverified, 1.0, f"{what}, unverified")
    for load in ("big", "small", "tiny"):
        new = "restore_new_seconds"
        yield from _against_best(summary, load, new, 1.0, "restore into new memory, warm")
    for load in ("big", "small", "gpt2"):
        limit = "the best raw cold read"
        yield from _against_limit(summary, load, cold, 0.9, "restore in place, cold", limit)


def _memory(summary: Summary) -> Iterator[Bar]:
    def mib(name: str, key: str, figure: str, bound: float) -> Bar:
        found = summary.median(key, figure)
        measured = None if found is None else found / MIB
        return Bar(name=name, measured=measured, bound=bound, unit="MiB", at_most=True)

    for load in ("big", "small", "gpt2"):
        key = f"sync/{load}/{OURS}"
        yield mib(f"`{load}`: memory of a synchronous save", key, "save_peak_bytes", 64)
        name = f"`{load}`: memory of a restore in place"
        yield mib(name, key, "restore_warm_peak_bytes", 64)
    for load in ("big", "gpt2"):
        key = f"async/{load}/{_EAGER}"
        peak = _ratio(summary.median(key, "peak_bytes"), summary.median(key, "size_bytes"))
        yield Bar(
            name=f"`{load}`: memory of asynchronous saves over the state",
            measured=peak,
            bound=1.0,
            at_most=True,
        )
        grown = _ratio(summary.median(key, "growth_bytes"), summary.median(key, "size_bytes"))
        yield Bar(
            name=f"`{load}`: its growth after the first save, over the state",
            measured=grown,
            bound=0.0,
            at_most=True,
        )


def _latency(summary: Summary) -> Iterator[Bar]:
    for name, figure, factor, bound, unit in (
        ("a tiny save of the manager and its commit", "tiny_save_committed_seconds", 1e3, 10, "ms"),
        ("a save refused by its policy", "refused_save_seconds", 1e6, 20, "µs"),
    ):
        found = summary.median("latency", figure)
        measured = None if found is None else found * factor
        yield Bar(name=name, measured=measured, bound=bound, unit=unit, at_most=True)
    yield Bar(
        name="a save beside a tier of 10 MB/s, against one without a tier",
        measured=_ratio(
            summary.median("tier", "save_of_32_mib_with_slow_tier_seconds"),
            summary.median("tier", "save_of_32_mib_seconds"),
        ),
        bound=1.1,
        unit="x",
        at_most=True,
    )
