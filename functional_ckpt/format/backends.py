"""Where an item's arrays are written and read: by system calls, or through TensorStore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.format import write_direct, write_tensorstore
from functional_ckpt.format.database import check_process, open_for_reading, read_manifest
from functional_ckpt.format.ocdbt import MANIFEST, read_entries
from functional_ckpt.format.read_direct import DirectReader
from functional_ckpt.format.read_tensorstore import TensorStoreReader
from functional_ckpt.format.reader import ArrayReader
from functional_ckpt.format.write_direct import NUM_THREADS, Written
from functional_ckpt.format.write_tensorstore import ArrayWrite
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.system_errors import is_absence

__all__ = ["DirectArrays", "TensorStoreArrays", "backend_of"]

Scalars: TypeAlias = Sequence[tuple[str, ArraySpec, object]]
Tied: TypeAlias = Mapping[str, tuple[str, ChunkGrid]]


class TensorStoreArrays:
    """Arrays through TensorStore, in any store.

    Args:
        storage: The store.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

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
            scalars: 0-dim arrays given by value: name, spec, value.
            tied: Name of a tied leaf -> name and grid of the array that holds its bytes.
            num_threads: How many threads write; TensorStore has its own.

        Raises:
            StorageError: The store refused.
        """
        del num_threads
        digests = write_tensorstore.write_arrays(self._storage, item, [child], arrays, scalars)
        for array in arrays:
            if array.on_copied is not None:
                array.on_copied(array.data.nbytes)
        if tied:
            self.merge(item, (), tied)
        return Written(digests=digests, files={})

    def merge(self, item: str, children: Sequence[str], tied: Tied) -> Mapping[str, FileRecord]:
        """Makes every child's arrays visible in the item's own database; copies no data.

        Returns:
            The records of the new files, as far as they are known.
        """
        write_tensorstore.merge_children(self._storage, item, children, tied)
        return {}

    def open_reader(self, item: str, files: Mapping[str, FileRecord]) -> ArrayReader:
        """Opens an item's arrays.

        Args:
            item: The item's directory.
            files: The files in the item's record.

        Raises:
            CorruptCheckpointError: There is no readable database.
        """
        return TensorStoreReader(open_for_reading(item, self._storage, files))


class DirectArrays:
    """Arrays by system calls; trees that are not one plain leaf are left to TensorStore.

    Args:
        storage: The file system.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._other = TensorStoreArrays(storage)

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
        """Writes data files, each by a thread of its own, and the tree over them."""
        if not write_direct.can_write(arrays, 2 * len(scalars)):
            return self._other.write(item, child, arrays, scalars, tied)
        check_process()
        return write_direct.write_arrays(
            self._storage, item, child, arrays, scalars, tied, num_threads=num_threads
        )

    def merge(self, item: str, children: Sequence[str], tied: Tied) -> Mapping[str, FileRecord]:
        """Writes the children's trees as one."""
        merged = write_direct.merge_children(self._storage, item, children, tied)
        return self._other.merge(item, children, tied) if merged is None else merged

    def open_reader(self, item: str, files: Mapping[str, FileRecord]) -> ArrayReader:
        """Reads the tree."""
        check_process()
        manifest = read_manifest(self._storage, item, files.get(MANIFEST))
        try:
            found = read_entries(self._storage, item, manifest)
        except errors.StorageError as error:
            if not is_absence(error):
                raise
            raise errors.CorruptCheckpointError(
                f"{item}: the data file with the item's tree is missing.", path=item
            ) from error
        return self._other.open_reader(item, files) if found is None else DirectReader(item, *found)


def backend_of(storage: Storage) -> DirectArrays | TensorStoreArrays:
    """Returns the backend for a store."""
    return TensorStoreArrays(storage) if storage.files is None else DirectArrays(storage)
