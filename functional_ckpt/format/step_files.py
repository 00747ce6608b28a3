"""The small files of a checkpoint directory, each compared with its record before it is believed.

Restoring a step, listing steps with their metrics and deciding which steps to keep all read them
here, so that a damaged file is noticed wherever it is used.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.files.safetensors_header import MAX_READABLE_BYTES
from functional_ckpt.core.records import orbax, records
from functional_ckpt.core.records.orbax import MANIFEST
from functional_ckpt.core.records.records import parse_json, parse_object
from functional_ckpt.policies.progress import Progress
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.paths import check_arrays_path
from functional_ckpt.storage.queries import check_no_links, read_optional

JSON_FILE = "metadata"
METRICS_FILE = "metrics/metrics"
_FIRST_BYTES = 64 * 1024
PROGRESS_ITEM = "progress"
"""The path of a step's progress: a JSON item to Orbax."""


def check_content(
    path: str, data: bytes, expected: records.FileRecord, step: int | None = None
) -> None:
    """Raises `CorruptCheckpointError` if a file differs from its record."""
    got = records.FileRecord(len(data), records.digest_hex(data))
    if got != expected:
        raise errors.CorruptCheckpointError(
            f"{path}: expected {expected.size_bytes} bytes with digest {expected.xxh3}, got "
            f"{got.size_bytes} with {got.xxh3}; the file was changed or swapped.",
            path=path,
            step=step,
        )


def read_header(storage: Storage, path: str, size_bytes: int) -> bytes:
    """Returns the length and the header of a `.safetensors` file; fewer bytes for a hostile one."""
    data = storage.read(path, 0, min(_FIRST_BYTES, size_bytes))
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < end <= min(size_bytes, MAX_READABLE_BYTES):
        data = storage.read(path, 0, end)
    return data[:end]


def truncated(path: str, offset: int, length: int) -> errors.CorruptCheckpointError:
    """Returns the error of a data file that ends before bytes that it must have."""
    return errors.CorruptCheckpointError(
        f"{path}: {length:,} bytes at byte {offset:,} cannot be read: the file is truncated.",
        path=path,
    )


def read_manifest(storage: Storage, directory: str, expected: records.FileRecord | None) -> bytes:
    """Returns the manifest of an item's database.

    Raises:
        CorruptCheckpointError: There is none, or it is not the recorded one.
    """
    check_arrays_path(f"/{os.path.basename(directory)}")
    path = os.path.join(directory, MANIFEST)
    data = read_optional(storage, path)
    if data is None:
        raise errors.CorruptCheckpointError(
            f"{directory}: {MANIFEST} is missing; the item's arrays cannot be found.",
            path=directory,
        )
    if expected is not None:
        check_content(path, data, expected)
    return data


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepFiles:
    """The files of one checkpoint directory besides its arrays.

    Attributes:
        storage: Where it is.
        path: The directory.
        step: Its step, where it has one.
        record: The native record; None for a foreign checkpoint.
        identity: Digest of the record's file, which differs in every save; None without a record.
    """

    storage: Storage
    path: str
    step: int | None
    record: records.StepRecord | None
    identity: str | None

    @classmethod
    def open(cls, storage: Storage, path: str, step: int | None) -> StepFiles:
        """Reads the record of a checkpoint, if it has one.

        Raises:
            CorruptCheckpointError: The record is damaged, or that of another step.
        """
        file = os.path.join(path, records.EXTENSION_FILE)
        data = read_optional(storage, file)
        record = None if data is None else records.parse_step(data, file)
        # `fc.save` records no step: where its checkpoint has a step's name, that counts.
        recorded = None if record is None else record.step
        if step is not None and recorded not in (None, step):
            raise errors.CorruptCheckpointError(
                f"{path}: written as step {recorded}, found as step {step}; the directories "
                "were swapped or renamed.",
                path=path,
                step=step,
            )
        return cls(
            storage=storage,
            path=path,
            step=step if recorded is None else recorded,
            record=record,
            identity=None if data is None else records.digest_hex(data),
        )

    @classmethod
    def foreign(cls, storage: Storage, path: str, step: int | None) -> StepFiles:
        """Those of a directory without a record."""
        return cls(storage=storage, path=path, step=step, record=None, identity=None)

    def is_replaced(self) -> bool:
        """Returns whether the checkpoint was overwritten since it was opened."""
        if self.identity is None:
            return False
        data = read_optional(self.storage, os.path.join(self.path, records.EXTENSION_FILE))
        return data is not None and records.digest_hex(data) != self.identity

    def read_optional(self, name: str) -> bytes | None:
        """Returns a file of the checkpoint as it was written; None where there is none.

        Raises:
            CorruptCheckpointError: It was changed or lost, or a link leads to it.
        """
        expected = None
        if self.record is not None:
            expected = self.record.files.get(name)
            if expected is None:
                return None  # an unlisted file was not saved
        path = os.path.join(self.path, name)
        check_no_links(self.storage, self.path, name)
        data = read_optional(self.storage, path)
        if expected is None:
            return data
        if data is None:
            raise self._missing(name)
        check_content(path, data, expected, self.step)
        return data

    def read(self, name: str) -> bytes:
        """As `read_optional`, of a file that every such checkpoint has."""
        data = self.read_optional(name)
        if data is None:
            raise self._missing(name)
        return data

    def _missing(self, name: str) -> errors.CorruptCheckpointError:
        path = os.path.join(self.path, name)
        return errors.CorruptCheckpointError(
            f"{path}: the file is missing.", path=path, step=self.step
        )

    def json(self, item: str) -> Any:
        """Returns the value of a JSON item."""
        name = f"{item}/{JSON_FILE}"
        return parse_json(self.read(name), os.path.join(self.path, name))

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Orbax's metadata of the checkpoint; empty if it is foreign and has none."""
        name = orbax.CHECKPOINT_METADATA_FILE
        data = self.read_optional(name) if self.record is None else self.read(name)
        return {} if data is None else parse_object(data, os.path.join(self.path, name))

    @property
    def metrics(self) -> Mapping[str, Any] | None:
        """The metrics saved with the checkpoint; None where there are none."""
        data = self.read_optional(METRICS_FILE)
        return None if data is None else parse_object(data, os.path.join(self.path, METRICS_FILE))

    @property
    def progress(self) -> Progress | None:
        """The progress of the training; None if it was not saved."""
        if self.record is not None and PROGRESS_ITEM in self.record.items:
            return None
        name = f"{PROGRESS_ITEM}/{JSON_FILE}"
        data = self.read_optional(name)
        if data is None:
            return None
        path = os.path.join(self.path, name)
        try:
            return Progress.from_json(parse_json(data, path))
        except errors.UsageError as error:
            if self.record is None:
                return None  # a foreign item with this name
            raise errors.CorruptCheckpointError(f"{path}: {error}.", path=path) from error
