"""A step's `StepInfo` as JSON, for the nodes that hold no part of the step."""

from __future__ import annotations

from typing import Any

from functional_ckpt.policies.base import StepInfo
from functional_ckpt.policies.progress import Progress
from functional_ckpt.steps import history


def encode(info: StepInfo) -> list[Any]:
    """Returns a step without its problem, as JSON."""
    progress = None if info.progress is None else info.progress.to_json()
    microseconds = history.commit_of(info)
    return [info.step, microseconds, info.metrics, progress, info.generation, info.ancestors]


def decode(record: list[Any]) -> StepInfo:
    """Returns the step of `encode`."""
    step, microseconds, metrics, progress, generation, ancestors = record
    return StepInfo(
        step=step,
        time=history.commit_time(1000 * microseconds),
        metrics=metrics,
        progress=None if progress is None else Progress.from_json(progress),
        generation=generation,
        ancestors=tuple((first, last) for first, last in ancestors),
    )
