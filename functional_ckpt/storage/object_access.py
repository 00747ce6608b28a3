"""Operations of object stores only: conditional requests, and TensorStore's drivers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import xxhash

from functional_ckpt import errors
from functional_ckpt.storage.buckets.spool import Spool
from functional_ckpt.storage.part_uploads import PartUploads
from functional_ckpt.storage.requests import Permit, Requests


class ConditionalObjects:
    """Conditional requests to a bucket, by path. Safe to use from any thread.

    Attributes:
        notes: The tokens of the saves that this process has started, by temporary directory.
    """

    def __init__(self, requests: Requests) -> None:
        self.notes: dict[str, str] = {}
        self._requests = requests
        self._bucket = requests.bucket

    @property
    def part_uploads(self) -> PartUploads | None:
        """Uploads in parts, which may be copies within S3; None for other stores."""
        sends = self._bucket.part_requests
        return None if sends is None else PartUploads(self._requests, sends)

    def only_with(self, permit: Permit) -> None:
        """Checks a permit before every change from now on, until it is released."""
        self._requests.add_lease(permit)

    def commit_id(self, path: str) -> str | None:
        """Returns time, size and version of an object; None if there is none."""
        entry = self._requests.entry(path)
        if entry is None:
            return None
        return f"{entry.modified_ns}.{entry.size_bytes}.{entry.version}"

    def overwrite(self, path: str, data: bytes) -> None:
        """Writes an object, which may exist."""
        key = self._requests.key(path)
        self._requests.change("write", path, lambda: self._bucket.write(key, data))

    def create(self, path: str, data: bytes) -> bool:
        """Creates an object; returns whether it now has the given content.

        The response to an earlier attempt may have been lost, so equal content counts as created.
        """
        key = self._requests.key(path)
        try:
            self._requests.change(
                "write", path, lambda: self._bucket.write(key, data, replacing="")
            )
        except errors.StepExistsError:
            return self._requests.content(path) == data
        return True

    def replace_exactly(self, path: str, old: bytes, data: bytes) -> bool:
        """Replaces an object of content `old`; returns whether it now has the given content.

        No lease is checked: the condition alone protects the objects of another writer.
        """
        key = self._requests.key(path)
        entry, found = self._requests.entry(path), self._requests.content(path)
        if entry is None or found != old:
            return found == data
        version = entry.version or xxhash.xxh3_64_hexdigest(old)
        try:
            self._requests.ask(
                "write", path, lambda: self._bucket.write(key, data, replacing=version)
            )
        except errors.StepExistsError:
            return self._requests.content(path) == data
        return True

    def remove_exactly(self, path: str, old: bytes) -> None:
        """Removes an object of content `old`; no lease is checked."""
        key = self._requests.key(path)
        entry = self._requests.entry(path)
        if entry is None or self._requests.content(path) != old:
            return
        versions = {} if entry.version is None else {key: entry.version}
        with contextlib.suppress(errors.StepExistsError):
            self._requests.ask(
                "remove", path, lambda: self._bucket.delete([key], versions=versions)
            )


class ObjectTensorStore:
    """How TensorStore reads a bucket: by its own driver, or if it has none from a local copy."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._bucket = requests.bucket
        self._spool = Spool()

    @property
    def has_driver(self) -> bool:
        """Whether TensorStore has a driver for the bucket."""
        return self._bucket.kvstore("") is not None

    def kvstore(self, directory: str) -> Mapping[str, Any]:
        """Returns the spec of a directory; a local copy is downloaded first."""
        key = self._requests.key(directory)
        spec = self._bucket.kvstore(key)
        if spec is not None:
            return spec
        local = self._spool.directory(key)
        for entry in self._requests.ask("list", directory, lambda: self._bucket.list(key)):
            self._spool.fetch(
                entry,
                lambda key, path: self._requests.ask(
                    "read", directory, lambda: self._bucket.download(key, path)
                ),
            )
        return {"driver": "file", "path": f"{local}/"}

    def context(self) -> Mapping[str, Any]:
        """Returns TensorStore's resources for the store."""
        return self._bucket.context()

    def forget(self, path: str) -> None:
        """Removes local copies at or below `path`."""
        self._spool.forget(self._requests.key(path))

    def redact(self, text: str) -> str:
        """Returns a message without credentials."""
        return self._bucket.redact(text)
