"""Encodes the tree of a database: leaves in the order of keys, and parents until one node is left.

TensorStore builds such a tree key by key, at 10 microseconds each. Here all keys and locations are
known, and each node is written as it is encoded. Keys are single ones, or runs: the chunks of an
array that many ranks wrote, whose keys are those of other arrays behind another prefix, and whose
files are those of other arrays too. Both are encoded once.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.format.ocdbt import (
    NODE_MAGIC,
    Column,
    Entries,
    Root,
    Span,
    encode_files,
    seal,
    varint,
    varints,
)
from functional_ckpt.format.tuning import MAX_NODE_BYTES, RUN_KEYS

_ENTRY_BYTES = 32  # of an entry beside its key, in memory
_FEW = 32
_MAX_TABLES = 256

_Append: TypeAlias = Callable[[bytes], Span]


class RunKeys(NamedTuple):
    """Sorted ends of keys, the same for many arrays.

    Attributes:
        suffixes: Each end.
        column: All of them, encoded.
        lengths: Their lengths, encoded.
    """

    suffixes: Sequence[bytes]
    column: Column
    lengths: Column

    @classmethod
    def of(cls, suffixes: Sequence[bytes]) -> RunKeys:
        """Returns sorted ends of keys."""
        column = Column.of_strings(suffixes)
        return cls(suffixes, column, Column.of_numbers(np.diff(column.ends)))


class Run(NamedTuple):
    """Many keys with the same prefix, of values of one length.

    Attributes:
        prefix: The first bytes of each.
        keys: The ends.
        files: For each key, the number of its data file in the table of files.
        offsets: Its first byte there.
        length: Bytes of a value.
    """

    prefix: bytes
    keys: RunKeys
    files: Array
    offsets: Array
    length: int

    def key(self, number: int) -> bytes:
        """Returns a complete key."""
        return self.prefix + self.keys.suffixes[number]


class _Part(NamedTuple):
    """Consecutive keys of a leaf. All but the numbers of files is encoded."""

    low: bytes
    num_keys: int
    shared: bytes  # for each key but the first, bytes that it shares with the one before
    key_lengths: bytes
    keys: bytes
    lengths: bytes
    offsets: bytes
    files: Array
    value_bytes: int


def encode_tree(
    files: Sequence[str], entries: Entries, append: _Append, runs: Sequence[Run] = ()
) -> Root:
    """Encodes a tree, leaves first, and returns its root.

    Args:
        files: The table of data files, relative to the database.
        entries: Single keys; with those of runs at least one.
        append: Writes a node to a data file and returns its location.
        runs: Runs of keys.
    """
    leaves = _Leaves(files, append)
    runs = sorted(runs, key=lambda run: run.key(0))
    if runs and not _are_apart(runs, sorted(entries.keys)):
        for run in runs:
            for number, (file, offset) in enumerate(zip(run.files, run.offsets, strict=True)):
                entries.add(run.key(number), int(file), int(offset), run.length)
        runs = []
    keys = entries.keys
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ordered = [keys[number] for number in order]
    at = np.array(order, np.int64)
    numbers = np.array(entries.files, np.int64)[at]
    offsets = np.array(entries.offsets, np.int64)[at]
    lengths = np.array(entries.lengths, np.int64)[at]
    starts = [bisect.bisect_left(ordered, run.key(0)) for run in runs]
    for run, (start, end) in zip(
        [None, *runs], itertools.pairwise([0, *starts, len(keys)]), strict=True
    ):
        if run is not None:
            leaves.add_run(run)
        if start < end:
            cut = slice(start, end)
            leaves.add_keys(ordered[cut], numbers[cut], offsets[cut], lengths[cut])
    nodes = leaves.finish()
    while len(nodes) > 1:
        nodes = [_encode_parent(nodes[cut], append) for cut in _cuts([node.low for node in nodes])]
    return nodes[0]


def _are_apart(runs: Sequence[Run], keys: Sequence[bytes]) -> bool:
    """Returns whether no other key is between the first and the last key of a run.

    There is one if an array is called like a chunk: `a` and `a/c/1`.
    """
    lasts = [run.key(-1) for run in runs]
    return all(
        bisect.bisect(keys, run.key(0)) == bisect.bisect(keys, last)
        for run, last in zip(runs, lasts, strict=True)
    ) and all(last < run.key(0) for last, run in zip(lasts, runs[1:], strict=False))


class _Leaves:
    """Leaves, written one after the other."""

    def __init__(self, files: Sequence[str], append: _Append) -> None:
        self._append = append
        self._nodes: list[Root] = []
        self._parts: list[_Part] = []  # of the next leaf
        self._size_bytes = 0

        @functools.lru_cache(maxsize=_MAX_TABLES)
        def table(numbers: bytes) -> tuple[bytes, bytes]:
            found, local = np.unique(np.frombuffer(numbers, np.int64), return_inverse=True)
            used: list[int] = found.tolist()
            return encode_files([files[number] for number in used]), varints(local)

        self._table = table

    def add_keys(
        self, keys: Sequence[bytes], numbers: Array, offsets: Array, lengths: Array
    ) -> None:
        """Adds sorted keys, which follow those before."""
        ends = np.cumsum(np.fromiter(map(len, keys), np.int64, len(keys)) + _ENTRY_BYTES)
        start, before = 0, 0
        while start < len(keys):
            space = MAX_NODE_BYTES - self._size_bytes
            end = int(np.searchsorted(ends, before + space, side="right"))
            if end == start and self._parts:
                self._close()
                continue
            cut = slice(start, max(end, start + 1))
            part = part_of(keys[cut], numbers[cut], offsets[cut], lengths[cut])
            start, after = cut.stop, int(ends[cut.stop - 1])
            self._add(part, after - before)
            before = after

    def add_run(self, run: Run) -> None:
        """Adds a run, whose keys follow those before.

        A long one has leaves of its own, so that a rank that reads a few of its chunks reads the
        locations of few others.
        """
        count = len(run.files)
        key_bytes = len(run.prefix) + len(max(run.keys.suffixes, key=len)) + _ENTRY_BYTES
        is_long = count >= 2 * RUN_KEYS
        step = min(RUN_KEYS if is_long else count, max(1, MAX_NODE_BYTES // key_bytes))
        offsets = Column.of_numbers(run.offsets)
        for start in range(0, count, step):
            end = min(start + step, count)
            size_bytes = (end - start) * key_bytes
            if is_long or self._size_bytes + size_bytes > MAX_NODE_BYTES:
                self._close()
            self._add(_part_of_run(run, offsets, start, end), size_bytes)

    def finish(self) -> list[Root]:
        """Returns all leaves."""
        self._close()
        return self._nodes

    def _add(self, part: _Part, size_bytes: int) -> None:
        self._parts.append(part)
        self._size_bytes += size_bytes

    def _close(self) -> None:
        parts = self._parts
        if not parts:
            return
        self._parts, self._size_bytes = [], 0
        table, numbers = self._table(b"".join([part.files.tobytes() for part in parts]))
        span = self._append(encode_leaf(parts, table, numbers))
        count = sum(part.num_keys for part in parts)
        value_bytes = sum(part.value_bytes for part in parts)
        self._nodes.append(Root(span, 0, count, span.length, value_bytes, parts[0].low))


def encode_leaf(parts: Sequence[_Part], table: bytes, numbers: bytes) -> bytes:
    """Returns a leaf.

    Args:
        parts: Its keys.
        table: Its data files.
        numbers: For each key, the number of its file in that table.
    """
    count = sum(part.num_keys for part in parts)
    body = (
        b"\0",
        table,
        varint(count),
        b"\0".join([part.shared for part in parts]),
        *(part.key_lengths for part in parts),
        *(part.keys for part in parts),
        *(part.lengths for part in parts),
        b"\1" * count,
        numbers,
        *(part.offsets for part in parts),
    )
    return seal(NODE_MAGIC, b"".join(body))


def part_of(keys: Sequence[bytes], files: Array, offsets: Array, lengths: Array) -> _Part:
    """Returns keys that follow each other in a leaf."""
    shared: list[int] = []
    suffixes: list[bytes] = [keys[0]]
    for previous, key in itertools.pairwise(keys):
        # Neighbours are chunks of one array: all before the chunk's key is common to them.
        end = previous.rfind(b"/") + 1
        if end and not key.startswith(previous[:end]):
            end = 0
        shared.append(end)
        suffixes.append(key[end:] if end else key)
    return _Part(
        keys[0],
        len(keys),
        varints(shared),
        varints([len(suffix) for suffix in suffixes]),
        b"".join(suffixes),
        varints(lengths),
        varints(offsets),
        files,
        int(lengths.sum()),
    )


def _part_of_run(run: Run, offsets: Column, start: int, end: int) -> _Part:
    low, count = run.key(start), end - start
    return _Part(
        low,
        count,
        varint(len(run.prefix)) * (count - 1),
        varint(len(low)) + run.keys.lengths.part(start + 1, end),
        low + run.keys.column.part(start + 1, end),
        varint(run.length) * count,
        offsets.part(start, end),
        run.files[start:end],
        run.length * count,
    )


def _cuts(keys: Sequence[bytes]) -> Iterator[slice]:
    """Yields the range of each parent; every range but the last has two children or more."""
    if len(keys) < _FEW:
        yield slice(0, len(keys))
        return
    sizes = np.fromiter(map(len, keys), np.int64, len(keys)) + _ENTRY_BYTES
    groups = np.cumsum(sizes) // max(MAX_NODE_BYTES, 2 * int(sizes.max()))
    starts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        yield slice(start, end)


def _encode_parent(children: Sequence[Root], append: _Append) -> Root:
    height = children[0].height + 1
    files = list(dict.fromkeys(child.span.file for child in children))
    body = (
        bytes([height]),
        encode_files(files),
        varints([len(children)]),
        bytes(len(children) - 1),
        varints([len(child.low) for child in children]),
        bytes(len(children)),  # no part of a key is omitted in the child
        *(child.low for child in children),
        varints([files.index(child.span.file) for child in children]),
        varints([child.span.offset for child in children]),
        varints([child.span.length for child in children]),
        varints([child.num_keys for child in children]),
        varints([child.tree_bytes for child in children]),
        varints([child.value_bytes for child in children]),
    )
    span = append(seal(NODE_MAGIC, b"".join(body)))
    return Root(
        span,
        height,
        sum(child.num_keys for child in children),
        sum(child.tree_bytes for child in children) + span.length,
        sum(child.value_bytes for child in children),
        children[0].low,
    )
