"""Decoding of OCDBT nodes and manifests: plain ones from bytes, compressed ones by TensorStore.

Plain ones are those that `ocdbt` encodes. TensorStore compresses, stores small values inside nodes
and keeps several versions; its own decoder returns such a node as Python objects, 3 microseconds a
key. Both give the same records. Bytes from outside are not trusted: every count is bounded by the
bytes that are there before memory is taken for it.
"""

from __future__ import annotations

import array
from collections.abc import Mapping
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.format.ocdbt import (
    CHECKSUM,
    FOOTER_BYTES,
    HEADER,
    HEADER_BYTES,
    LENGTH,
    MANIFEST_MAGIC,
    MAX_VARINT_BYTES,
    NODE_MAGIC,
    Entries,
    Root,
    Span,
)

INLINE = -1
"""Index of the file of values that are stored inside a node."""
_MIN_KEYS_BYTES = 100_000_000
_MAX_KEYS_FACTOR = 64


class InvalidNodeError(Exception):
    """A node that cannot be decoded; the message is a predicate: "has no keys"."""


class DecodedNode(NamedTuple):
    """A node.

    Attributes:
        height: 0 of a leaf.
        files: Its table of data files, relative to the database.
        entries: Keys relative to the node's prefix, and locations: of values in a leaf, else of
            child nodes. A file of `INLINE` is `inline`.
        prefix_lengths: Of each child, the part of its key that is omitted in the child.
        inline: Values that are stored inside the node.
        bases: For each file, the leading part that paths in a node there are relative to.
    """

    height: int
    files: list[str]
    entries: Entries
    prefix_lengths: list[int]
    inline: bytes = b""
    bases: list[str] | None = None


class _Reader:
    """The rest of an encoded record."""

    def __init__(self, magic: int, data: bytes) -> None:
        self._data = np.frombuffer(data, np.uint8)
        self._end = len(data) - FOOTER_BYTES
        self._at = HEADER_BYTES
        if self._end < self._at or data[:4] != HEADER.pack(magic):
            raise InvalidNodeError("is not one")
        if LENGTH.unpack_from(data, 4)[0] != len(data):
            raise InvalidNodeError("has another length than it records")
        if CHECKSUM.pack(google_crc32c.value(data[: self._end])) != data[self._end :]:
            raise InvalidNodeError("has another checksum than it records")
        if data[12:HEADER_BYTES] != b"\0\0":
            raise InvalidNodeError("is compressed, which its database is not")

    def take(self, count: int) -> bytes:
        """Returns the next bytes."""
        if not 0 <= count <= self._end - self._at:
            raise InvalidNodeError("ends too early")
        self._at += count
        return self._data[self._at - count : self._at].tobytes()

    def varints(self, count: int) -> Array:
        """Returns the next numbers, as int64."""
        if not count:
            return np.empty(0, np.int64)
        small = self._data[self._at : min(self._end, self._at + count)]
        if len(small) == count and small.max() < 0x80:
            self._at += count
            return small.astype(np.int64)
        left = self._data[self._at : min(self._end, self._at + count * MAX_VARINT_BYTES)]
        ends = np.flatnonzero(left < 0x80)[:count] + 1
        if len(ends) < count:
            raise InvalidNodeError("ends too early")
        widths = np.diff(ends, prepend=0)
        if widths.max() > 9:  # beyond 63 bits
            raise InvalidNodeError("has a number of more than 63 bits")
        numbers = np.zeros(count, np.int64)
        starts = ends - widths
        for digit in range(int(widths.max())):
            has = widths > digit
            digits = left[starts[has] + digit].astype(np.int64) & 0x7F
            numbers[has] |= digits << (7 * digit)
        self._at += int(ends[-1])
        return numbers

    def varint(self) -> int:
        """Returns one number."""
        number = 0
        for digit in range(MAX_VARINT_BYTES - 1):
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << (7 * digit)
            if byte < 0x80:
                return number
        raise InvalidNodeError("has a number of more than 63 bits")

    def count(self) -> int:
        """Returns a number of things that take at least a byte each."""
        count = self.varint()
        if count > self._end - self._at:
            raise InvalidNodeError("ends too early")
        return count

    def strings(self, shared: list[int], lengths: list[int]) -> list[bytes]:
        """Returns strings, each after the part that it shares with the one before."""
        most_bytes = max(_MIN_KEYS_BYTES, _MAX_KEYS_FACTOR * len(self._data))
        if sum(shared) + sum(lengths) > most_bytes:
            raise InvalidNodeError(f"has more than {most_bytes:,} bytes of keys")
        data, end = self.take(sum(lengths)), 0
        found: list[bytes] = []
        previous = b""
        for common, length in zip(shared, lengths, strict=True):
            if common > len(previous):
                raise InvalidNodeError("has a key that shares more than the one before has")
            start, end = end, end + length
            previous = previous[:common] + data[start:end]
            found.append(previous)
        return found

    def finish(self) -> None:
        """Checks that nothing is left."""
        if self._at != self._end:
            raise InvalidNodeError("has more bytes than its entries")

    def files(self) -> list[str]:
        """Returns a table of data files."""
        count = self.count()
        if not count:
            return []
        shared = [0, *self.varints(count - 1).tolist()]
        lengths = self.varints(count).tolist()
        if self.varints(count).any():
            raise InvalidNodeError("has files with a base path, which its database has not")
        try:
            return [path.decode() for path in self.strings(shared, lengths)]
        except UnicodeDecodeError as error:
            raise InvalidNodeError("has a file whose name is not UTF-8") from error


def decode_manifest(data: bytes) -> Root | None:
    """Returns the root of a plain database of one version; None for any other, or none."""
    try:
        reader = _Reader(MANIFEST_MAGIC, data)
        reader.take(16)
        if reader.varint() != 0:
            return None
        reader.varints(2)
        reader.take(1)
        if reader.varint():
            reader.take(4)
        files = reader.files()
        if reader.varint() != 1 or reader.varint() < 1:
            return None
        height = reader.take(1)[0]
        file, offset, length = reader.varints(3).tolist()
        return Root(Span(files[file], offset, length), height)
    except (InvalidNodeError, IndexError):
        return None


def decode_node(data: bytes) -> DecodedNode:
    """Decodes a plain node.

    Raises:
        InvalidNodeError: It is not one.
    """
    reader = _Reader(NODE_MAGIC, data)
    height = reader.take(1)[0]
    files = reader.files()
    count = reader.count()
    if not count:
        raise InvalidNodeError("has no keys")
    shared = [0, *reader.varints(count - 1).tolist()]
    suffix_lengths = reader.varints(count).tolist()
    prefix_lengths: list[int] = reader.varints(count).tolist() if height else []
    keys = reader.strings(shared, suffix_lengths)
    if height:
        numbers, offsets, lengths = (reader.varints(count) for _ in range(3))
        reader.varints(3 * count)  # statistics
    else:
        lengths = reader.varints(count)
        if reader.take(count) != b"\1" * count:
            raise InvalidNodeError("has values inside, which its database has not")
        numbers, offsets = reader.varints(count), reader.varints(count)
    reader.finish()
    if numbers.max() >= len(files):
        raise InvalidNodeError("names a file that its table does not have")
    columns = (array.array("q", column.tobytes()) for column in (numbers, offsets, lengths))
    return DecodedNode(height, files, Entries(keys, *columns), prefix_lengths)


# ------------------------------------------------------------------------------------ dumps


def dump_location(span: Span) -> str:
    """Returns a node's location as TensorStore's `dump` expects it."""
    return f"btreenode:{span.base}:{span.file[len(span.base) :]}:{span.offset}:{span.length}"


def _span_of(location: str) -> Span:
    _, base, name, offset, length = location.split(":")
    return Span(base + name, int(offset), int(length), base)


def root_of_dump(dump: Mapping[str, Any]) -> Root | None:
    """Returns the root of a dumped manifest; None for a database without keys."""
    version = dump["versions"][-1]
    location = version["root"].get("location")
    return None if location is None else Root(_span_of(location), version["root_height"])


def from_dump(dump: Mapping[str, Any]) -> DecodedNode:
    """Returns a node that TensorStore decoded."""
    entries, inline = Entries(), bytearray()
    numbers: dict[tuple[str, str], int] = {}
    prefix_lengths: list[int] = []
    for entry in dump["entries"]:
        value = entry.get("inline_value")
        if value is not None:
            entries.add(entry["key"], INLINE, len(inline), len(value))
            inline += value
            continue
        is_leaf = "indirect_value" in entry
        span = _span_of(entry["indirect_value" if is_leaf else "location"])
        number = numbers.setdefault((span.file, span.base), len(numbers))
        entries.add(entry["key"], number, span.offset, span.length)
        if not is_leaf:
            prefix_lengths.append(len(entry["subtree_common_prefix"]))
    files, bases = [file for file, _ in numbers], [base for _, base in numbers]
    return DecodedNode(dump["height"], files, entries, prefix_lengths, bytes(inline), bases)
