"""The journal of removals that take more than one rename.

    <root>/.functional_ckpt/removing.json    steps that exist but are hidden

It serves to remove several steps at once, and directories that the file system refuses to move
(EXDEV, in the lower layer of an overlay). It names the directories and the digests of their
records, so that it does not apply to a later step of the same name. Readers ignore these
directories; the next writer completes the removal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.core.records import orbax, records
from functional_ckpt.core.tree import plain_json
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.queries import exists, read_optional


def read_journal(storage: Storage, path: str, what: str) -> dict[str, Any] | None:
    """Returns the content of a journal; None if there is none.

    Raises:
        CorruptCheckpointError: It is no JSON object.
    """
    if not exists(storage, path) or (data := read_optional(storage, path)) is None:
        return None  # in the second case its writer has just removed it
    try:
        record = plain_json.parse(data)
    except ValueError as error:
        record, why = None, str(error)
    else:
        why = f"expected an object, got {type(record).__name__}"
    if not isinstance(record, dict):
        raise errors.CorruptCheckpointError(
            f"{path}: unreadable {what} ({why}). Check the directory and remove the file.",
            path=path,
        )
    return cast("dict[str, Any]", record)


def name_in_directory(name: object, path: str) -> str:
    """Returns a name from the journal at `path`; raises unless it stays in its directory."""
    if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
        raise errors.CorruptCheckpointError(
            f"{path}: {name!r} is not a name inside the directory.", path=path
        )
    return name


_JOURNAL = "removing.json"


class RemovalJournal:
    """The steps of a directory that are hidden and still to be removed."""

    def __init__(
        self, storage: Storage, root: str, hidden: str, replace: Callable[[str, bytes], None]
    ) -> None:
        self._storage = storage
        self._root = root
        self._hidden = hidden
        self._path = os.path.join(hidden, _JOURNAL)
        self._replace = replace

    def hide(self, names: Iterable[str]) -> None:
        """Hides directories, all at once; durable when it returns."""
        marks = self._read()
        marks |= {name: self._identity(os.path.join(self._root, name)) for name in names}
        self._storage.make_directory(self._hidden)
        self._write(marks)

    def unhide(self, names: Iterable[str]) -> None:
        """Removes directories from the journal: they were removed, or become visible again."""
        self.keep_only(self._read().keys() - set(names))

    def keep_only(self, names: Iterable[str]) -> None:
        """Removes all directories but some from the journal."""
        kept, marks = set(names), self._read()
        left = {name: mark for name, mark in marks.items() if name in kept}
        if left != marks:
            self._write(left)

    def hidden_names(self) -> set[str]:
        """Returns the names of the hidden directories."""
        return {
            name
            for name, mark in self._read().items()
            if self._is_or_was(os.path.join(self._root, name), mark)
        }

    def _identity(self, path: str) -> str:
        """Returns the identity of a commit: its record's name and digest; "" without one."""
        for file in (records.EXTENSION_FILE, orbax.CHECKPOINT_METADATA_FILE):
            if (digest := self._digest(os.path.join(path, file))) is not None:
                return f"{file} {digest}"
        return ""

    def _is_or_was(self, path: str, mark: str) -> bool:
        """Returns whether a directory is the recorded one, or the rest of it."""
        file, _, digest = mark.partition(" ")
        if not file:
            return self._identity(path) == ""
        return self._digest(os.path.join(path, file)) in (None, digest)

    def _digest(self, path: str) -> str | None:
        data = read_optional(self._storage, path)
        return None if data is None else records.digest_hex(data)

    def _read(self) -> dict[str, str]:
        record = read_journal(self._storage, self._path, "journal of steps being removed")
        if record is None:
            return {}
        names = record.get("names")
        if not isinstance(names, Mapping):
            raise errors.CorruptCheckpointError(
                f"{self._path}: unreadable journal of steps being removed (no names). Check the "
                "directory and remove the file.",
                path=self._path,
            )
        return {name_in_directory(name, self._path): str(mark) for name, mark in names.items()}

    def _write(self, marks: Mapping[str, str]) -> None:
        if marks:
            self._replace(self._path, json.dumps({"names": dict(marks)}).encode())
        else:
            self._storage.remove(self._path)
            self._storage.sync(self._hidden)
