"""Reads the small files of a step: its time, metrics and progress. Does not import torch."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from functional_ckpt import errors
from functional_ckpt.format.step_files import StepFiles
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

_T = TypeVar("_T")


def read_step(storage: Storage, path: str, step: int | None) -> StepInfo | None:
    """Reads a step's `StepInfo` for policies from its small files.

    Damaged or unreadable files are ignored; `problem` names them.

    Returns:
        The step; None if it was removed meanwhile.
    """
    for is_last in (False, False, True):
        problems: list[errors.CheckpointError] = []

        def attempt(
            read: Callable[[], _T], problems: list[errors.CheckpointError] = problems
        ) -> _T | None:
            try:
                return read()
            except (errors.CorruptCheckpointError, errors.StorageError) as error:
                problems.append(error)
                return None

        files = attempt(lambda: StepFiles.open(storage, path, step))
        info = _describe(storage, path, step or 0, files, attempt)
        if problems and not queries.is_directory(storage, path):
            return None
        # A step that is overwritten while it is read looks damaged.
        if not problems or is_last or files is None or not attempt(files.is_replaced):
            return _with_problem(info, problems[0]) if problems else info
    return None


def _with_problem(info: StepInfo, error: errors.CheckpointError) -> StepInfo:
    is_unreadable = isinstance(error, errors.StorageError)
    return dataclasses.replace(info, problem=error.message, is_unreadable=is_unreadable)


def read_sound_step(storage: Storage, path: str, step: int) -> StepInfo:
    """As `read_step`, but raises the step's problem."""
    if not queries.is_directory(storage, path):
        raise errors.StepNotFoundError(f"There is no step at {path}.", step=step, path=path)
    return sound_info(StepFiles.open(storage, path, step))


def sound_info(files: StepFiles) -> StepInfo:
    """Reads the small files of a checkpoint; raises their problems."""
    return _describe(files.storage, files.path, files.step or 0, files, lambda read: read())


class _Attempt(Protocol):
    """Calls functions; returns None and keeps the error if one fails."""

    def __call__(self, read: Callable[[], _T], /) -> _T | None: ...


def _describe(
    storage: Storage, path: str, step: int, files: StepFiles | None, attempt: _Attempt
) -> StepInfo:
    """Returns the step with the time of its commit; without metadata, the directory's time."""
    metadata = metrics = progress = None
    if files is not None:
        metadata = attempt(lambda: files.metadata)
        metrics = attempt(lambda: files.metrics)
        progress = attempt(lambda: files.progress)
    nanoseconds = (metadata or {}).get("commit_timestamp_nsecs")
    if type(nanoseconds) is not int or not 0 <= nanoseconds < 2**62:
        nanoseconds = attempt(lambda: queries.modified_ns(storage, path)) or 0
    record = None if files is None else files.record
    return StepInfo(
        step=step,
        time=commit_time(nanoseconds),
        metrics=metrics,
        progress=progress,
        generation=0 if record is None else record.generation,
        ancestors=() if record is None else record.ancestors,
    )


def commit_time(nanoseconds: int) -> datetime.datetime:
    """Returns the time of a commit, exact to the microsecond: late metrics refer to it."""
    return _EPOCH + datetime.timedelta(microseconds=commit_at(nanoseconds))


def commit_of(info: StepInfo) -> int:
    """Returns the identity of a commit of a step: its time, microseconds since the epoch."""
    return (info.time - _EPOCH) // datetime.timedelta(microseconds=1)


def commit_at(nanoseconds: int) -> int:
    """Returns the identity of the commit at a time, nanoseconds since the epoch."""
    return nanoseconds // 1000


def finite_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Returns the metrics that are finite numbers, for tables."""
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield name, float(value)
