"""Where every value of a database lies, read without TensorStore."""

from __future__ import annotations

import os

from functional_ckpt.storage.arrays_ocdbt import Entries, decode_leaf, decode_manifest
from functional_ckpt.storage.paths import LocalStorage

__all__ = ["MANIFEST", "is_inside", "read_entries"]

MANIFEST = "manifest.ocdbt"


def read_entries(storage: LocalStorage, directory: str) -> tuple[list[str], Entries] | None:
    """Data files and entries of a database that is one plain leaf; None where it is another."""
    place = decode_manifest(storage.read(os.path.join(directory, MANIFEST)))
    if place is None or not is_inside(place.file):
        return None
    data = storage.read_range(os.path.join(directory, place.file), place.offset, place.length)
    return decode_leaf(data)


def is_inside(file: str) -> bool:
    """Whether a data file's path leads nowhere but below its database."""
    return all(part not in ("", ".", "..") and "\0" not in part for part in file.split("/"))
