"""OCDBT databases as bytes: a tree of keys that point into data files, encoded and decoded at once.

TensorStore builds such a tree key by key, at 10 microseconds each and one writer per database. With
all keys and value locations known, the same tree is written in one pass: a leaf node, and a
manifest that names it. The format is TensorStore's (its page on the `ocdbt` driver describes it),
and TensorStore reads the result; trees other than a single plain leaf are left to TensorStore.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import uuid
from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np

from functional_ckpt.core.arrays.chunks import MAX_INLINE_BYTES
from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.storage.base import Storage

__all__ = [
    "Entries",
    "MANIFEST",
    "MAX_KEYS",
    "MAX_NODE_BYTES",
    "Node",
    "decode_leaf",
    "decode_manifest",
    "encode_leaf",
    "encode_manifest",
    "is_inside",
    "read_entries",
]

MANIFEST = "manifest.ocdbt"
MAX_NODE_BYTES = 100_000_000
# A leaf with this many keys stays below the manifest's maximal node size.
MAX_KEYS = 250_000
_MANIFEST_MAGIC = 0x0CDB3A2A
_NODE_MAGIC = 0x0CDB20DE
_HEADER = struct.Struct(">I")
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES = 4 + 8 + 1 + 1
_FOOTER_BYTES = 4
_MAX_VARINT_BYTES = 10
_FEW = 32


@dataclasses.dataclass(slots=True)
class Entries:
    """Keys and the locations of their values, column by column.

    Attributes:
        keys: The keys, in any order, each once.
        files: For each key, the index of its data file in the table of files.
        offsets: The value's offset in that file.
        lengths: Bytes of the value.
    """

    keys: list[bytes] = dataclasses.field(default_factory=list[bytes])
    files: list[int] = dataclasses.field(default_factory=list[int])
    offsets: list[int] = dataclasses.field(default_factory=list[int])
    lengths: list[int] = dataclasses.field(default_factory=list[int])

    def add(self, key: bytes, file: int, offset: int, length: int) -> None:
        """Adds one key."""
        self.keys.append(key)
        self.files.append(file)
        self.offsets.append(offset)
        self.lengths.append(length)

    def extend(self, other: Entries) -> None:
        """Adds all of another's."""
        self.keys += other.keys
        self.files += other.files
        self.offsets += other.offsets
        self.lengths += other.lengths


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """Where a node is.

    Attributes:
        file: Its data file, relative to the database.
        offset: Its first byte there.
        length: Its bytes.
    """

    file: str
    offset: int
    length: int


# ------------------------------------------------------------------------------------ encoding


def encode_leaf(files: Sequence[str], entries: Entries) -> bytes:
    """Returns the leaf node of all entries.

    Args:
        files: The table of data files, relative to the database.
        entries: At least one, at most `MAX_KEYS`.
    """
    keys = entries.keys
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ordered = [keys[place] for place in order]
    shared = [0] * len(ordered)
    suffixes: list[bytes] = []
    previous = b""
    for place, key in enumerate(ordered):
        # Neighbours are chunks of one array: all before the chunk's key is common to them.
        end = previous.rfind(b"/") + 1
        if end and key.startswith(previous[:end]):
            shared[place] = end
            suffixes.append(key[end:])
        else:
            suffixes.append(key)
        previous = key
    at = np.array(order)
    body = b"".join(
        (
            b"\0",
            _encode_files(files),
            _varints([len(ordered)]),
            _varints(shared[1:]),
            _varints([len(suffix) for suffix in suffixes]),
            *suffixes,
            _varints(np.array(entries.lengths, np.uint64)[at]),
            b"\1" * len(ordered),
            _varints(np.array(entries.files, np.uint64)[at]),
            _varints(np.array(entries.offsets, np.uint64)[at]),
        )
    )
    return _seal(_NODE_MAGIC, body)


def encode_manifest(node: Node, entries: Entries, time_ns: int) -> bytes:
    """Returns the manifest of a database of one version, whose root is a leaf.

    Args:
        node: Where the leaf is.
        entries: Its entries.
        time_ns: When it was written, nanoseconds since the epoch.
    """
    config = b"".join(
        (
            uuid.uuid4().bytes,
            _varints([0, MAX_INLINE_BYTES, MAX_NODE_BYTES]),
            b"\4",  # arity of the tree of versions, as a power of two
            _varints([1]) + struct.pack("<i", 0),  # who adds to it compresses nodes with zstd
        )
    )
    version = b"".join(
        (
            _varints([1, 1]) + b"\0",  # one version, the first; the height of its root
            _varints([0, node.offset, node.length]),
            _varints([len(entries.keys), node.length, sum(entries.lengths)]),
            _LENGTH.pack(time_ns),
        )
    )
    return _seal(_MANIFEST_MAGIC, config + _encode_files([node.file]) + version + _varints([0]))


def _encode_files(files: Sequence[str]) -> bytes:
    paths = [file.encode() for file in files]
    zeros = [0] * len(paths)
    return b"".join(
        (
            _varints([len(paths)]),
            _varints(zeros[1:]),
            _varints([len(path) for path in paths]),
            _varints(zeros),  # no part of a path is handed down to children
            *paths,
        )
    )


def _varints(values: Any) -> bytes:
    """Seven bits a byte, the lowest first; the top bit marks that more follow."""
    if len(values) < _FEW:  # numpy's calls would cost more than the numbers
        return b"".join(map(_varint, map(int, values)))
    numbers = np.asarray(values, np.uint64)
    widths = np.ones(numbers.shape, np.int64)
    for place in range(1, _MAX_VARINT_BYTES):
        widths += numbers >= np.uint64(1) << np.uint64(7 * place)
    ends = np.cumsum(widths)
    encoded = np.empty(int(ends[-1]), np.uint8)
    for place in range(int(widths.max())):
        has = widths > place
        digits = (numbers[has] >> np.uint64(7 * place)).astype(np.uint8) & 0x7F
        more = (widths[has] > place + 1).astype(np.uint8) << 7
        encoded[(ends - widths)[has] + place] = digits | more
    return encoded.tobytes()


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _seal(magic: int, body: bytes) -> bytes:
    length = _HEADER_BYTES + len(body) + _FOOTER_BYTES
    content = _HEADER.pack(magic) + _LENGTH.pack(length) + b"\0\0" + body
    return content + _CHECKSUM.pack(google_crc32c.value(content))


# ------------------------------------------------------------------------------------ decoding


class _Unread(Exception):
    """A tree that this module does not write; TensorStore may read it."""


class _Reader:
    """The rest of an encoded record."""

    def __init__(self, magic: int, data: bytes) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self._end = len(data) - _FOOTER_BYTES
        self._at = _HEADER_BYTES
        is_plain = data[12:_HEADER_BYTES] == b"\0\0"
        if self._end < self._at or data[:4] != _HEADER.pack(magic) or not is_plain:
            raise _Unread
        checksum = _CHECKSUM.pack(google_crc32c.value(data[: self._end]))
        if _LENGTH.unpack_from(data, 4)[0] != len(data) or checksum != data[self._end :]:
            raise _Unread

    def take(self, count: int) -> bytes:
        """Returns the next bytes."""
        if not 0 <= count <= self._end - self._at:
            raise _Unread
        self._at += count
        return self._data[self._at - count : self._at].tobytes()

    def varints(self, count: int) -> Array:
        """Returns the next numbers, as int64."""
        if not count:
            return np.empty(0, np.int64)
        left = self._data[self._at : min(self._end, self._at + count * _MAX_VARINT_BYTES)]
        ends = np.flatnonzero(left < 0x80)[:count] + 1
        if len(ends) < count:
            raise _Unread
        widths = np.diff(ends, prepend=0)
        if widths.max() > 9:  # beyond 63 bits
            raise _Unread
        numbers = np.zeros(count, np.int64)
        starts = ends - widths
        for place in range(int(widths.max())):
            has = widths > place
            digits = left[starts[has] + place].astype(np.int64) & 0x7F
            numbers[has] |= digits << (7 * place)
        self._at += int(ends[-1])
        return numbers

    def varint(self) -> int:
        """One number."""
        return int(self.varints(1)[0])

    def files(self) -> list[str]:
        """Returns a table of data files."""
        count = self.varint()
        if count > self._end:
            raise _Unread
        shared = self.varints(max(0, count - 1)).tolist()
        lengths = self.varints(count).tolist()
        self.varints(count)
        paths: list[bytes] = []
        for length, common in zip(lengths, [0, *shared], strict=count > 0):
            paths.append((paths[-1][:common] if paths else b"") + self.take(length))
        return [path.decode() for path in paths]


def decode_manifest(data: bytes) -> Node | None:
    """Where the one leaf of a database is; None where it is no database of one plain leaf."""
    try:
        reader = _Reader(_MANIFEST_MAGIC, data)
        reader.take(16)
        if reader.varint() != 0:
            return None
        reader.varints(2)
        reader.take(1)
        if reader.varint():
            reader.take(4)
        files = reader.files()
        num_versions = reader.varint()
        if num_versions != 1 or reader.varint() < 1 or reader.take(1) != b"\0":
            return None
        file, offset, length = reader.varints(3).tolist()
        return Node(files[file], offset, length)
    except (_Unread, UnicodeDecodeError, IndexError, ValueError):
        return None


def decode_leaf(data: bytes) -> tuple[list[str], Entries] | None:
    """Files and entries of a leaf node; None where it holds values itself, or is none."""
    try:
        reader = _Reader(_NODE_MAGIC, data)
        if reader.take(1) != b"\0":
            return None
        files = reader.files()
        count = reader.varint()
        if not 0 < count <= len(data):
            return None
        shared = [0, *reader.varints(count - 1).tolist()]
        suffix_lengths = reader.varints(count).tolist()
        keys: list[bytes] = []
        previous = b""
        for common, length in zip(shared, suffix_lengths, strict=True):
            previous = previous[:common] + reader.take(length)
            keys.append(previous)
        lengths = reader.varints(count).tolist()
        if reader.take(count) != b"\1" * count:
            return None
        places, offsets = reader.varints(count), reader.varints(count)
        if places.max() >= len(files):
            return None
        return files, Entries(keys, places.tolist(), offsets.tolist(), lengths)
    except (_Unread, UnicodeDecodeError, ValueError):
        return None


def read_entries(
    storage: Storage, directory: str, manifest: bytes | None = None
) -> tuple[list[str], Entries] | None:
    """Returns data files and entries of a database that is one plain leaf; None for any other.

    Args:
        storage: The file system.
        directory: The database.
        manifest: Its manifest, where it was read before.
    """
    if manifest is None:
        manifest = storage.read(os.path.join(directory, MANIFEST))
    node = decode_manifest(manifest)
    if node is None or not is_inside(node.file):
        return None
    data = storage.read(os.path.join(directory, node.file), node.offset, node.length)
    return decode_leaf(data)


def is_inside(file: str) -> bool:
    """Returns whether a data file's path stays below its database."""
    return all(part not in ("", ".", "..") and "\0" not in part for part in file.split("/"))
