"""The steps in a directory: which there are, when they were saved, their metrics. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

from functional_ckpt import errors
from functional_ckpt.core.records import orbax
from functional_ckpt.core.tree import plain_json
from functional_ckpt.format.checkpoint_dir import JSON_FILE, PROGRESS_ITEM
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.policies.progress import Progress
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.steps.names import NameFormat
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.commit import HIDDEN

__all__ = [
    "LateMetrics",
    "commit_time",
    "finite_metrics",
    "late_metrics",
    "list_steps",
    "read_step",
    "remove_late_metrics",
    "scan",
    "with_late_metrics",
    "write_late_metrics",
]

_METRICS = "metrics"
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

LateMetrics: TypeAlias = dict[tuple[int, int], Mapping[str, Any]]
"""By step and by the time of its commit in microseconds since the epoch."""


def list_steps(storage: Storage, root: str, names: NameFormat) -> dict[int, str]:
    """Step -> name of its directory, ascending; only committed steps have a step's name."""
    named = [(step, name) for name in storage.list(root) if (step := names.parse(name)) is not None]
    whole: set[str] = set()

    def look(name: str) -> None:
        if storage.is_committed(os.path.join(root, name)):
            whole.add(name)

    _run([functools.partial(look, name) for _, name in named], storage)
    found: dict[int, str] = {}
    for step, name in named:
        if name in whole:
            found.setdefault(step, name)
    return dict(sorted(found.items()))


def _run(tasks: Sequence[Callable[[], None]], storage: Storage) -> None:
    """Runs small requests, as many at a time as the store is made for."""
    run_in_threads(tasks, storage.num_requests)


def scan(storage: Storage, root: str, names: NameFormat) -> list[StepInfo]:
    """The history of a directory, ascending."""
    late = late_metrics(storage, root)
    found: dict[int, StepInfo] = {}

    def look(step: int, name: str) -> None:
        found[step] = with_late_metrics(read_step(storage, os.path.join(root, name), step), late)

    listed = list_steps(storage, root, names)
    _run([functools.partial(look, step, name) for step, name in listed.items()], storage)
    return [found[step] for step in listed]


def read_step(storage: Storage, path: str, step: int) -> StepInfo:
    """What policies need to know of one step, from its small files; damaged ones are left out.

    The time is that of the commit; where no metadata says it, the directory's own.
    """
    metadata = _read_json(storage, os.path.join(path, orbax.CHECKPOINT_METADATA_FILE))
    nanoseconds = metadata.get("commit_timestamp_nsecs") if metadata else None
    if type(nanoseconds) is not int or not 0 <= nanoseconds < 2**62:
        nanoseconds = storage.modified_ns(path)
    return StepInfo(
        step=step,
        time=commit_time(nanoseconds),
        metrics=_read_json(storage, os.path.join(path, _METRICS, "metrics")),
        progress=_read_progress(storage, path),
    )


def commit_time(nanoseconds: int) -> datetime.datetime:
    """The time of a commit, exact to the microsecond: late metrics know their commit by it."""
    return _EPOCH + datetime.timedelta(microseconds=nanoseconds // 1000)


def _read_progress(storage: Storage, path: str) -> Progress | None:
    record = _read_json(storage, os.path.join(path, PROGRESS_ITEM, JSON_FILE))
    with contextlib.suppress(errors.UsageError):
        return None if record is None else Progress.from_json(record)
    return None  # another program's item of this name


def _read_json(storage: Storage, path: str) -> dict[str, Any] | None:
    try:
        record = plain_json.parse(storage.read(path))
    except (errors.StorageError, ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", record) if isinstance(record, dict) else None


def late_metrics(storage: Storage, root: str) -> LateMetrics:
    """Metrics recorded after their step was committed, by step and commit."""
    folder = os.path.join(root, HIDDEN, _METRICS)
    found: LateMetrics = {}
    for name in storage.list(folder):
        step, _, rest = name.partition(".")
        commit, dot, ending = rest.partition(".")
        if dot and ending == "json" and all(x.isascii() and x.isdigit() for x in (step, commit)):
            record = _read_json(storage, os.path.join(folder, name))
            if record is not None:
                found[int(step), int(commit)] = record
    return found


def with_late_metrics(info: StepInfo, late: LateMetrics) -> StepInfo:
    """The step with what was recorded of it since; of another commit of its number, nothing."""
    found = late.get((info.step, _commit_of(info)))
    if found is None:
        return info
    return dataclasses.replace(info, metrics={**(info.metrics or {}), **found})


def write_late_metrics(
    storage: Storage, root: str, info: StepInfo, metrics: Mapping[str, Any]
) -> None:
    """Writes a step's late metrics beside the steps, atomically and durably."""
    folder = os.path.join(root, HIDDEN, _METRICS)
    storage.make_directory(folder)
    path = os.path.join(folder, f"{info.step}.{_commit_of(info)}.json")
    storage.replace(path, json.dumps(dict(metrics)).encode())


def remove_late_metrics(
    storage: Storage, root: str, step: int, *, but_of: StepInfo | None = None
) -> None:
    """Removes the late metrics of a step that is gone, or of every commit of it but one."""
    folder = os.path.join(root, HIDDEN, _METRICS)
    kept = None if but_of is None else f"{step}.{_commit_of(but_of)}.json"
    for name in storage.list(folder):
        if name.startswith(f"{step}.") and name.endswith(".json") and name != kept:
            storage.remove(os.path.join(folder, name))


def _commit_of(info: StepInfo) -> int:
    """What tells a commit from others of the same step: its time, microseconds since the epoch."""
    return (info.time - _EPOCH) // datetime.timedelta(microseconds=1)


def finite_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics that are finite numbers, for tables."""
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield name, float(value)
