"""Reading the arrays of items: by system calls from files, by range requests from object stores."""

from __future__ import annotations

from collections.abc import Mapping

from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.format.index import Index, open_index
from functional_ckpt.format.read_direct import DirectReader
from functional_ckpt.format.read_store import StoreReader
from functional_ckpt.format.reader import ArrayReader
from functional_ckpt.storage.base import Storage


def open_reader(storage: Storage, item: str, files: Mapping[str, FileRecord]) -> ArrayReader:
    """Opens an item's arrays.

    Raises:
        CorruptCheckpointError: There is no readable database.
    """
    return reader_of(storage, open_index(storage, item, files))


def reader_of(storage: Storage, index: Index) -> ArrayReader:
    """Returns a reader of an item whose index is open."""
    return DirectReader(index) if storage.objects is None else StoreReader(index)
