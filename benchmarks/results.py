"""The measurements: one record per child process, in one JSON file that grows with the run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Result", "Run", "Task", "load", "store"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One measurement: measure, workload, system."""

    measure: str
    workload: str = "-"
    peer: str = "-"

    @property
    def key(self) -> str:
        """How it is named in tables and messages."""
        return "/".join(part for part in (self.measure, self.workload, self.peer) if part != "-")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a task, the n-th time; one of figures, skipped and error is set."""

    task: Task
    repeat: int
    wall_seconds: float
    figures: Mapping[str, Any] | None = None
    skipped: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.figures, self.skipped, self.error)) != 1:
            raise ValueError(f"{self.task.key} has not one of figures, skipped and error")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of the benchmark, possibly incomplete.

    Attributes:
        settings: Settings that must be equal to combine results: versions, machine, sizes.
        results: In the order in which they were measured.
    """

    settings: Mapping[str, Any]
    results: tuple[Result, ...] = ()

    def with_result(self, result: Result) -> Run:
        """The run with one more result, instead of an earlier failure of the same."""
        others = [
            each
            for each in self.results
            if (each.task, each.repeat) != (result.task, result.repeat)
        ]
        return dataclasses.replace(self, results=(*others, result))

    def has(self, task: Task, repeat: int) -> bool:
        """Whether this needs no more measuring; what failed is tried again."""
        return any(
            each.task == task and each.repeat == repeat and each.error is None
            for each in self.results
        )

    def is_skipped(self, task: Task) -> bool:
        """Whether it cannot be measured here; asking again would bring the same answer."""
        return any(each.task == task and each.skipped is not None for each in self.results)


def store(run: Run, path: Path) -> None:
    """Writes a run atomically; a concurrent reader sees the previous one."""
    lines = ",\n".join(json.dumps(_as_json(each)) for each in run.results)
    text = f'{{"settings": {json.dumps(dict(run.settings))},\n"results": [\n{lines}\n]}}\n'
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _as_json(result: Result) -> dict[str, Any]:
    """The values that are set, with seven digits: one file has hundreds of them."""
    found = {key: value for key, value in dataclasses.asdict(result).items() if value is not None}
    found["wall_seconds"] = round(result.wall_seconds, 1)
    if result.figures is not None:
        found["figures"] = {
            name: float(f"{value:.7g}") if isinstance(value, float) else value
            for name, value in result.figures.items()
        }
    return found


def load(path: Path) -> Run:
    """Reads a run written by `store`."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Run(
        settings=found["settings"],
        results=tuple(
            Result(**{**each, "task": Task(**each["task"])}) for each in found["results"]
        ),
    )
