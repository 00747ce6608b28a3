"""Looking into an item's database when something is wrong: which file holds which key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tensorstore as ts

from functional_ckpt import errors
from functional_ckpt.format.database import Database
from functional_ckpt.format.ocdbt import MANIFEST
from functional_ckpt.storage.base import Storage


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """Where the values of a database are.

    Attributes:
        files: Key -> file, relative to the item's directory, for every key that could be found.
        unreadable: Files whose part of the tree cannot be read; keys that were not found are there.
    """

    files: Mapping[str, str]
    unreadable: frozenset[str]


def read_values(
    database: Database, keys: Sequence[str]
) -> list[bytes | errors.CorruptCheckpointError | None]:
    """The values of many keys at a time: None where there is none, an error where it is damaged."""
    found: list[bytes | errors.CorruptCheckpointError | None] = []
    reads = [database.store.read(key) for key in keys]
    for key, read in zip(keys, reads, strict=True):
        try:
            result = read.result()
        except (ValueError, OSError) as error:
            why = database.storage.tensorstore.redact(str(error).splitlines()[0])
            text = f"{database.directory}: {key!r} cannot be read: {why}"
            found.append(errors.CorruptCheckpointError(text, path=database.directory))
        else:
            found.append(bytes(result.value) if result.state == "value" else None)
    return found


def locate(storage: Storage, directory: str) -> Places:
    """Walks the tree of the database in `directory`, skipping damaged nodes."""
    files: dict[str, str] = {}
    unreadable: set[str] = set()
    base: Any = ts.KvStore.open(
        storage.tensorstore.kvstore(directory),
        context=ts.Context(dict(storage.tensorstore.context())),
    ).result()
    try:
        manifest = ts.ocdbt.dump(base).result()
        location = manifest["versions"][-1]["root"].get("location")
    except (ValueError, OSError, KeyError, IndexError):
        return Places({}, frozenset([MANIFEST]))
    todo: list[tuple[str, bytes]] = [] if location is None else [(location, b"")]
    while todo:
        location, prefix = todo.pop()
        try:
            node = ts.ocdbt.dump(base, location).result()
        except (ValueError, OSError):
            unreadable.add(_file_of(location))
            continue
        for entry in node["entries"]:
            key = prefix + entry["key"]
            if "location" in entry:
                todo.append((entry["location"], prefix + entry["subtree_common_prefix"]))
            else:
                # A small value is stored in the node itself.
                place = _file_of(entry.get("indirect_value", location))
                files[key.decode("utf-8", "surrogateescape")] = place
    return Places(files, frozenset(unreadable))


def _file_of(location: str) -> str:
    """Returns the file of a reference, which is `kind:directory of a child:file:offset:length`."""
    _, directory, name, _, _ = location.split(":")
    return directory + name
