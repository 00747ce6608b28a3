"""The files of a stored step, by its own records."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping

from functional_ckpt import errors
from functional_ckpt.core.nodes.part import PART_FILE
from functional_ckpt.core.records import records
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage

_log = logging.getLogger("functional_ckpt")


def files_of(storage: Storage, path: str) -> tuple[dict[str, records.FileRecord], str]:
    """Returns a checkpoint's files by its own records, and the identity of its commit.

    A listing is not sufficient: a missed file would be missing in the copy. Files without a
    record, such as those of a foreign step, are described from their content. The part record of a
    node is left out: a copy has the files of all nodes.
    """
    found = recorded_files(storage, path)
    own = found.get(records.EXTENSION_FILE)
    for name in storage.walk(path):
        file = os.path.join(path, name)
        if name != PART_FILE and name not in found and queries.kind(storage, file) == "a file":
            found[name] = storage.checksum(file)
    return found, _digest_of(found) if own is None else own.xxh3


def recorded_files(storage: Storage, path: str) -> dict[str, records.FileRecord]:
    """Returns the files that a checkpoint's own records name; none of a foreign one."""
    file = os.path.join(path, records.EXTENSION_FILE)
    data = queries.read_optional(storage, file)
    if data is None:
        return {}
    found = {records.EXTENSION_FILE: records.FileRecord(len(data), records.digest_hex(data))}
    record = records.parse_step(data, file)
    found |= record.files
    for item, kind in record.items.items():
        if kind == "tree":
            file = os.path.join(path, item, records.EXTENSION_FILE)
            files = records.parse_item(storage.read(file), file).files
            found |= {f"{item}/{name}": each for name, each in files.items()}
    return found


def holds_file(storage: Storage, path: str, expected: records.FileRecord) -> bool:
    """Returns whether a file is there as it was recorded; False if it cannot be read, too."""
    try:
        return queries.exists(storage, path) and storage.checksum(path) == expected
    except errors.CheckpointError as error:
        _log.warning("%s cannot be read: %s", path, error)
        return False


def record_digest(storage: Storage, path: str) -> str | None:
    """Returns the identity of a commit: its record, which has every digest; None without one."""
    data = queries.read_optional(storage, os.path.join(path, records.EXTENSION_FILE))
    return None if data is None else records.digest_hex(data)


def _digest_of(files: Mapping[str, records.FileRecord]) -> str:
    listed = sorted((name, file.size_bytes, file.xxh3) for name, file in files.items())
    return records.digest_hex(json.dumps(listed).encode())
