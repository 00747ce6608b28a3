"""The record of steps promised to each tier, written beside the steps before any is pruned."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterable, Mapping
from typing import Any, TypeAlias

from functional_ckpt import errors
from functional_ckpt.core.records import records
from functional_ckpt.core.tree import plain_json
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.commit import CommitProtocol

FILE = "uploads.json"
_LISTS = ("promised", "considered", "replacing")
_Ordered: TypeAlias = dict[int, None]
"""Steps, each once, in the order in which they were added."""
_log = logging.getLogger("functional_ckpt")


class Promises:
    """By tier: its pending uploads, and the decisions about other steps.

    Not safe to use from several threads; `Uploads` has the mutex.

    Attributes:
        promised: Steps to upload to a tier; they stay in the first tier until then.
        decided: Steps for which a tier has decided, either way.
        replacing: Pending steps that may replace another commit of their number.
        was_damaged: Whether the record could not be read.
    """

    def __init__(self, commits: CommitProtocol, path: str, roots: Iterable[str]) -> None:
        self._commits = commits
        self._storage = commits.storage
        self._path = path
        self._roots = tuple(roots)
        self.promised: dict[str, _Ordered] = {root: {} for root in self._roots}
        self.decided: dict[str, _Ordered] = {root: {} for root in self._roots}
        self.replacing: dict[str, _Ordered] = {root: {} for root in self._roots}
        self.was_damaged = False

    def read(self) -> None:
        """Reads the record.

        Raises:
            StorageError: It exists and cannot be read now.
        """
        if not queries.exists(self._storage, self._path):
            return
        data = self._storage.read(self._path)
        try:
            record = _parse(data)
            found = [
                {
                    root: dict.fromkeys(int(step) for step in record[name].get(root, []))
                    for root in self._roots
                }
                for name in _LISTS
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self.was_damaged = True
            _log.warning(
                "%s cannot be read (%s: %s): recomputing which steps to upload to other tiers, "
                "including the doubtful ones",
                self._path,
                type(error).__name__,
                error,
            )
        else:
            self.promised, self.decided, self.replacing = found

    def write(self, steps: Iterable[int]) -> None:
        """Writes the record durably.

        Args:
            steps: The first tier's steps; decisions about other steps are dropped.
        """
        here = set(steps)
        for root in self._roots:
            _keep_only(self.decided[root], here)
            _keep_only(self.replacing[root], self.promised[root])
        record: dict[str, Any] = {
            name: {root: list(steps) for root, steps in known.items()}
            for name, known in zip(
                _LISTS, (self.promised, self.decided, self.replacing), strict=True
            )
        }
        digest = records.digest_hex(json.dumps(record, sort_keys=True).encode())
        self._commits.replace(self._path, json.dumps({**record, "xxh3": digest}).encode())

    def promise(self, root: str, step: int) -> bool:
        """Promises a step to a tier; returns False if it was promised before."""
        if step in self.promised[root]:
            return False
        self.promised[root][step] = None
        return True

    def withdraw(self, root: str, step: int) -> None:
        """Removes a promise: the step was uploaded, or never will be."""
        for steps in (self.promised[root], self.replacing[root]):
            steps.pop(step, None)

    def keep_only(self, root: str, steps: Iterable[int]) -> None:
        """Removes the promises of all other steps, which the first tier no longer holds."""
        _keep_only(self.promised[root], set(steps))


def _keep_only(steps: _Ordered, kept: Container[int]) -> None:
    for step in [step for step in steps if step not in kept]:
        del steps[step]


def promised_steps(storage: Storage, path: str) -> set[int]:
    """Returns the steps that a record promises to any tier; none where there is no record.

    Raises:
        CorruptCheckpointError: It is damaged.
    """
    data = queries.read_optional(storage, path)
    if data is None:
        return set()
    try:
        return {int(step) for steps in _parse(data)["promised"].values() for step in steps}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise errors.CorruptCheckpointError(
            f"{path} cannot be read, so it is unknown which steps are not uploaded yet: open the "
            f"run with a CheckpointManager and its tiers, which rebuilds it ({error}).",
            path=path,
        ) from error


def _parse(data: bytes) -> dict[str, Any]:
    """Returns the record; raises ValueError if it is damaged.

    Earlier versions wrote no digest and no list of replaced steps.
    """
    record: Any = plain_json.parse(data)
    if set(record) == {"promised", "considered"}:
        return {**record, "replacing": {}}
    digest = record.pop("xxh3")
    if records.digest_hex(json.dumps(record, sort_keys=True).encode()) != digest:
        raise errors.CorruptCheckpointError("it does not match its own digest")
    return record


def lacks_metrics(copy: StepInfo, info: StepInfo) -> bool:
    """Returns whether a step has metrics that a copy of it lacks, or has with other values."""
    return any(lacks(copy.metrics or {}, *each) for each in (info.metrics or {}).items())


def lacks(metrics: Mapping[str, Any], name: str, value: Any) -> bool:
    """Returns whether a metric is missing or has another value; NaN equals NaN."""
    return name not in metrics or json.dumps(metrics[name]) != json.dumps(value)
