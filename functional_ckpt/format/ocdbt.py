"""OCDBT trees as bytes: a B+tree of keys that point into data files, encoded in one pass.

TensorStore builds such a tree key by key, at 10 microseconds each and one writer per database. With
all keys and value locations known, the same tree is written at once: leaf nodes, interior nodes
above them until one node is the root, and a manifest that names it. The format is TensorStore's
(its page on the `ocdbt` driver describes it), and TensorStore reads the result.
"""

from __future__ import annotations

import array
import dataclasses
import struct
import uuid
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from functional_ckpt.core.arrays.chunks import MAX_INLINE_BYTES
from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.format.tuning import MAX_NODE_BYTES

MANIFEST = "manifest.ocdbt"
MANIFEST_MAGIC = 0x0CDB3A2A
NODE_MAGIC = 0x0CDB20DE
HEADER = struct.Struct(">I")
LENGTH = struct.Struct("<Q")
CHECKSUM = struct.Struct("<I")
HEADER_BYTES = 4 + 8 + 1 + 1
FOOTER_BYTES = 4
MAX_VARINT_BYTES = 10
_ENTRY_BYTES = 32  # of an entry beside its key, in memory
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

    def add_columns(self, keys: Sequence[bytes], files: Array, offsets: Array, length: int) -> None:
        """Adds many keys, of values of one length."""
        self.keys += keys
        self.files.extend(files.tolist())
        self.offsets.extend(offsets.tolist())
        self.lengths.extend([length] * len(keys))


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


def encode_tree(files: Sequence[str], entries: Entries, append: Callable[[bytes], Span]) -> Root:
    """Encodes a tree, leaves first, and returns its root.

    Args:
        files: The table of data files, relative to the database.
        entries: At least one.
        append: Writes a node to a data file and returns its location.
    """
    keys = entries.keys
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ordered = [keys[number] for number in order]
    at = np.array(order)
    numbers = np.array(entries.files, np.int64)[at]
    offsets = np.array(entries.offsets, np.int64)[at]
    lengths = np.array(entries.lengths, np.int64)[at]
    nodes: list[Root] = []
    for cut in _cuts(ordered):
        table: Sequence[str] = files
        local = numbers[cut]
        if cut.stop - cut.start < len(keys):  # each node names the files that it needs
            used, local = np.unique(local, return_inverse=True)
            table = [files[int(number)] for number in used]
        span = append(_encode_leaf(table, ordered[cut], local, offsets[cut], lengths[cut]))
        size, low = int(lengths[cut].sum()), ordered[cut.start]
        nodes.append(Root(span, 0, cut.stop - cut.start, span.length, size, low))
    while len(nodes) > 1:
        nodes = [_encode_parent(nodes[cut], append) for cut in _cuts([node.low for node in nodes])]
    return nodes[0]


def _cuts(keys: Sequence[bytes]) -> Iterator[slice]:
    """Yields the range of each node; every range but the last has two keys or more."""
    if len(keys) < _FEW:
        yield slice(0, len(keys))
        return
    sizes = np.fromiter(map(len, keys), np.int64, len(keys)) + _ENTRY_BYTES
    groups = np.cumsum(sizes) // max(MAX_NODE_BYTES, 2 * int(sizes.max()))
    starts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        yield slice(start, end)


def _encode_leaf(
    files: Sequence[str], keys: Sequence[bytes], numbers: Array, offsets: Array, lengths: Array
) -> bytes:
    shared = [0] * len(keys)
    suffixes: list[bytes] = []
    previous = b""
    for number, key in enumerate(keys):
        # Neighbours are chunks of one array: all before the chunk's key is common to them.
        end = previous.rfind(b"/") + 1
        if end and key.startswith(previous[:end]):
            shared[number] = end
            suffixes.append(key[end:])
        else:
            suffixes.append(key)
        previous = key
    body = (
        b"\0",
        _encode_files(files),
        _varints([len(keys)]),
        _varints(shared[1:]),
        _varints([len(suffix) for suffix in suffixes]),
        *suffixes,
        _varints(lengths),
        b"\1" * len(keys),
        _varints(numbers),
        _varints(offsets),
    )
    return _seal(NODE_MAGIC, b"".join(body))


def _encode_parent(children: Sequence[Root], append: Callable[[bytes], Span]) -> Root:
    height = children[0].height + 1
    files = list(dict.fromkeys(child.span.file for child in children))
    body = (
        bytes([height]),
        _encode_files(files),
        _varints([len(children)]),
        _varints([0] * (len(children) - 1)),
        _varints([len(child.low) for child in children]),
        _varints([0] * len(children)),  # no part of a key is omitted in the child
        *(child.low for child in children),
        _varints([files.index(child.span.file) for child in children]),
        _varints([child.span.offset for child in children]),
        _varints([child.span.length for child in children]),
        _varints([child.num_keys for child in children]),
        _varints([child.tree_bytes for child in children]),
        _varints([child.value_bytes for child in children]),
    )
    span = append(_seal(NODE_MAGIC, b"".join(body)))
    return Root(
        span,
        height,
        sum(child.num_keys for child in children),
        sum(child.tree_bytes for child in children) + span.length,
        sum(child.value_bytes for child in children),
        children[0].low,
    )


def encode_manifest(root: Root, time_ns: int) -> bytes:
    """Returns the manifest of a database of one version."""
    span = root.span
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
            _varints([1, 1]) + bytes([root.height]),  # one version, the first
            _varints([0, span.offset, span.length]),
            _varints([root.num_keys, root.tree_bytes, root.value_bytes]),
            LENGTH.pack(time_ns),
        )
    )
    return _seal(MANIFEST_MAGIC, config + _encode_files([span.file]) + version + _varints([0]))


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
    for digit in range(1, MAX_VARINT_BYTES):
        widths += numbers >= np.uint64(1) << np.uint64(7 * digit)
    ends = np.cumsum(widths)
    encoded = np.empty(int(ends[-1]), np.uint8)
    for digit in range(int(widths.max())):
        has = widths > digit
        digits = (numbers[has] >> np.uint64(7 * digit)).astype(np.uint8) & 0x7F
        more = (widths[has] > digit + 1).astype(np.uint8) << 7
        encoded[(ends - widths)[has] + digit] = digits | more
    return encoded.tobytes()


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _seal(magic: int, body: bytes) -> bytes:
    length = HEADER_BYTES + len(body) + FOOTER_BYTES
    content = HEADER.pack(magic) + LENGTH.pack(length) + b"\0\0" + body
    return content + CHECKSUM.pack(google_crc32c.value(content))


def is_inside(file: str) -> bool:
    """Returns whether a data file's path stays below its database."""
    return all(part not in ("", ".", "..") and "\0" not in part for part in file.split("/"))
