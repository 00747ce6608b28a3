"""Objects that are put together in a store, of parts that are sent and parts that it copies."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence

from functional_ckpt import errors
from functional_ckpt.storage.buckets.s3_requests import S3Requests, source_headers
from functional_ckpt.storage.requests import Requests


class PartUploads:
    """Uploads in parts to a bucket. Safe to use from any thread.

    Args:
        requests: Requests to the bucket by path.
        sends: Its uploads.
    """

    def __init__(self, requests: Requests, sends: S3Requests) -> None:
        self._requests = requests
        self._sends = sends

    def start(self, path: str) -> str:
        """Starts an object; nothing is seen of it before `complete`.

        Returns:
            The upload, for the other operations.
        """
        key = self._requests.key(path)
        return self._requests.ask("write", path, lambda: self._sends.start(key))

    def send(self, path: str, upload: str, number: int, data: bytes) -> str:
        """Sends part `number`, from 0 on; returns its tag."""
        key = self._requests.key(path)
        return self._requests.ask(
            "write", path, lambda: self._sends.send_part(key, upload, number, data)
        )

    def copy(
        self, path: str, upload: str, number: int, source: str, version: str, start: int, end: int
    ) -> str:
        """Makes bytes `start` to `end` of an object part `number`; returns its tag.

        Args:
            path: The object to be.
            upload: Its upload.
            number: The number of the part, from 0 on.
            source: The URI of an object of the same service, in any bucket.
            version: The version that it must have; not all services compare it.
            start: The first byte.
            end: One past the last.

        Raises:
            StepExistsError: The source has another version.
        """
        key = self._requests.key(path)
        headers = source_headers(source.partition("://")[2], version)
        return self._requests.ask(
            "copy",
            path,
            lambda: self._sends.copy_part(key, upload, number, headers, start, end),
        )

    def complete(self, path: str, upload: str, tags: Sequence[str]) -> None:
        """Makes the parts an object, which must be new; not all services compare it.

        Raises:
            StepExistsError: There is an object.
        """
        key, is_new = self._requests.key(path), self._sends.is_conditional
        try:
            self._requests.ask(
                "write", path, lambda: self._sends.complete(key, upload, tags, is_new=is_new)
            )
        except (errors.StepExistsError, errors.StorageError):
            # An earlier attempt may have been successful, and its answer lost.
            entry = self._requests.entry(path)
            if entry is None or entry.version is None or entry.version.strip('"') != _etag(tags):
                raise

    def abort(self, path: str, upload: str) -> None:
        """Removes the parts of an upload."""
        key = self._requests.key(path)
        self._requests.ask("remove", path, lambda: self._sends.abort(key, upload))


def _etag(tags: Sequence[str]) -> str | None:
    """Returns the ETag of an object of parts; None if those of the parts are no digests."""
    with contextlib.suppress(ValueError):
        digests = b"".join(bytes.fromhex(tag.strip('"')) for tag in tags)
        return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(tags)}"
    return None
