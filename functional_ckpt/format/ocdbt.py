"""Records of OCDBT as bytes: numbers, tables of files, columns of a node, the manifest.

The format is TensorStore's (its page on the `ocdbt` driver describes it). `ocdbt_tree` encodes the
nodes, `ocdbt_decode` reads them.
"""

from __future__ import annotations

import array
import dataclasses
import itertools
import os
import struct
import uuid
from collections.abc import MutableSequence, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from functional_ckpt.core.arrays.chunks import MAX_INLINE_BYTES
from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.format.tuning import MAX_NODE_BYTES

MANIFEST_MAGIC = 0x0CDB3A2A
NODE_MAGIC = 0x0CDB20DE
HEADER = struct.Struct(">I")
LENGTH = struct.Struct("<Q")
CHECKSUM = struct.Struct("<I")
HEADER_BYTES = 4 + 8 + 1 + 1
FOOTER_BYTES = 4
MAX_VARINT_BYTES = 10
_FEW = 32


def _column() -> MutableSequence[int]:
    return array.array("q")


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
    files: MutableSequence[int] = dataclasses.field(default_factory=_column)
    offsets: MutableSequence[int] = dataclasses.field(default_factory=_column)
    lengths: MutableSequence[int] = dataclasses.field(default_factory=_column)

    def add(self, key: bytes, file: int, offset: int, length: int) -> None:
        """Adds one key."""
        self.keys.append(key)
        self.files.append(file)
        self.offsets.append(offset)
        self.lengths.append(length)


class Span(NamedTuple):
    """Bytes of a data file.

    Attributes:
        file: The file, relative to the database.
        offset: The first byte.
        length: The number of bytes.
        base: The leading part of `file` that paths in a node there are relative to.
    """

    file: str
    offset: int
    length: int
    base: str = ""


class Root(NamedTuple):
    """The root of a tree; also any node, for its parent.

    Attributes:
        span: Where the node is.
        height: 0 of a leaf.
        num_keys: Keys below it.
        tree_bytes: Bytes of it and all nodes below it.
        value_bytes: Bytes of all values below it.
        low: Its first key.
    """

    span: Span
    height: int
    num_keys: int = 0
    tree_bytes: int = 0
    value_bytes: int = 0
    low: bytes = b""


def encode_manifest(root: Root, time_ns: int) -> bytes:
    """Returns the manifest of a database of one version."""
    span = root.span
    config = b"".join(
        (
            uuid.uuid4().bytes,
            varints([0, MAX_INLINE_BYTES, MAX_NODE_BYTES]),
            b"\4",  # arity of the tree of versions, as a power of two
            varints([1]) + struct.pack("<i", 0),  # who adds to it compresses nodes with zstd
        )
    )
    version = b"".join(
        (
            varints([1, 1]) + bytes([root.height]),  # one version, the first
            varints([0, span.offset, span.length]),
            varints([root.num_keys, root.tree_bytes, root.value_bytes]),
            LENGTH.pack(time_ns),
        )
    )
    return seal(MANIFEST_MAGIC, config + encode_files([span.file]) + version + varints([0]))


def encode_files(files: Sequence[str]) -> bytes:
    """Returns a table of data files."""
    paths = [file.encode() for file in files]
    pairs = itertools.pairwise(paths)
    shared = [len(os.path.commonprefix(pair)) for pair in pairs]  # noqa: RUF071 (bytes)
    return b"".join(
        (
            varints([len(paths)]),
            varints(shared),
            varints([len(path) - n for path, n in zip(paths, [0, *shared], strict=False)]),
            bytes(len(paths)),  # no part of a path is handed down to children
            *(path[n:] for path, n in zip(paths, [0, *shared], strict=False)),
        )
    )


class Column(NamedTuple):
    """Encoded values, of which consecutive ones can be taken.

    Attributes:
        data: All of them.
        ends: The index of the first byte of each, and of the end.
    """

    data: bytes
    ends: Array

    @classmethod
    def of_strings(cls, values: Sequence[bytes]) -> Column:
        """Returns strings without anything between them."""
        return cls(b"".join(values), _ends(np.fromiter(map(len, values), np.int64, len(values))))

    @classmethod
    def of_numbers(cls, values: Array) -> Column:
        """Returns numbers of seven bits a byte, the lowest first; the top bit: more follow."""
        numbers = np.asarray(values, np.uint64)
        widths = np.ones(numbers.shape, np.int64)
        for digit in range(1, MAX_VARINT_BYTES):
            longer = numbers >= np.uint64(1) << np.uint64(7 * digit)
            if not longer.any():
                break
            widths += longer
        ends = _ends(widths)
        encoded = np.empty(int(ends[-1]), np.uint8)
        for digit in range(int(widths.max(initial=0))):
            has = widths > digit
            digits = (numbers[has] >> np.uint64(7 * digit)).astype(np.uint8) & 0x7F
            more = (widths[has] > digit + 1).astype(np.uint8) << 7
            encoded[ends[:-1][has] + digit] = digits | more
        return cls(encoded.tobytes(), ends)

    def part(self, start: int, end: int) -> bytes:
        """Returns the values from `start` up to, not including, `end`."""
        return self.data[self.ends[start] : self.ends[end]]


def _ends(widths: Array) -> Array:
    ends = np.zeros(len(widths) + 1, np.int64)
    np.cumsum(widths, out=ends[1:])
    return ends


def varints(values: Any) -> bytes:
    """Returns encoded numbers."""
    if len(values) < _FEW:  # numpy's calls would cost more than the numbers
        return b"".join(map(varint, map(int, values)))
    return Column.of_numbers(values).data


def varint(number: int) -> bytes:
    """Returns one encoded number."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def seal(magic: int, body: bytes) -> bytes:
    """Returns a record with its length and checksum."""
    length = HEADER_BYTES + len(body) + FOOTER_BYTES
    content = HEADER.pack(magic) + LENGTH.pack(length) + b"\0\0" + body
    return content + CHECKSUM.pack(google_crc32c.value(content))


def is_inside(file: str) -> bool:
    """Returns whether a data file's path stays below its database."""
    return all(part not in ("", ".", "..") and "\0" not in part for part in file.split("/"))
