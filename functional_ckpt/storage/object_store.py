"""Object stores: `base.Storage` over a bucket.

A bucket has no directories, no renames and no locks. They are emulated:
- a directory exists while an object is below it; an empty one is known only to the storage that
  created it;
- a committed directory holds a marker, `commit_success.txt`, which is not listed;
- a rename copies every object within the store, the marker last, then removes the sources, the
  marker first;
- a lock is a lease (`buckets.lease`).
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import threading

import xxhash

from functional_ckpt import errors
from functional_ckpt.core.records import orbax
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.storage.base import Stat
from functional_ckpt.storage.buckets import lease
from functional_ckpt.storage.buckets.base import Bucket, Entry, NotFound
from functional_ckpt.storage.object_access import ConditionalObjects, ObjectTensorStore
from functional_ckpt.storage.object_file import ObjectFile
from functional_ckpt.storage.requests import Requests

MARKER = orbax.COMMIT_FILE
_READ_BYTES = 16 * 2**20
_MAX_LINK_BYTES = 1024
_MAX_REPLACED = 3  # of an earlier attempt, and of a writer that lost its lease
# Larger ones are sent in parts.
_SMALL_FILE_BYTES = 8 * 2**20
_log = logging.getLogger("functional_ckpt")


class ObjectStorage:
    """A bucket, in which paths are URIs below the bucket's."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._requests = Requests(bucket)
        self._made: set[str] = set()
        self._mutex = threading.Lock()
        self.objects = ConditionalObjects(self._requests)
        self.tensorstore = ObjectTensorStore(self._requests)

    def probe(self, *, is_patient: bool = True) -> None:
        """Lists one name, so that a wrong configuration fails at once with a clear error.

        Args:
            is_patient: Whether to retry, for minutes, if the store does not answer.

        Raises:
            StorageError: No such bucket, no permission, a wrong region, an expired token, no store.
        """
        root = self._bucket.uri
        if is_patient:
            self._requests.ask("list", root, lambda: self._bucket.names(".functional_ckpt"))
            return
        with self._requests.clear_errors("list", root):
            self._bucket.names(".functional_ckpt")

    def follow(self, path: str) -> str:
        """Returns the directory that a link object names; else `path`."""
        entry = self._requests.entry(path)
        if entry is None or not _may_be_link(entry):
            return path
        name = self.read(path).decode(errors="replace").strip()
        return os.path.join(os.path.dirname(path), os.path.basename(name))

    # -------------------------------------------------------------------------------- reading

    def stat(self, path: str, *, follow: bool = False) -> Stat | None:
        """Returns the status of an object, or of a directory if something is below `path`.

        With `follow` it looks for a directory first, which usually takes one request.
        """
        key = self._requests.key(path)
        if follow and self._is_directory(key, path):
            return Stat("a directory")
        if (entry := self._requests.entry(path)) is not None:
            return _to_stat(entry)
        return Stat("a directory") if not follow and self._is_directory(key, path) else None

    def _is_directory(self, key: str, path: str) -> bool:
        with self._mutex:
            if not key or key in self._made:
                return True
        return bool(self._names(path))

    def list(self, path: str) -> list[str]:
        """Returns the sorted names in a directory, without the marker."""
        folder = self._requests.key(path)
        with self._mutex:
            made = {os.path.basename(key) for key in self._made if os.path.dirname(key) == folder}
        return sorted((set(self._names(path)) | made) - {MARKER})

    def walk(self, path: str) -> dict[str, Stat]:
        """Returns all objects below `path` but for markers, by sorted relative path."""
        key = self._requests.key(path)
        start = len(key) + 1 if key else 0
        found = self._requests.ask("list", path, lambda: self._bucket.list(key))
        entries = sorted((each for each in found if not _is_marker(each)), key=lambda e: e.key)
        return {each.key[start:]: _to_stat(each) for each in entries}

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Returns the content of an object, or a part of it; fewer bytes at its end."""
        key, end = self._requests.key(path), None if length is None else offset + length
        if length is not None:
            end = min(offset + length, self._size(path))
            if end <= offset:
                return b""
        return self._requests.ask("read", path, lambda: self._bucket.read(key, offset, end))

    def _size(self, path: str) -> int:
        key = self._requests.key(path)
        return self._requests.ask("read", path, lambda: self._bucket.head(key)).size_bytes

    def checksum(self, path: str) -> FileRecord:
        """Returns size and digest of an object, read in parts."""
        key, size_bytes, digest = self._requests.key(path), self._size(path), xxhash.xxh3_64()
        for begin in range(0, size_bytes, _READ_BYTES):
            end = min(begin + _READ_BYTES, size_bytes)
            digest.update(
                self._requests.ask(
                    "read", path, lambda b=begin, e=end: self._bucket.read(key, b, e)
                )
            )
        return FileRecord(size_bytes, digest.hexdigest())

    # -------------------------------------------------------------------------------- writing

    def make_directory(self, path: str, *, parents: bool = True) -> None:
        """Remembers an empty directory and its parents."""
        key = self._requests.key(path)
        with self._mutex:
            while key:
                self._made.add(key)
                key = os.path.dirname(key)

    def write(self, path: str, data: bytes) -> None:
        """Writes an object, durably; a reader sees the old one or the new.

        The files of a step are new, so the first request has the condition that the object does not
        exist. A suspended writer, whose request passed the check of its lease, thus cannot replace
        an object of the next writer. An existing object is replaced after another check.
        """
        key = self._requests.key(path)
        try:
            self._requests.change(
                "write", path, lambda: self._bucket.write(key, data, replacing="")
            )
        except errors.StepExistsError:
            self.objects.overwrite(path, data)

    def create(self, path: str, size_bytes: int, *, is_direct: bool) -> ObjectFile:
        """Creates an object; it is uploaded when it is complete."""
        return ObjectFile(functools.partial(self.put_file, path=path), path, size_bytes)

    def put_file(self, source: str, path: str) -> None:
        """Uploads a local file; the store holds exactly its bytes when it returns.

        As in `write`, the condition of the first request is that the object is new.
        """
        if os.path.getsize(source) <= _SMALL_FILE_BYTES:
            with open(source, "rb") as file:
                self.write(path, file.read())
            return
        key = self._requests.key(path)
        check, version = self._requests.check_fresh, ""
        for _ in range(_MAX_REPLACED):
            try:
                self._requests.change(
                    "write",
                    path,
                    lambda v=version: self._bucket.upload(source, key, check, replacing=v),
                )
            except errors.StepExistsError:
                entry = self._requests.entry(path)
                version = "" if entry is None else entry.version or ""
            else:
                return
        raise errors.StorageError(
            f"Cannot write {path}: it changes while it is written; another writer is active.",
            errno=errno.EBUSY,
            path=path,
        )

    def link(self, path: str, target: str) -> None:
        """Writes a small object that names its target; later paths through it are resolved."""
        key = self._requests.key(path)
        self.objects.overwrite(path, target.encode())
        self._requests.add_link(key, os.path.join(os.path.dirname(key), target))

    def share(self, path: str, source: str, expected: Stat) -> bool:
        """Copies an object within the store, on the condition that it has not changed.

        Not all stores compare the versions, so they are compared once more afterwards, with the
        digests that the store has.
        """
        version, key = expected.version, self._requests.key(path)
        if version is None:
            return False
        entry = Entry(self._requests.key(source), expected.size_bytes, 0, version)
        check = self._requests.check_fresh
        equal: list[bool] = []
        try:
            self._requests.change(
                "copy",
                path,
                lambda: equal.append(self._bucket.copy(entry, key, check, is_exact=True)),
            )
            copied, there = self._requests.entry(path), self._requests.entry(source)
        except (errors.StepExistsError, errors.StorageError) as error:
            _log.debug("%s: uploaded, since it could not be copied: %s", path, error)
            return False
        if copied is None:
            return False
        is_source = there is not None and there.version == version
        if is_source and equal[-1] and copied.size_bytes == entry.size_bytes:
            return True
        self._delete(path, [copied])
        return False

    def sync(self, path: str) -> None:
        """Does nothing: an object is durable once it is written."""

    def rename(self, source: str, target: str) -> None:
        """Copies the objects at or below `source`, then removes them there."""
        if self._names(target):
            raise errors.StorageError(
                f"Cannot rename to {target}: {os.strerror(errno.ENOTEMPTY)}.",
                errno=errno.ENOTEMPTY,
                path=target,
            )
        begin, entries = len(self._requests.key(source)), self._everything(source)
        if not entries:
            raise self._requests.error("rename", source, NotFound(source))
        new = self._requests.key(target)
        for is_marker in (False, True):
            pairs = [
                (entry, new + entry.key[begin:])
                for entry in entries
                if _is_marker(entry) == is_marker
            ]
            self._requests.each("copy", source, pairs, self._bucket.copy)
        self._delete(source, entries)

    def swap(self, first: str, second: str) -> bool:
        """Returns False: no object store can exchange paths."""
        return False

    def remove(self, path: str) -> None:
        """Removes an object, or all below `path`, its marker first; nothing if it is absent."""
        self._delete(path, self._everything(path))
        self.tensorstore.forget(path)

    def lock(self, path: str) -> lease.Lease:
        """Takes the writer's lease at `path`."""
        key = self._requests.key(path)
        found = self._requests.ask("lock", path, lambda: lease.take(self._bucket, key))
        self._requests.add_lease(found)
        return found

    # -------------------------------------------------------------------------------- parts

    def _names(self, path: str) -> list[str]:
        key = self._requests.key(path)
        return list(self._requests.ask("list", path, lambda: self._bucket.names(key)))

    def _everything(self, path: str) -> list[Entry]:
        """Returns the objects at or below a path, including markers."""
        entry = self._requests.entry(path)
        key = self._requests.key(path)
        below = self._requests.ask("list", path, lambda: self._bucket.list(key))
        return [*([] if entry is None else [entry]), *below]

    def _delete(self, path: str, entries: list[Entry]) -> None:
        versions = {each.key: each.version for each in entries if each.version is not None}
        marked = [entry.key for entry in entries if _is_marker(entry)]
        others = [entry.key for entry in entries if not _is_marker(entry)]
        for keys in (marked, others):
            if not keys:
                continue
            try:
                self._requests.change(
                    "remove", path, lambda keys=keys: self._bucket.delete(keys, versions=versions)
                )
            except errors.StepExistsError:
                raise errors.LockedError(
                    f"Cannot remove {path}: it changed since it was listed, so another writer is "
                    "active. Only one may write a directory.",
                    path=path,
                ) from None
        folder = self._requests.key(path)
        with self._mutex:
            self._made = {
                key for key in self._made if key != folder and not key.startswith(f"{folder}/")
            }


def _to_stat(entry: Entry) -> Stat:
    return Stat(
        "a file",
        entry.size_bytes,
        entry.modified_ns,
        is_link=_may_be_link(entry),
        version=entry.version,
    )


def _may_be_link(entry: Entry) -> bool:
    return entry.size_bytes <= _MAX_LINK_BYTES


def _is_marker(entry: Entry) -> bool:
    return os.path.basename(entry.key) == MARKER
