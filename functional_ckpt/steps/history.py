"""The steps in a directory: which there are, when they were saved, their metrics. No torch."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

from functional_ckpt import errors
from functional_ckpt.core.records import records
from functional_ckpt.format.step_files import StepFiles
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.commit import HIDDEN, makedirs_durable, protocol

__all__ = [
    "Late",
    "LateMetrics",
    "commit_time",
    "finite_metrics",
    "late_metrics",
    "read_sound_step",
    "recorded",
    "read_step",
    "remove_late_metrics",
    "sound_info",
    "with_late_metrics",
    "write_late_metrics",
]

_METRICS = "metrics"
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

_T = TypeVar("_T")


class Late(NamedTuple):
    """The late metrics of one commit of a step.

    Attributes:
        metrics: Those that can be believed.
        problem: Why others cannot be; None where all can.
        is_unreadable: Whether the problem is that the system refused to read them.
    """

    metrics: Mapping[str, Any]
    problem: str | None = None
    is_unreadable: bool = False


LateMetrics: TypeAlias = dict[tuple[int, int], Late]
"""By step and by the time of its commit in microseconds since the epoch."""


def read_step(storage: Storage, path: str, step: int | None) -> StepInfo | None:
    """Reads a step's facts for policies from its small files.

    Damaged or unreadable files are ignored, and are the `problem` of the step.

    Returns:
        None where the step is not there any more.
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
    """Calls a function; None instead of its result where it failed."""

    def __call__(self, read: Callable[[], _T], /) -> _T | None: ...


def _describe(
    storage: Storage, path: str, step: int, files: StepFiles | None, attempt: _Attempt
) -> StepInfo:
    """The time is that of the commit; without metadata, the directory's own."""
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
    return _EPOCH + datetime.timedelta(microseconds=nanoseconds // 1000)


def late_metrics(storage: Storage, root: str) -> LateMetrics:
    """Metrics recorded after their step was committed, by step and commit.

    Each call that records metrics has made a file of its own, named
    `<step>.<commit>.<id>.json`; of several that name a metric the latest counts. Earlier versions
    kept `<step>.<commit>.json`, without a checksum.
    """
    folder = os.path.join(root, HIDDEN, _METRICS)
    found: dict[tuple[int, int], list[tuple[int, Late]]] = {}
    for name in storage.list(folder):
        parts = name.split(".")
        if len(parts) not in (3, 4) or parts[-1] != "json" or not _are_numbers(parts[:2]):
            continue
        recorded = _read_late(storage, os.path.join(folder, name), has_checksum=len(parts) == 4)
        if recorded is not None:
            found.setdefault((int(parts[0]), int(parts[1])), []).append(recorded)
    return {key: _merged(files) for key, files in found.items()}


def _are_numbers(texts: Sequence[str]) -> bool:
    return all(text.isascii() and text.isdigit() for text in texts)


def _read_late(storage: Storage, path: str, *, has_checksum: bool) -> tuple[int, Late] | None:
    """Time and values of recorded metrics; None if the file has been removed."""
    try:
        data = queries.read_optional(storage, path)
        if data is None:
            return None
        if not has_checksum:
            return 0, Late(records.parse_object(data, path))
        record = records.verify_checksum(data, path)
        metrics, recorded_ns = record.get("metrics"), record.get("time_ns")
        if not isinstance(metrics, dict) or type(recorded_ns) is not int:
            raise errors.CorruptCheckpointError(f"{path}: not recorded metrics.", path=path)
        return recorded_ns, Late(cast("dict[str, Any]", metrics))
    except (errors.CorruptCheckpointError, errors.StorageError) as error:
        return 0, Late({}, error.message, isinstance(error, errors.StorageError))


def _merged(files: Sequence[tuple[int, Late]]) -> Late:
    metrics: dict[str, Any] = {}
    for _, late in sorted(files, key=lambda each: each[0]):
        metrics |= late.metrics
    first = next((late for _, late in files if late.problem), Late({}))
    return Late(metrics, first.problem, first.is_unreadable)


def with_late_metrics(info: StepInfo, late: LateMetrics) -> StepInfo:
    """Returns the step with its late metrics, without those of another commit of its number."""
    found = late.get((info.step, _commit_of(info)))
    if found is None:
        return info
    metrics = {**(info.metrics or {}), **found.metrics}
    info = dataclasses.replace(info, metrics=metrics or info.metrics)
    if info.problem is not None:
        return info
    return dataclasses.replace(info, problem=found.problem, is_unreadable=found.is_unreadable)


def recorded(info: StepInfo, late: LateMetrics, path: str) -> Mapping[str, Any]:
    """Returns the late metrics of a step; raises if some are damaged."""
    found = late.get((info.step, _commit_of(info)), Late({}))
    if found.problem is not None and found.is_unreadable:
        raise errors.StorageError(found.problem, step=info.step, path=path)
    if found.problem is not None:
        raise errors.CorruptCheckpointError(
            f"{found.problem} It was recorded of step {info.step} after its commit: remove the "
            "file, and record the metrics again.",
            step=info.step,
            path=path,
        )
    return found.metrics


def write_late_metrics(
    storage: Storage, root: str, info: StepInfo, metrics: Mapping[str, Any]
) -> None:
    """Writes metrics of a step beside the steps, atomically and durably.

    Processes that do so at the same time lose nothing: each makes a new file.
    """
    folder = os.path.join(root, HIDDEN, _METRICS)
    makedirs_durable(storage, folder)
    name = f"{info.step}.{_commit_of(info)}.{uuid.uuid4().hex}.json"
    record = {
        "format": "functional_ckpt",
        "version": 1,
        "time_ns": time.time_ns(),
        "metrics": dict(metrics),
    }
    data = records.with_checksum(record, allow_nan=True)
    protocol(storage, root).replace(os.path.join(folder, name), data)


def remove_late_metrics(
    storage: Storage, root: str, step: int, *, but_of: StepInfo | None = None
) -> None:
    """Removes the late metrics of a step that is gone, or of every commit of it but one."""
    folder = os.path.join(root, HIDDEN, _METRICS)
    kept = None if but_of is None else f"{step}.{_commit_of(but_of)}."
    for name in storage.list(folder):
        if not name.startswith(f"{step}.") or not name.endswith(".json"):
            continue
        if kept is None or not name.startswith(kept):
            storage.remove(os.path.join(folder, name))


def _commit_of(info: StepInfo) -> int:
    """Returns the identity of a commit of a step: its time, microseconds since the epoch."""
    return (info.time - _EPOCH) // datetime.timedelta(microseconds=1)


def finite_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Returns the metrics that are finite numbers, for tables."""
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield name, float(value)
