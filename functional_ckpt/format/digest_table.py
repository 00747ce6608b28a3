"""The digests of an item's arrays: in its record, or in a table of the index file if they are many.

Of a table, the pages that are asked for are read, each compared with its digest in the record. So a
rank that restores its part of a large checkpoint reads few digests of the others.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

from functional_ckpt import errors
from functional_ckpt.core.arrays.digests import DigestText
from functional_ckpt.core.records.records import (
    DIGEST_BYTES,
    PAGE_BYTES,
    DigestTable,
    ItemRecord,
    digest_hex,
)
from functional_ckpt.storage.base import Storage


class ItemDigests:
    """The digests of one item. Safe to use from any thread."""

    def __init__(self, storage: Storage, directory: str, record: ItemRecord) -> None:
        self._record = record
        self._pages: _Pages | None = None
        self._starts: dict[str, int] = {}
        if record.table is not None:
            self._pages = _Pages(storage, os.path.join(directory, record.table.file), record.table)
            end = 0
            for name, array in record.arrays.items():
                self._starts[name], end = end, end + array.num_in_table

    def of(self, name: str) -> DigestText:
        """Returns the digests of an array; those of a table are read when they are used."""
        array = self._record.arrays[name]
        if self._pages is None:
            return array.xxh3
        return _TableText(self._pages, self._starts[name], array.num_in_table)


class _Pages:
    """The pages of a table that were read."""

    def __init__(self, storage: Storage, path: str, table: DigestTable) -> None:
        self._storage = storage
        self._path = path
        self._table = table
        self._read: dict[int, bytes] = {}
        self._mutex = threading.Lock()

    def digests(self, start: int, end: int) -> str:
        """Returns digests `start` to `end` of the table, one at least.

        Raises:
            CorruptCheckpointError: A page was changed.
            StorageError: The store refused.
        """
        begin, stop = start * DIGEST_BYTES, end * DIGEST_BYTES
        first, last = begin // PAGE_BYTES, (stop - 1) // PAGE_BYTES
        data = self._page(first)
        if first != last:
            data = b"".join([data, *map(self._page, range(first + 1, last + 1))])
        begin -= first * PAGE_BYTES
        return data[begin : begin + stop - start * DIGEST_BYTES].hex()

    def _page(self, number: int) -> bytes:
        found = self._read.get(number)
        if found is not None:
            return found
        with self._mutex:  # each is read once
            if number not in self._read:
                self._read[number] = self._read_page(number)
            return self._read[number]

    def _read_page(self, number: int) -> bytes:
        table, start = self._table, number * PAGE_BYTES
        length = min(PAGE_BYTES, table.num_digests * DIGEST_BYTES - start)
        found = self._storage.read(self._path, table.offset + start, length)
        if digest_hex(found) != table.pages[16 * number : 16 * number + 16]:
            raise errors.CorruptCheckpointError(
                f"{self._path}: the digests at byte {table.offset + start:,} were changed.",
                path=self._path,
            )
        return found


class _TableText(NamedTuple):
    """A `DigestText` of a table."""

    pages: _Pages
    start: int
    num_digests: int

    def digits(self, start: int, end: int) -> str:
        """Returns digits `start` to `end`."""
        first, last = start // 16, min(-(-end // 16), self.num_digests)
        text = self.pages.digests(self.start + first, self.start + last) if first < last else ""
        return text[start - 16 * first : end - 16 * first]
