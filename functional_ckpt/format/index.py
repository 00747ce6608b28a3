"""The index of an item's database: where the value of each key is stored.

Every reader uses it: of local files, of object stores, and `verify`. Only nodes that hold wanted
keys are read, each once.
"""

from __future__ import annotations

import bisect
import functools
import operator
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from functional_ckpt import errors
from functional_ckpt.core.records.orbax import MANIFEST
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.format.node_tree import DamagedNode, Fetch, Leaf, NodeTree
from functional_ckpt.format.ocdbt import Span
from functional_ckpt.format.ocdbt_decode import (
    INLINE,
    DecodedNode,
    InvalidNodeError,
    decode_manifest,
    decode_node,
)
from functional_ckpt.format.process import check_process
from functional_ckpt.format.read_plan import (
    Batch,
    Located,
    Location,
    ReadRequest,
    adjacent,
    plan_reads,
)
from functional_ckpt.format.step_files import read_manifest, truncated
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.system_errors import absence_as_damage

_ReadSpans = Callable[[Sequence[Span]], "list[bytes | errors.CheckpointError]"]
"""Reads spans of data files; an error instead of one that cannot be read."""


class _ValueRead(NamedTuple):
    file: int
    offset: int
    num_bytes: int
    key: bytes


class Index:
    """Locations of values, as far as they were wanted. Safe to use from any thread.

    `locations` holds the index of the file, offset and length for every key in a loaded node;
    `inline` the values that are stored inside nodes.
    """

    def __init__(self, directory: str, tree: NodeTree, read_spans: _ReadSpans) -> None:
        self.directory = directory
        self.files: list[str] = []
        self.locations: dict[bytes, Location] = {}
        self.inline = bytearray()
        self.read_spans = read_spans
        self._inline_files: list[tuple[int, str]] = []  # where the values of each node end
        self._tree = tree
        self._numbers: dict[str, int] = {}
        self._loading = threading.Lock()
        if tree.is_leaf:
            self.load(None)

    @property
    def damaged(self) -> Sequence[DamagedNode]:
        """The nodes that could not be read."""
        return self._tree.damaged

    def plan(
        self,
        requests: Sequence[ReadRequest],
        delivered: Collection[tuple[int, tuple[int, ...]]] = (),
    ) -> list[Batch]:
        """Plans the reads of requests, once the locations of their chunks are loaded."""

        def locate(keys: Collection[bytes]) -> Mapping[bytes, Location]:
            self.load(keys)
            return self.locations

        return plan_reads(requests, locate, path=self.directory, delivered=delivered)

    def load(self, keys: Collection[bytes] | None) -> None:
        """Loads the locations of keys; of all for None.

        Raises:
            CorruptCheckpointError: A node is damaged.
            StorageError: The store refused.
        """
        with self._loading:
            for leaf in self._tree.read(keys):
                self._add(leaf)

    def file_of(self, key: bytes) -> str:
        """Returns the file of a loaded key: a data file, or that of the node with the value."""
        number, offset, _ = self.locations[key]
        if number != INLINE:
            return self.files[number]
        after = bisect.bisect_right(self._inline_files, offset, key=operator.itemgetter(0))
        return self._inline_files[after][1]

    def damage_of(self, key: bytes) -> DamagedNode | None:
        """Returns the damaged node that may hold a key."""
        for node in self._tree.damaged:
            if node.low <= key and (node.high is None or key < node.high):
                return node
        return None

    def read_values(
        self, keys: Sequence[bytes], max_bytes: int
    ) -> dict[bytes, bytes | errors.CheckpointError]:
        """Reads small values; returns an error instead of one that cannot be read.

        Args:
            keys: Loaded keys, in the order of their locations.
            max_bytes: The size of the largest value; a larger one is damage.
        """
        values: dict[bytes, bytes | errors.CheckpointError] = {}
        reads: list[_ValueRead] = []
        for key in keys:
            file, offset, size = self.locations[key]
            if size > max_bytes:
                values[key] = errors.CorruptCheckpointError(
                    f"expected at most {max_bytes:,} bytes, got {size:,}"
                )
            elif file == INLINE:
                values[key] = bytes(self.inline[offset : offset + size])
            else:
                reads.append(_ValueRead(file, offset, size, key))
        runs = list(adjacent(reads))
        for run, data in self._contents(runs):
            if isinstance(data, errors.CheckpointError) and len(run) > 1:  # of some of them
                for each, part in self._contents([[read] for read in run]):
                    values[each[0].key] = part
                continue
            for _, offset, size, key in run:
                start = offset - run[0].offset
                is_error = isinstance(data, errors.CheckpointError)
                values[key] = data if is_error else data[start : start + size]
        return values

    def _contents(
        self, runs: Sequence[list[_ValueRead]]
    ) -> Iterator[tuple[list[_ValueRead], bytes | errors.CheckpointError]]:
        spans = [span_of(self.files, run) for run in runs]
        return zip(runs, self.read_spans(spans), strict=True)

    def _add(self, leaf: Leaf) -> None:
        node = leaf.node
        table = [self._number(file) for file in node.files]
        table.append(INLINE)  # which is at the index INLINE
        files, offsets, lengths = node.entries.files, node.entries.offsets, node.entries.lengths
        if node.inline:
            start = len(self.inline)
            self.inline += node.inline
            self._inline_files.append((len(self.inline), leaf.file))
            pairs = zip(files, offsets, strict=True)
            offsets = [offset + start if file == INLINE else offset for file, offset in pairs]
        parts = zip(map(table.__getitem__, files), offsets, lengths, strict=True)
        self.locations.update(zip(leaf.keys, parts, strict=True))

    def _number(self, file: str) -> int:
        number = self._numbers.setdefault(file, len(self.files))
        if number == len(self.files):
            self.files.append(file)
        return number


def open_index(
    storage: Storage,
    directory: str,
    files: Mapping[str, FileRecord] | None = None,
    *,
    skips_damage: bool = False,
) -> Index:
    """Opens the index of an item's database.

    With `skips_damage`, damaged nodes are collected instead of raising.

    Raises:
        CorruptCheckpointError: There is no readable database.
        StorageError: The store refused.
    """
    check_process()
    read_spans = span_reader(storage, directory)
    tree = open_tree(storage, directory, read_spans, files, skips_damage=skips_damage)
    return Index(directory, tree, read_spans)


def open_tree(
    storage: Storage,
    directory: str,
    read_spans: _ReadSpans,
    files: Mapping[str, FileRecord] | None = None,
    *,
    skips_damage: bool = False,
) -> NodeTree:
    """Opens the tree of a database; `open_index` describes arguments and errors."""
    manifest = read_manifest(storage, directory, (files or {}).get(MANIFEST))
    root = decode_manifest(manifest)
    if root is None:
        from functional_ckpt.format import tensorstore_index

        root, fetch = tensorstore_index.dumped(storage, directory)
    else:
        fetch = _decoded(read_spans)
    return NodeTree(directory, fetch, root, skips_damage=skips_damage)


# ------------------------------------------------------------------------------------ nodes


def _decoded(read_spans: _ReadSpans) -> Fetch:
    """Returns a reader of plain nodes."""

    def fetch(spans: Sequence[Span]) -> list[DecodedNode | Exception]:
        return [_decode(data) for data in read_spans(spans)]

    return fetch


def _decode(data: bytes | errors.CheckpointError) -> DecodedNode | Exception:
    if isinstance(data, errors.CheckpointError):
        return data
    try:
        return decode_node(data)
    except InvalidNodeError as error:
        return error


# ------------------------------------------------------------------------------------ spans


def span_of(files: Sequence[str], run: Sequence[Located]) -> Span:
    """Returns the bytes of a run of `adjacent`."""
    first = run[0]
    end = max([read.offset + read.num_bytes for read in run])
    return Span(files[first.file], first.offset, end - first.offset)


def span_reader(storage: Storage, directory: str) -> _ReadSpans:
    """Returns a reader of parts of an item's data files: of many at a time from a store."""
    if storage.objects is None:
        return lambda spans: [_read_span(storage, directory, span) for span in spans]
    if storage.tensorstore.has_driver:
        from functional_ckpt.format import database, tensorstore_index

        return tensorstore_index.read_spans(database.open_files_for_reading(directory, storage))

    def read(spans: Sequence[Span]) -> list[bytes | errors.CheckpointError]:
        found: dict[int, bytes | errors.CheckpointError] = {}

        def read_one(number: int) -> None:
            found[number] = _read_span(storage, directory, spans[number])

        tasks = [functools.partial(read_one, number) for number in range(len(spans))]
        queries.run_requests(storage, tasks)
        return [found[number] for number in range(len(spans))]

    return read


def _read_span(storage: Storage, directory: str, span: Span) -> bytes | errors.CheckpointError:
    path = os.path.join(directory, span.file)
    try:
        with absence_as_damage(f"{path}: the file is missing.", path):
            data = storage.read(path, span.offset, span.length)
    except errors.CheckpointError as error:
        return error
    return data if len(data) == span.length else truncated(path, span.offset, span.length)
