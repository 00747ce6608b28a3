"""Files of a step that an object store has already, in the step before: the store copies them.

The network is saved, not the space. The source is the object that was there when its step was
complete, by its version; its bytes are known by the digest in the record of that step.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from functional_ckpt import errors
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.format.shared_files import damage_path
from functional_ckpt.format.tuning import SHARED_FROM_BYTES
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.steps.step_files import recorded_files
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.storage.base import Stat, Storage

_NUM_COPIES = 8
_log = logging.getLogger("functional_ckpt")


class Arrived(NamedTuple):
    """A step in a tier.

    Attributes:
        path: Its directory.
        files: Its files by its records, relative to it.
        statuses: Their status when the step was complete.
    """

    path: str
    files: Mapping[str, FileRecord]
    statuses: Mapping[str, Stat]


def newest(steps: TierSteps, but: int) -> Arrived | None:
    """Returns the newest step of a tier, other than `but`; None if its records cannot be read."""
    found = max((info.step for info in steps.infos if info.step != but), default=None)
    if found is None:
        return None
    path = steps.path(found)
    try:
        statuses = steps.storage.walk(path)  # before the records: an object may be replaced
        files = recorded_files(steps.storage, path)
    except errors.CheckpointError as error:
        _log.warning("%s: nothing is copied from it: %s", path, error)
        return None
    return Arrived(path, files, statuses)


def copy_unchanged(
    storage: Storage, last: Arrived, target: str, files: Mapping[str, FileRecord]
) -> Iterable[str]:
    """Has a store copy the files that a step has in common with its last one.

    Args:
        storage: The store.
        last: The step that arrived last.
        target: The directory of the new step.
        files: The files that it lacks.

    Returns:
        The files that were copied; the others are to be sent.
    """
    known = {record: name for name, record in last.files.items()}
    pairs = {
        name: known[record]
        for name, record in files.items()
        if record.size_bytes >= SHARED_FROM_BYTES and known.get(record) in last.statuses
    }
    if not pairs:
        return ()
    damage = storage.stat(damage_path(os.path.dirname(last.path)))
    copied: list[str] = []

    def copy(name: str, source: str) -> None:
        status = last.statuses[source]
        is_sound = damage is None or status.modified_ns > damage.modified_ns
        path, old = os.path.join(target, name), os.path.join(last.path, source)
        is_alike = is_sound and status.size_bytes == files[name].size_bytes
        if is_alike and storage.share(path, old, status):
            copied.append(name)

    run_in_threads([functools.partial(copy, *pair) for pair in pairs.items()], _NUM_COPIES)
    return copied
