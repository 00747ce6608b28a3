"""An object store as the commit protocol sees it: `base.Storage` over a bucket.

A store of objects has no directories, no renames and no locks. Here
- a directory is there as long as something is below it; an empty one is known only to the storage
  that made it;
- a directory written to its end holds a marker, `commit_success.txt`, which is not listed;
- a rename copies every object within the store, the marker last, then removes, the marker first;
- a lock is a lease (`lease.py`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import xxhash

from functional_ckpt import errors
from functional_ckpt.core.records import orbax
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.storage.buckets import lease, spool
from functional_ckpt.storage.buckets.base import (
    Bucket,
    Entry,
    NotFound,
    PermanentError,
    TransientError,
    retrying,
)
from functional_ckpt.storage.requests import NUM_REQUESTS, Requests

__all__ = ["MARKER", "ObjectStorage"]

MARKER = orbax.COMMIT_FILE
_READ_BYTES = 16 * 2**20
_MAX_LINK_BYTES = 1024
# Larger files are the data files, whose names no two commits share.
_SMALL_FILE_BYTES = 8 * 2**20
_WRITES_OF_ARRAYS = ("write_array", "commit_arrays", "merge_arrays")
_T = TypeVar("_T")


class ObjectStorage(Requests):
    """A bucket, in which paths are URIs below the bucket's.

    Args:
        bucket: Where the objects are.

    Attributes:
        notes: The tokens of the saves that this process has begun; see `commit_marker`.
    """

    num_requests = NUM_REQUESTS

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket)
        self._made: set[str] = set()
        self._links: dict[str, str] = {}
        self._mutex = threading.Lock()
        self._spool = spool.Spool()
        self.notes: dict[str, str] = {}

    def operation(self, kind: str, path: str) -> None:
        """Called before every operation; before TensorStore writes, the leases are looked at."""
        if kind in _WRITES_OF_ARRAYS:
            self._ask("write", path, self.check_leases)

    def probe(self, *, is_patient: bool = True) -> None:
        """Asks the store for one name, so that what will never work fails now and clearly.

        Args:
            is_patient: Whether it is asked again where it does not answer.

        Raises:
            StorageError: No such bucket, no permission, a wrong region, an expired token, no store.
        """
        root = self._bucket.uri
        if is_patient:
            self._ask("list", root, lambda: self._bucket.names(".functional_ckpt"))
            return
        with self._clear("list", root):
            self._bucket.names(".functional_ckpt")

    # -------------------------------------------------------------------------------- reading

    def read(self, path: str) -> bytes:
        """The content of an object."""
        self.operation("read", path)
        return self._ask("read", path, lambda: self._bucket.read(self._key(path)))

    def exists(self, path: str) -> bool:
        """Whether an object is at `path`, or below it."""
        return self._entry(path) is not None or self.is_directory(path)

    def is_directory(self, path: str) -> bool:
        """Whether something is below `path`, or it was made a directory here."""
        key = self._key(path)
        if not key or self._is_made(key):
            return True
        return any(True for _ in self._names(path))

    def is_committed(self, path: str) -> bool:
        """Whether the marker is below `path`."""
        return self._entry(os.path.join(path, MARKER)) is not None

    def commit_id(self, path: str) -> str | None:
        """Time and size of the marker below `path`."""
        entry = self._entry(os.path.join(path, MARKER))
        return None if entry is None else f"{entry.modified_ns}.{entry.size_bytes}"

    def directory_id(self, path: str) -> str | None:
        """Always the same: a prefix is nothing by itself."""
        return ""

    def is_link(self, path: str) -> bool:
        """Whether a small object is at `path`, and nothing below it."""
        entry = self._entry(path)
        return entry is not None and entry.size_bytes <= _MAX_LINK_BYTES

    def kind(self, path: str, *, follow: bool = False) -> str:
        """What is at a path, for people."""
        if self._entry(path) is not None:
            return "a file"
        return "a directory" if self.is_directory(path) else "nothing"

    def list(self, path: str) -> list[str]:
        """Sorted names in a directory; the marker is none of them."""
        self.operation("list", path)
        folder = self._key(path)
        names = set(self._names(path)) | self._made_in(folder)
        return sorted(names - {MARKER})

    def walk(self, path: str) -> list[str]:
        """Sorted paths, relative to `path`, of the objects below it but for markers."""
        return sorted(self.sizes(path))

    def sizes(self, path: str) -> dict[str, int]:
        """The size of every object below `path` but for markers, by its relative path."""
        self.operation("list", path)
        start = len(self._key(path)) + 1 if self._key(path) else 0
        return {entry.key[start:]: entry.size_bytes for entry in self._below(path)}

    def modified_ns(self, path: str) -> int:
        """When an object, or the newest below `path`, was written; 0 for what is not there."""
        entry = self._entry(path)
        found = [entry] if entry is not None else self._below(path)
        return max((each.modified_ns for each in found), default=0)

    def age_seconds(self, path: str) -> float:
        """How long ago an object was written; zero for one that is not there any more."""
        entry = self._entry(path)
        return 0.0 if entry is None else time.time() - entry.modified_ns / 1e9

    def checksum(self, path: str) -> FileRecord:
        """Size and digest of an object, read in parts."""
        self.operation("read", path)
        key = self._key(path)
        size_bytes = self._ask("read", path, lambda: self._bucket.head(key)).size_bytes
        digest = xxhash.xxh3_64()
        for begin in range(0, size_bytes, _READ_BYTES):
            end = min(begin + _READ_BYTES, size_bytes)
            digest.update(self._ask("read", path, lambda b=begin, e=end: self._read(key, b, e)))
        return FileRecord(size_bytes, digest.hexdigest())

    def _read(self, key: str, begin: int, end: int) -> bytes:
        return self._bucket.read(key, begin, end)

    def total_bytes(self, path: str) -> int:
        """Sum of the sizes of every object below `path`."""
        return sum(self.sizes(path).values())

    # -------------------------------------------------------------------------------- writing

    def make_directory(self, path: str, *, parents: bool = True) -> None:
        """Remembers an empty directory and its parents."""
        del parents
        self.operation("make_directory", path)
        key = self._key(path)
        with self._mutex:
            while key:
                self._made.add(key)
                key = os.path.dirname(key)

    def write(self, path: str, data: bytes) -> None:
        """Writes an object, durably; a reader sees the old one or the new.

        What is in a step is new, and that is the condition first: so a request of a suspended
        writer that had passed the look at its lease does not hit the next one's object. What is
        there all the same is replaced after another look.
        """
        self.operation("write", path)
        key = self._key(path)
        try:
            self._change("write", path, lambda: self._bucket.write(key, data, replacing=""))
        except errors.StepExistsError:
            self._change("write", path, lambda: self._bucket.write(key, data))

    def replace(self, path: str, data: bytes) -> None:
        """Writes an object over another, durably."""
        self.operation("write", path)
        self._change("write", path, lambda: self._bucket.write(self._key(path), data))

    def create(self, path: str, data: bytes) -> bool:
        """Writes an object unless there is one with other content; whether it is there as given.

        A request whose answer was lost may have written it: so equal content counts as written.
        """
        self.operation("write", path)
        key = self._key(path)
        try:
            self._change("write", path, lambda: self._bucket.write(key, data, replacing=""))
        except errors.StepExistsError:
            return self.read(path) == data
        return True

    def replace_exactly(self, path: str, old: bytes, data: bytes) -> bool:
        """Writes an object if its content is `old`; whether it is there as given.

        It asks for no lease: the condition alone says whether the object is still the caller's.
        """
        self.operation("write", path)
        key = self._key(path)
        try:
            entry = self._ask("read", path, lambda: self._bucket.head(key))
            found = self.read(path)
            if found != old:
                return found == data
            version = entry.version or xxhash.xxh3_64_hexdigest(found)
            self._ask("write", path, lambda: self._bucket.write(key, data, replacing=version))
        except errors.StepExistsError:
            return self.read(path) == data
        except errors.StorageError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def remove_exactly(self, path: str, old: bytes) -> None:
        """Removes an object if its content is `old`; it asks for no lease."""
        self.operation("remove", path)
        key = self._key(path)
        entry = self._entry(path)
        if entry is None or self.read(path) != old:
            return
        versions = {} if entry.version is None else {key: entry.version}
        with contextlib.suppress(errors.StepExistsError):
            self._ask("remove", path, lambda: self._bucket.delete([key], versions=versions))

    def replace_link(self, path: str, target: str, temporary: str) -> None:
        """A small object that names its target; from here on `path` is followed to it."""
        self.operation("link", path)
        key = self._key(path)
        self._change("write", path, lambda: self._bucket.write(key, target.encode()))
        with self._mutex:
            self._links[key] = os.path.join(os.path.dirname(key), target)

    def follow(self, path: str) -> str:
        """What a path means that a user gave: that of a link is the directory it names."""
        if not self.is_link(path):
            return path
        name = self.read(path).decode(errors="replace").strip()
        return os.path.join(os.path.dirname(path), os.path.basename(name))

    def sync(self, path: str) -> None:
        """Nothing to be done: what was written is durable. What is absent is an error."""
        self.operation("sync", path)
        self._ask("sync", path, lambda: self._bucket.head(self._key(path)))

    def sync_directory(self, path: str) -> None:
        """Nothing: what was written is durable."""
        self.operation("sync", path)

    def rename(self, source: str, target: str) -> None:
        """Copies what is at or below `source`, then removes it there."""
        self.operation("rename", target)
        if any(True for _ in self._names(target)):
            raise errors.StorageError(
                f"Cannot rename to {target}: {os.strerror(errno.ENOTEMPTY)}.",
                errno=errno.ENOTEMPTY,
                path=target,
            )
        begin, entries = len(self._key(source)), self._everything(source)
        if not entries:
            raise self._error("rename", source, NotFound(source))
        for is_marker in (False, True):
            self._each(
                "copy",
                source,
                [
                    (entry.key, self._key(target) + entry.key[begin:])
                    for entry in entries
                    if _is_marker(entry) == is_marker
                ],
                self._bucket.copy,
            )
        self._delete(source, entries)

    def swap(self, first: str, second: str) -> bool:
        """No store can."""
        self.operation("swap", second)
        return False

    def remove(self, path: str) -> None:
        """Removes an object, or all below `path`, its marker first; nothing when it is absent."""
        self.operation("remove", path)
        self._delete(path, self._everything(path))
        self._spool.forget(self._key(path))

    def lock(self, path: str) -> lease.Lease:
        """Takes the writer's lease at `path`."""
        self.operation("lock", path)
        key = self._key(path)
        found = self._ask("lock", path, lambda: lease.take(self._bucket, key))
        self._leases.append(found)
        return found

    # -------------------------------------------------------------------------------- arrays

    def kvstore(self, directory: str) -> Mapping[str, Any]:
        """TensorStore's own driver of the store; where it has none, a local copy."""
        key = self._key(directory)
        spec = self._bucket.kvstore(key)
        if spec is not None:
            return spec
        local = self._spool.directory(key)
        for entry in self._below(directory):
            self._spool.fetch(entry, lambda name, path: self._download(directory, name, path))
        return {"driver": "file", "path": f"{local}/"}

    def context(self) -> Mapping[str, Any]:
        """TensorStore's resources for the store."""
        return self._bucket.context()

    def flush_arrays(self, directory: str) -> None:
        """Uploads what was written into a local copy."""
        if self._bucket.kvstore("") is None:
            pairs = [(path, key) for key, path in self._spool.unsent(self._key(directory))]
            self._each("write", directory, pairs, self._bucket.upload)
            self._spool.sent(pairs)

    def put_file(self, source: str, path: str) -> None:
        """Uploads a local file; the store holds exactly its bytes when it returns."""
        if os.path.getsize(source) <= _SMALL_FILE_BYTES:
            with open(source, "rb") as file:
                self.write(path, file.read())
            return
        self.operation("write", path)
        self._change("write", path, lambda: self._bucket.upload(source, self._key(path)))

    def _download(self, directory: str, key: str, path: str) -> None:
        self._ask("read", directory, lambda: self._bucket.download(key, path))

    def redact(self, text: str) -> str:
        """A message without the access key."""
        return self._bucket.redact(text)

    # -------------------------------------------------------------------------------- parts

    def _key(self, path: str) -> str:
        root = self._bucket.uri
        if path != root and not path.startswith(f"{root}/"):
            raise errors.UsageError(f"{path} is not in {root}.", path=path)
        key = path[len(root) + 1 :].strip("/")
        with self._mutex:
            links = tuple(self._links.items())
        for link, target in links:
            if key.startswith(f"{link}/"):
                return target + key[len(link) :]
        return key

    def _entry(self, path: str) -> Entry | None:
        key = self._key(path)
        if not key:
            return None
        try:
            return retrying(self._head, key)
        except (PermanentError, TransientError) as error:
            raise self._error("look at", path, error) from None

    def _head(self, key: str) -> Entry | None:
        try:
            return self._bucket.head(key)
        except NotFound:
            return None

    def _names(self, path: str) -> list[str]:
        return list(self._ask("list", path, lambda: self._bucket.names(self._key(path))))

    def _everything(self, path: str) -> list[Entry]:
        """What is at or below a path, its markers too."""
        entry = self._entry(path)
        below = self._ask("list", path, lambda: self._bucket.list(self._key(path)))
        return [*([] if entry is None else [entry]), *below]

    def _below(self, path: str) -> list[Entry]:
        """What is below a path but for its markers."""
        found = self._ask("list", path, lambda: self._bucket.list(self._key(path)))
        return [entry for entry in found if not _is_marker(entry)]

    def _is_made(self, key: str) -> bool:
        with self._mutex:
            return key in self._made

    def _made_in(self, folder: str) -> set[str]:
        with self._mutex:
            return {os.path.basename(key) for key in self._made if os.path.dirname(key) == folder}

    def _delete(self, path: str, entries: list[Entry]) -> None:
        versions = {each.key: each.version for each in entries if each.version is not None}
        marked = [entry.key for entry in entries if _is_marker(entry)]
        others = [entry.key for entry in entries if not _is_marker(entry)]
        for keys in (marked, others):
            if not keys:
                continue
            try:
                self._change(
                    "remove", path, lambda keys=keys: self._bucket.delete(keys, versions=versions)
                )
            except errors.StepExistsError:
                raise errors.LockedError(
                    f"Cannot remove {path}: it changed since it was listed, so another writer is "
                    "active. Only one may write a directory.",
                    path=path,
                ) from None
        folder = self._key(path)
        with self._mutex:
            self._made = {
                key for key in self._made if key != folder and not key.startswith(f"{folder}/")
            }


def _is_marker(entry: Entry) -> bool:
    return os.path.basename(entry.key) == MARKER
