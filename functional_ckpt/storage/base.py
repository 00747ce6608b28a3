"""The protocols of a store for steps: a file system or an object store.

Paths are strings: absolute local paths, or URIs such as `s3://bucket/run/7`. Both are joined and
split with `os.path`. Stores are thread-safe, and raise `StorageError` for their errors.

An object store also has `Storage.objects`; a file system has None there. This attribute decides how
steps are committed and how arrays are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from functional_ckpt.core.records.records import FileRecord

if TYPE_CHECKING:
    from functional_ckpt.storage.object_access import ConditionalObjects

Kind: TypeAlias = Literal["a file", "a directory", "a link", "a special file"]


@dataclasses.dataclass(frozen=True, slots=True)
class Stat:
    """The status of a path.

    Attributes:
        kind: The kind of the entry, as messages name it.
        size_bytes: The size of a file.
        modified_ns: The time of the last change, nanoseconds since the epoch; 0 if unknown.
        identity: Differs between two entries at the same path at different times; None on object
            stores.
        is_link: Whether the entry is a link, or an object small enough to be one.
        version: Changes with every write of an object; None if the store has no versions.
        num_links: The number of names of a file.
    """

    kind: Kind
    size_bytes: int = 0
    modified_ns: int = 0
    identity: tuple[int, int] | None = None
    is_link: bool = False
    version: str | None = None
    num_links: int = dataclasses.field(default=1, compare=False)


class Lock(Protocol):
    """The exclusive right to write a directory of steps."""

    def check(self) -> None:
        """Raises `LockedError` if the lock was lost, or its directory was moved or replaced."""

    def release(self) -> None:
        """Releases the lock; safe to call twice."""

    def drop(self) -> None:
        """Releases the lock without waiting; finalizers call it."""


class NewFile(Protocol):
    """A file under construction. Use it from one thread at a time."""

    def write(self, segments: Sequence[memoryview], offset: int) -> None:
        """Writes all segments, one after the other, from an offset on."""

    def finish(self, size_bytes: int) -> None:
        """Sets the size of the file; all bytes have been written."""

    def close(self) -> None:
        """Releases file and memory; safe to call twice."""


class TensorStoreAccess(Protocol):
    """How TensorStore reaches the store."""

    @property
    def has_driver(self) -> bool:
        """Whether TensorStore reads the store itself; else it reads a local copy."""
        ...

    def kvstore(self, directory: str) -> Mapping[str, Any]:
        """Returns the spec of a directory of arrays."""
        ...

    def context(self) -> Mapping[str, Any]:
        """Returns TensorStore's resources, with the credentials, which specs must not contain."""
        ...

    def redact(self, text: str) -> str:
        """Returns a message without credentials."""
        ...


class Storage(Protocol):
    """The operations of every store; `queries` has functions that combine them."""

    @property
    def objects(self) -> ConditionalObjects | None:
        """Operations of object stores; None for a file system."""
        ...

    @property
    def tensorstore(self) -> TensorStoreAccess:
        """How TensorStore reaches the store."""
        ...

    def stat(self, path: str, *, follow: bool = False) -> Stat | None:
        """Returns the status of a path; None only if it does not exist.

        Args:
            path: The path.
            follow: Whether to return the target's status if the path is a link.
        """
        ...

    def list(self, path: str) -> list[str]:
        """Returns the sorted names in a directory; none if it does not exist."""
        ...

    def walk(self, path: str) -> dict[str, Stat]:
        """Returns all entries below `path` that are not directories, by sorted relative path.

        Links are not followed.
        """
        ...

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Returns the content of a regular file, or a part of it; fewer bytes at its end."""
        ...

    def checksum(self, path: str) -> FileRecord:
        """Returns size and digest of a regular file."""
        ...

    def make_directory(self, path: str, *, parents: bool = True) -> None:
        """Creates a directory, which may exist.

        Args:
            path: The directory.
            parents: Whether to create its parents too; else a missing parent is an error.
        """

    def write(self, path: str, data: bytes) -> None:
        """Writes a file; neither content nor entry is durable before they are synced."""

    def create(self, path: str, size_bytes: int, *, is_direct: bool) -> NewFile:
        """Creates a file that is written from its first byte to its last.

        Args:
            path: The file; its directory exists.
            size_bytes: Its final size.
            is_direct: Whether to bypass the page cache, if there is one.
        """
        ...

    def put_file(self, source: str, path: str) -> None:
        """Copies a local file into the store; creates the directory of `path`."""

    def link(self, path: str, target: str) -> None:
        """Creates a link to `target`, a name beside it; object stores replace an existing link."""

    def share(self, path: str, source: str, expected: Stat) -> bool:
        """Creates a second name of a file, which becomes read-only; an object store copies it.

        Nothing is sent to a store but the request.

        Returns:
            False where the store cannot, and where the status of `source` is not the expected one:
            it was removed, replaced or changed. Then the file is to be written.
        """
        ...

    def sync(self, path: str) -> None:
        """Makes the content of a file, or the entries of a directory, durable."""

    def rename(self, source: str, target: str) -> None:
        """Renames a file or directory; a directory never replaces a non-empty one."""

    def swap(self, first: str, second: str) -> bool:
        """Exchanges two paths in one atomic step; returns False if the store cannot."""
        ...

    def remove(self, path: str) -> None:
        """Removes a file, or a directory with its content; nothing happens if it is absent."""

    def lock(self, path: str) -> Lock:
        """Takes the writer's lock at `path`; `LockedError` names the holder."""
        ...
