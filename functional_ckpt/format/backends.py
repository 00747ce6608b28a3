"""Arrays of items: written and read by system calls where possible, else through TensorStore."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.format import write_direct, write_tensorstore
from functional_ckpt.format.database import check_process
from functional_ckpt.format.index import Index, open_index
from functional_ckpt.format.read_direct import DirectReader
from functional_ckpt.format.read_store import StoreReader
from functional_ckpt.format.reader import ArrayReader
from functional_ckpt.format.write_direct import NUM_THREADS, Written
from functional_ckpt.format.write_tensorstore import ArrayWrite
from functional_ckpt.storage.base import Storage

_log = logging.getLogger("functional_ckpt")

Scalars: TypeAlias = Sequence[tuple[str, ArraySpec, object]]
Tied: TypeAlias = Mapping[str, tuple[str, ChunkGrid]]


class Arrays:
    """The arrays of a store's items.

    TensorStore writes to object stores; one index serves the readers of both.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._is_direct = storage.files is not None

    def write(
        self,
        item: str,
        child: str,
        arrays: Sequence[ArrayWrite],
        scalars: Scalars = (),
        tied: Tied | None = None,
        *,
        num_threads: int = NUM_THREADS,
    ) -> Written:
        """Writes arrays into one database; nothing is durable yet.

        Args:
            item: The item's directory.
            child: The database's directory relative to the item; empty for the item's own.
            arrays: What to write.
            scalars: Arrays of one chunk, given by value: name, spec, value.
            tied: Name of a tied leaf -> name and grid of the array that holds its bytes.
            num_threads: How many threads write data files; TensorStore has threads of its own.

        Raises:
            StorageError: The store refused.
        """
        # A tree has at least one key.
        if self._is_direct and (arrays or scalars):
            check_process()
            return write_direct.write_arrays(
                self._storage, item, child, arrays, scalars, tied, num_threads=num_threads
            )
        digests = write_tensorstore.write_arrays(self._storage, item, [child], arrays, scalars)
        for array in arrays:
            if array.on_copied is not None:
                array.on_copied(array.data.nbytes)
        if tied:
            write_tensorstore.merge_children(self._storage, item, (), tied)
        return Written(digests=digests, files={})

    def merge(self, item: str, children: Sequence[str], tied: Tied) -> Mapping[str, FileRecord]:
        """Makes every child's arrays visible in the item's own database; copies no data.

        Returns:
            The records of the new files, as far as they are known.
        """
        if self._is_direct:
            merged = write_direct.merge_children(self._storage, item, children, tied)
            if merged is not None:
                return merged
            _log.warning(
                "%s: some of its databases were written by TensorStore, which merges them too; "
                "that takes several times as long.",
                item,
            )
        write_tensorstore.merge_children(self._storage, item, children, tied)
        return {}

    def open_reader(self, item: str, files: Mapping[str, FileRecord]) -> ArrayReader:
        """Opens an item's arrays.

        Raises:
            CorruptCheckpointError: There is no readable database.
        """
        return self.reader(open_index(self._storage, item, files))

    def reader(self, index: Index) -> ArrayReader:
        """Returns a reader of an item whose index is open."""
        return DirectReader(index) if self._is_direct else StoreReader(index)
