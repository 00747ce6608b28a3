"""What a store must offer so that steps can be kept in it; `paths` and `objects` are the two kinds.

Paths are strings: absolute ones of the local file system, or URIs such as `s3://bucket/run/7`.
Both are joined and taken apart with `os.path`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from functional_ckpt.core.records.records import FileRecord

__all__ = ["Lock", "Storage"]


class Lock(Protocol):
    """The right to write into one directory of steps."""

    def release(self) -> None:
        """Lets the next writer in; safe to call twice."""


class Storage(Protocol):
    """Few operations, announced to `operation`, with clear errors. Safe to use from any thread."""

    @property
    def num_requests(self) -> int:
        """How many small requests are worth having under way at once."""
        ...

    def operation(self, kind: str, path: str) -> None:
        """Called before every operation that changes or reads the store."""

    def read(self, path: str) -> bytes:
        """The content of a file."""
        ...

    def exists(self, path: str) -> bool:
        """Whether anything is at `path`."""
        ...

    def is_directory(self, path: str) -> bool:
        """Whether a directory is at `path`."""
        ...

    def is_committed(self, path: str) -> bool:
        """Whether `path` is a directory that was written to its end."""
        ...

    def commit_id(self, path: str) -> str | None:
        """Tells what was committed at `path` from anything else there before or after; else None.

        None for what is no directory, a link, or not committed.
        """
        ...

    def directory_id(self, path: str) -> str | None:
        """Tells a directory from another one made later under its name; None where there is none.

        Always the same where directories are nothing but prefixes.
        """
        ...

    def is_link(self, path: str) -> bool:
        """Whether a link is at `path`."""
        ...

    def kind(self, path: str, *, follow: bool = False) -> str:
        """What is at a path, for people: `a file`, `a directory`, `a link`, `nothing`, ..."""
        ...

    def list(self, path: str) -> list[str]:
        """Sorted names in a directory; empty when it does not exist."""
        ...

    def walk(self, path: str) -> list[str]:
        """Sorted paths, relative to `path`, of the files below it; links are never followed."""
        ...

    def sizes(self, path: str) -> dict[str, int]:
        """The size of every file below `path`, by its path relative to that."""
        ...

    def modified_ns(self, path: str) -> int:
        """When it was changed, nanoseconds since the epoch; 0 where that is not known."""
        ...

    def age_seconds(self, path: str) -> float:
        """How long ago a file was changed; zero for one that is not there any more."""
        ...

    def checksum(self, path: str) -> FileRecord:
        """Size and digest of a regular file."""
        ...

    def total_bytes(self, path: str) -> int:
        """Sum of the sizes of every file below `path`."""
        ...

    def make_directory(self, path: str, *, parents: bool = True) -> None:
        """Creates a directory; nothing happens when it exists.

        Args:
            path: The directory.
            parents: Whether to create its parents too; else an absent parent is an error.
        """

    def write(self, path: str, data: bytes) -> None:
        """Creates a file; neither its content nor its entry is durable before they are synced."""

    def replace(self, path: str, data: bytes) -> None:
        """Writes a file durably; a reader, and a crash, see the old content or the new."""

    def replace_link(self, path: str, target: str, temporary: str) -> None:
        """Points the link `path` at `target`, a name beside it, atomically and durably."""

    def sync(self, path: str) -> None:
        """Makes the content of an existing file durable."""

    def sync_directory(self, path: str) -> None:
        """Makes the entries of a directory durable."""

    def rename(self, source: str, target: str) -> None:
        """Renames a file or directory; a directory never replaces one that has entries."""

    def swap(self, first: str, second: str) -> bool:
        """Swaps two paths in one atomic step; False where the system cannot."""
        ...

    def remove(self, path: str) -> None:
        """Removes a file, or a directory and all in it; nothing happens when it is absent."""

    def lock(self, path: str) -> Lock:
        """Takes the writer's lock at `path`; `LockedError` names the holder."""
        ...

    def put_file(self, source: str, path: str) -> None:
        """Copies a file of the local file system into the store, all of it or none."""

    def kvstore(self, directory: str) -> Mapping[str, Any]:
        """TensorStore's spec of a directory, where arrays are read and written."""
        ...

    def context(self) -> Mapping[str, Any]:
        """TensorStore's resources for it, credentials among them: no spec repeats those."""
        ...

    def flush_arrays(self, directory: str) -> None:
        """Makes what was written through `kvstore` part of the store."""

    def redact(self, text: str) -> str:
        """A message without what is secret."""
        ...
