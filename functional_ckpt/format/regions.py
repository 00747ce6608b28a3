"""The regions that a rank wrote as a record of a few columns, which the primary reads."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from functional_ckpt.core.arrays.spec import Array, Box
from functional_ckpt.core.records.records import DIGEST_BYTES
from functional_ckpt.format.write_files import WrittenBox

_NUM_COLUMNS = 3  # besides offset and shape in every dim


class Head(NamedTuple):
    """The arrays of which a rank wrote regions, in the order of the regions."""

    names: tuple[str, ...]
    chunk_shapes: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """The regions of one rank.

    Attributes:
        head: Their arrays.
        files: The rank's data files.
        starts: The first index in every dim, region after region.
        shapes: Likewise, their lengths.
        file: The index of each region's file.
        offsets: Its first byte there.
        counts: The number of its digests.
        digests: All digests.
    """

    head: Head
    files: tuple[str, ...]
    starts: Array
    shapes: Array
    file: Array
    offsets: Array
    counts: Array
    digests: bytes

    @classmethod
    def of(cls, boxes: Sequence[WrittenBox], files: Iterable[str]) -> Regions:
        """Returns the columns of regions."""
        names = tuple(files)
        numbers = {name: number for number, name in enumerate(names)}
        return cls(
            head=Head(tuple(box.name for box in boxes), tuple(box.chunk_shape for box in boxes)),
            files=names,
            starts=_column(itertools.chain.from_iterable(box.box.offset for box in boxes)),
            shapes=_column(itertools.chain.from_iterable(box.box.shape for box in boxes)),
            file=_column(numbers[box.file] for box in boxes),
            offsets=_column(box.offset for box in boxes),
            counts=_column(len(box.digests) // (2 * DIGEST_BYTES) for box in boxes),
            digests=bytes.fromhex("".join([box.digests for box in boxes])),
        )

    def encode(self) -> tuple[dict[str, Any], bytes]:
        """Returns a JSON header and the bytes behind it."""
        columns = (self.starts, self.shapes, self.file, self.offsets, self.counts)
        packed = zlib.compress(b"".join([each.astype("<i8").tobytes() for each in columns]), 1)
        head = json.dumps(self.head, separators=(",", ":")).encode()
        header = {"files": self.files, "head_bytes": len(head), "packed_bytes": len(packed)}
        return header, head + packed + self.digests

    @classmethod
    def decode(cls, header: Mapping[str, Any], data: bytes) -> Regions:
        """Returns the regions of `encode`."""
        packed_at = header["head_bytes"]
        digests_at = packed_at + header["packed_bytes"]
        head = _head(data[:packed_at])
        numbers = np.frombuffer(zlib.decompress(data[packed_at:digests_at]), "<i8")
        num_dims = sum(map(len, head.chunk_shapes))
        count = len(head.names)
        ends = np.cumsum([num_dims, num_dims, *[count] * _NUM_COLUMNS])
        if len(numbers) != ends[-1]:
            raise ValueError(f"{len(numbers)} numbers of {count} regions")
        columns = [_small(each) for each in np.split(numbers, ends[:-1])]
        return cls(
            head=head,
            files=tuple(header["files"]),
            starts=columns[0],
            shapes=columns[1],
            file=columns[2],
            offsets=columns[3],
            counts=columns[4],
            digests=data[digests_at:],
        )

    def box(self, row: int, first_dim: int, first_digest: int) -> WrittenBox:
        """Returns one region as a record.

        Args:
            row: Which.
            first_dim: The index of its first dim in the columns of dims.
            first_digest: The index of its first digest.
        """
        chunk_shape = self.head.chunk_shapes[row]
        dims = slice(first_dim, first_dim + len(chunk_shape))
        box = Box(tuple(self.starts[dims].tolist()), tuple(self.shapes[dims].tolist()))
        path = self.files[int(self.file[row])]
        start = first_digest * DIGEST_BYTES
        digests = self.digests[start : start + int(self.counts[row]) * DIGEST_BYTES].hex()
        offset = int(self.offsets[row])
        return WrittenBox(
            self.head.names[row], chunk_shape, box, path, offset, is_tensors(path), digests
        )


@functools.lru_cache(maxsize=64)
def _head(text: bytes) -> Head:
    """Returns the head of a report; those of many ranks are equal."""
    names, shapes = json.loads(text)
    return Head(tuple(names), tuple(map(tuple, shapes)))


def is_tensors(file: str) -> bool:
    """Returns whether a data file is a file of tensors."""
    return file.endswith(".safetensors")


def _column(values: Iterable[int]) -> Array:
    return np.fromiter(values, np.int64)


def _small(column: Array) -> Array:
    """Returns a column in half the memory, if its numbers allow that."""
    is_small = not len(column) or int(column.max()) < 2**31
    return column.astype(np.int32) if is_small else column.copy()
