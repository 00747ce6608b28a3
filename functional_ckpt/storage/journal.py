"""Journals: small JSON objects that name directories, written before a change of several steps."""

from __future__ import annotations

from typing import Any, cast

from functional_ckpt import errors
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
