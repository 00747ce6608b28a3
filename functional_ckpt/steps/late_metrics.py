"""Late metrics, recorded after their step was committed: each call writes a file of its own."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

from functional_ckpt import errors
from functional_ckpt.core.records import records
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps.history import commit_of
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.commit import HIDDEN, makedirs_durable, protocol

_METRICS = "metrics"

_Commit: TypeAlias = tuple[int, int]
"""A step, and the time of its commit in microseconds since the epoch."""


class _Late(NamedTuple):
    """The late metrics of one file, or of one commit of a step.

    Attributes:
        metrics: The undamaged metrics.
        problem: The reason why some cannot be used, or None.
        is_unreadable: Whether the system refused to read some.
        time_ns: The time of the recording.
    """

    metrics: Mapping[str, Any]
    problem: str | None = None
    is_unreadable: bool = False
    time_ns: int = 0


class _File(NamedTuple):
    """A file that was read. `state` changes with its content."""

    state: object
    commit: _Commit
    late: _Late


_NONE = _Late({})


class LateMetrics:
    """The late metrics of the steps in a directory, by any process; each file is read once.

    Each call that records metrics writes `<step>.<commit>.<id>.json`. If several files have a
    metric, the latest counts. Earlier versions replaced `<step>.<commit>.json`, without a checksum.

    A file with an id never changes, so its name identifies its content. The content of another
    file is identified by name and status: time, size, inode, and on a store the version. Files
    that are damaged or cannot be read are read again at each look. Files that are gone are
    forgotten. Safe to use from several threads.
    """

    def __init__(self, storage: Storage, root: str) -> None:
        self._storage = storage
        self._root = root
        self._folder = os.path.join(root, HIDDEN, _METRICS)
        self._mutex = threading.Lock()
        self._files: dict[str, _File] = {}
        self._commits: dict[_Commit, Mapping[str, _Late]] = {}  # and by name of the file

    def look(self, step: int | None = None, *, reread: bool = False) -> set[int]:
        """Lists the files and reads those that are new; returns the steps whose metrics changed.

        Args:
            step: Only read the metrics of this step; None for all.
            reread: Whether to read known files again.
        """
        with self._mutex:
            start = "" if step is None else f"{step}."
            known = {name: file for name, file in self._files.items() if name.startswith(start)}
            states = {
                name: state
                for name, state in self._listed()
                if name.startswith(start) and (name in known or _is_late(name))
            }
            kept = {
                name
                for name, file in known.items()
                if not reread
                and name in states
                and states[name] == file.state
                and file.late.problem is None
            }
            read: dict[str, _File] = {}

            def add(name: str) -> None:
                if (late := self._read(name)) is not None:
                    number, commit = map(int, name.split(".")[:2])
                    read[name] = _File(states[name], (number, commit), late)

            tasks = [functools.partial(add, name) for name in states if name not in kept]
            queries.run_requests(self._storage, tasks)
            gone = known.keys() - kept - read.keys()
            for name in gone:
                self._forget(name)
            for name, file in read.items():
                self._add(name, file)
            return {file.commit[0] for file in (*read.values(), *(known[n] for n in gone))}

    def _add(self, name: str, file: _File) -> None:
        self._commits[file.commit] = {**self._commits.get(file.commit, {}), name: file.late}
        self._files[name] = file  # last: a file that is here is not read again

    def _forget(self, name: str) -> None:
        if (file := self._files.pop(name, None)) is None:
            return
        left = {each: late for each, late in self._commits[file.commit].items() if each != name}
        if left:
            self._commits[file.commit] = left
        else:
            del self._commits[file.commit]

    def _listed(self) -> list[tuple[str, object]]:
        """Returns the names of the files, each with a value that changes with its content."""
        storage, folder = self._storage, self._folder
        if storage.objects is not None:  # one request lists the states too
            return [*storage.walk(folder).items()]
        return [
            (name, None if name.count(".") == 3 else storage.stat(os.path.join(folder, name)))
            for name in storage.list(folder)
        ]

    def _read(self, name: str) -> _Late | None:
        """Returns the content of a file; None if it has been removed."""
        path = os.path.join(self._folder, name)
        try:
            data = queries.read_optional(self._storage, path)
            return None if data is None else _parse(data, path)
        except (errors.CorruptCheckpointError, errors.StorageError) as error:
            return _Late({}, error.message, isinstance(error, errors.StorageError))

    def _found(self, info: StepInfo) -> _Late | None:
        """Returns the late metrics of a step, the latest of each name; None if there are none."""
        files = self._commits.get((info.step, commit_of(info))) if self._commits else None
        if not files:
            return None
        metrics: dict[str, Any] = {}
        for late in sorted(files.values(), key=lambda each: each.time_ns):
            metrics |= late.metrics
        first = next((late for late in files.values() if late.problem), _NONE)
        return _Late(metrics, first.problem, first.is_unreadable)

    def added_to(self, info: StepInfo) -> StepInfo:
        """Returns a step with the late metrics of its current commit, as last read."""
        found = self._found(info)
        if found is None:
            return info
        metrics = {**(info.metrics or {}), **found.metrics}
        info = dataclasses.replace(info, metrics=metrics or info.metrics)
        if info.problem is not None:
            return info
        return dataclasses.replace(info, problem=found.problem, is_unreadable=found.is_unreadable)

    def of(self, info: StepInfo, path: str) -> Mapping[str, Any]:
        """Returns the late metrics of a step as last read; raises if some are damaged."""
        found = self._found(info) or _NONE
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

    def record(self, info: StepInfo, metrics: Mapping[str, Any]) -> None:
        """Writes metrics of a step, atomically and durably.

        Concurrent processes lose nothing: each writes a new file.
        """
        makedirs_durable(self._storage, self._folder)
        commit = (info.step, commit_of(info))
        name = f"{commit[0]}.{commit[1]}.{uuid.uuid4().hex}.json"
        path = os.path.join(self._folder, name)
        record = {
            "format": "functional_ckpt",
            "version": 1,
            "time_ns": time.time_ns(),
            "metrics": dict(metrics),
        }
        data = records.with_checksum(record, allow_nan=True)
        protocol(self._storage, self._root).replace(path, data)
        with self._mutex:
            self._add(name, _File(None, commit, _parse(data, path)))

    def remove(self, steps: Collection[int], *, but_of: StepInfo | None = None) -> None:
        """Removes the late metrics of removed steps, or those of all commits but one."""
        kept = None if but_of is None else f"{but_of.step}.{commit_of(but_of)}."
        starts = {str(step) for step in steps}
        failures: list[errors.CheckpointError] = []

        def remove(name: str) -> None:
            try:
                self._storage.remove(os.path.join(self._folder, name))
                with self._mutex:
                    self._forget(name)
            except errors.CheckpointError as error:
                failures.append(error)

        tasks = [
            functools.partial(remove, name)
            for name in self._storage.list(self._folder)
            if name.endswith(".json")
            and name.partition(".")[0] in starts
            and not (kept is not None and name.startswith(kept))
        ]
        queries.run_requests(self._storage, tasks)
        if failures:
            raise failures[0]


def _is_late(name: str) -> bool:
    """Returns whether a name is that of a file of late metrics."""
    parts = name.split(".")
    return (
        len(parts) in (3, 4)
        and parts[-1] == "json"
        and all(text.isascii() and text.isdigit() for text in parts[:2])
    )


def _parse(data: bytes, path: str) -> _Late:
    if path.rpartition("/")[2].count(".") == 2:  # of an earlier version
        return _Late(records.parse_object(data, path))
    record = records.verify_checksum(data, path)
    metrics, recorded_ns = record.get("metrics"), record.get("time_ns")
    if not isinstance(metrics, dict) or type(recorded_ns) is not int:
        raise errors.CorruptCheckpointError(f"{path}: not recorded metrics.", path=path)
    return _Late(cast("dict[str, Any]", metrics), time_ns=recorded_ns)
