"""Buckets of any protocol that fsspec knows.

Only some of its file systems create an object on condition that it is new. With the others, two
writers that look at the same instant may both find nothing, also for their lease.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import inspect
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from functional_ckpt import errors
from functional_ckpt.storage.buckets.base import (
    Entry,
    NotFound,
    PermanentError,
    PreconditionFailed,
    SpooledBucket,
    TransientError,
    no_check,
)

_PART_BYTES = 8 * 2**20
_READ_ONLY = {
    "hf": "hf:// makes a commit of every file. Save to a local path; then: hf upload REPO PATH"
}


def open_fsspec(uri: str, name: str) -> FsspecBucket:
    """Returns the top of a store of fsspec's; options are those of its own configuration.

    Raises:
        UsageError: fsspec, or a package for this protocol, is not installed.
    """
    protocol = uri.partition("://")[0]
    try:
        import fsspec

        system: Any = fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise errors.UsageError(
            f"{uri}: unknown protocol {protocol}://. Use s3, gs, oci, libcloud or one of fsspec, "
            f"which reports: {error}",
            path=uri,
        ) from error
    return FsspecBucket(uri, system, name)


class FsspecBucket(SpooledBucket):
    """A bucket behind fsspec; see `base.Bucket`."""

    def __init__(self, uri: str, system: Any, top: str) -> None:
        self.uri = uri
        self._why_read_only = _READ_ONLY.get(uri.partition("://")[0])
        self._system = system
        self._top = top

    def read(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        """Returns bytes `begin` to `end` of an object."""
        with self._clear(key):
            return bytes(self._system.cat_file(self._path(key), start=begin, end=end))

    def head(self, key: str) -> Entry:
        """Returns the metadata of an object."""
        with self._clear(key):
            info = self._system.info(self._path(key))
            if info["type"] == "directory":
                raise NotFound(key)
            return self._entry(info)

    def list(self, folder: str) -> Iterable[Entry]:
        """Returns every object below a folder."""
        with self._clear(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._system.invalidate_cache()
            found = self._system.find(self._path(folder), detail=True).values()
            folder = f"{folder}/" if folder else ""
            entries = (self._entry(info) for info in found if info["type"] != "directory")
            return [entry for entry in entries if entry.key.startswith(folder)]
        return []

    def write(self, key: str, data: bytes, *, replacing: str | None = None) -> Entry:
        """Writes an object."""
        self._check_writable()
        with self._clear(key):
            self.check_version(key, replacing)
            path = self._path(key)
            self._system.makedirs(os.path.dirname(path), exist_ok=True)
            mode = {"mode": "create"} if replacing == "" and self._creates else {}
            try:
                self._system.pipe_file(path, data, **mode)
            except FileExistsError:
                raise PreconditionFailed(key) from None
        return self.written(key, data)

    @functools.cached_property
    def _creates(self) -> bool:
        """Whether the file system can refuse to replace an object."""
        return "mode" in inspect.signature(self._system.pipe_file).parameters

    def _check_writable(self) -> None:
        if self._why_read_only is not None:
            raise PermanentError(self._why_read_only, errno.EROFS)

    def copy(
        self,
        source: Entry,
        target: str,
        check: Callable[[], None] = no_check,
        *,
        is_exact: bool = False,
    ) -> bool:
        """Copies an object; on no condition."""
        with self._clear(source.key):
            self._system.makedirs(os.path.dirname(self._path(target)), exist_ok=True)
            self._system.copy(self._path(source.key), self._path(target))
        return True

    def delete(self, keys: Iterable[str], *, versions: Mapping[str, str] | None = None) -> None:
        """Deletes objects; on no condition."""
        for key in keys:
            with self._clear(key), contextlib.suppress(FileNotFoundError):
                self._system.rm_file(self._path(key))

    def upload(
        self, path: str, key: str, check: Callable[[], None] = no_check, *, replacing: str = ""
    ) -> None:
        """Writes a file into an object, and reads it back: nothing else says that it arrived."""
        check()
        self._check_writable()
        with self._clear(key):
            self._system.makedirs(os.path.dirname(self._path(key)), exist_ok=True)
            self._system.put_file(path, self._path(key))
            with open(path, "rb") as file:
                begin = 0
                while part := file.read(_PART_BYTES):
                    if self.read(key, begin, begin + len(part)) != part:
                        raise TransientError(f"{key} differs after the upload")
                    begin += len(part)
            if self.head(key).size_bytes != begin:
                raise TransientError(f"{key} differs after the upload")

    def download(self, key: str, path: str) -> None:
        """Writes an object into a new file."""
        with self._clear(key):
            self._system.get_file(self._path(key), path)

    def redact(self, text: str) -> str:
        """Returns the message as it is: fsspec's own errors name no credentials that we know."""
        return text

    def _path(self, key: str) -> str:
        return f"{self._top}/{key}" if key else self._top

    def _entry(self, info: Mapping[str, Any]) -> Entry:
        path = str(info["name"])
        start = path.find(f"{self._top}/") + len(self._top) + 1
        return Entry(path[start:], int(info["size"] or 0), _modified_ns(info), None)

    @contextlib.contextmanager
    def _clear(self, key: str) -> Generator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFound(key) from None
        except PermissionError as error:
            raise PermanentError(f"permission denied ({error})", errno.EACCES) from None
        except NotImplementedError:
            reason = (
                "this protocol of fsspec cannot do that. Save to a local path, and copy the step"
            )
            raise PermanentError(reason, errno.EROFS) from None
        except (OSError, TimeoutError) as error:
            raise TransientError(f"{self.uri}: {error}") from None


def _modified_ns(info: Mapping[str, Any]) -> int:
    """By whatever name the protocol calls it; 0 where it says nothing."""
    for name in ("mtime", "last_modified", "LastModified", "modified", "created"):
        value: Any = info.get(name)
        if isinstance(value, datetime.datetime):
            return int(value.timestamp() * 1e9)
        if isinstance(value, (int, float)):
            return int(value * 1e9)
    return 0
