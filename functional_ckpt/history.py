"""The steps in a directory: which there are, when they were saved, their metrics. No torch."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.core import orbax_format
from functional_ckpt.core.names import NameFormat
from functional_ckpt.core.policy import StepInfo
from functional_ckpt.storage.commit import HIDDEN
from functional_ckpt.storage.paths import LocalStorage

__all__ = ["late_metrics", "list_steps", "read_step", "scan", "write_late_metrics"]

_METRICS = "metrics"


def list_steps(storage: LocalStorage, root: str, names: NameFormat) -> dict[int, str]:
    """Step -> name of its directory, ascending; only committed steps have a step's name."""
    found: dict[int, str] = {}
    for name in storage.list(root):
        step = names.parse(name)
        if step is not None and storage.is_directory(os.path.join(root, name)):
            found.setdefault(step, name)
    return dict(sorted(found.items()))


def scan(storage: LocalStorage, root: str, names: NameFormat) -> list[StepInfo]:
    """The history of a directory, ascending."""
    late = late_metrics(storage, root)
    return [
        read_step(storage, os.path.join(root, name), step, late.get(step))
        for step, name in list_steps(storage, root, names).items()
    ]


def read_step(
    storage: LocalStorage, path: str, step: int, late: Mapping[str, Any] | None = None
) -> StepInfo:
    """What policies need to know of one step, from its small files; damaged ones are left out.

    The time is that of the commit; where no metadata says it, the directory's own.
    """
    metadata = _read_json(storage, os.path.join(path, orbax_format.CHECKPOINT_METADATA_FILE))
    metrics = _read_json(storage, os.path.join(path, _METRICS, "metrics"))
    nanoseconds = metadata.get("commit_timestamp_nsecs") if metadata else None
    if type(nanoseconds) is not int or not 0 <= nanoseconds < 2**62:
        nanoseconds = _directory_time_ns(path)
    time = datetime.datetime.fromtimestamp(nanoseconds / 1e9, datetime.UTC)
    if late is not None:
        metrics = {**(metrics or {}), **late}
    return StepInfo(step=step, time=time, metrics=metrics)


def _directory_time_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0  # removed by its writer while we looked


def _read_json(storage: LocalStorage, path: str) -> dict[str, Any] | None:
    try:
        record = json.loads(storage.read(path))
    except (errors.StorageError, ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", record) if isinstance(record, dict) else None


def late_metrics(storage: LocalStorage, root: str) -> dict[int, Mapping[str, Any]]:
    """Metrics recorded after their step was committed, by step."""
    folder = os.path.join(root, HIDDEN, _METRICS)
    found: dict[int, Mapping[str, Any]] = {}
    for name in storage.list(folder):
        stem, dot, ending = name.partition(".")
        if dot and ending == "json" and stem.isascii() and stem.isdigit():
            record = _read_json(storage, os.path.join(folder, name))
            if record is not None:
                found[int(stem)] = record
    return found


def write_late_metrics(
    storage: LocalStorage, root: str, step: int, metrics: Mapping[str, Any]
) -> None:
    """Writes a step's late metrics beside the steps, atomically and durably."""
    folder = os.path.join(root, HIDDEN, _METRICS)
    storage.make_directory(folder)
    storage.replace(os.path.join(folder, f"{step}.json"), json.dumps(dict(metrics)).encode())


def remove_late_metrics(storage: LocalStorage, root: str, step: int) -> None:
    """Forgets the late metrics of a step that is gone or was written anew."""
    storage.remove(os.path.join(root, HIDDEN, _METRICS, f"{step}.json"))


def finite_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics that are finite numbers, for tables."""
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield name, float(value)
