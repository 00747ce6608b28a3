"""The regions of all ranks, by array: thousands of ranks with thousands of arrays, in columns.

Ranks that wrote regions of the same arrays are stacked, so that an array costs a few operations on
columns and not one for each rank. An array of few regions, or of irregular ones, is a list.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.spec import Array, ArraySpec
from functional_ckpt.core.files.file_plan import chunk_bytes
from functional_ckpt.core.records.records import DIGEST_BYTES
from functional_ckpt.format.ocdbt_tree import RunKeys
from functional_ckpt.format.regions import Regions
from functional_ckpt.format.write_files import WrittenBox

_FEW = 16


class ArrayColumns(NamedTuple):
    """The chunks of one array.

    Attributes:
        keys: Their keys, sorted, behind `c/`.
        files: For each key, the number of its file among all files.
        offsets: Its first byte there.
        digests: The digests of all chunks, in C order.
    """

    keys: RunKeys
    files: Array
    offsets: Array
    digests: bytes


class _Group:
    """Ranks whose regions are of the same arrays and have equally many digests."""

    def __init__(self, members: Sequence[Regions], first_files: Sequence[int]) -> None:
        self.members = members
        self.starts = np.stack([each.starts for each in members])
        self.shapes = np.stack([each.shapes for each in members])
        numbers = np.array(first_files, np.int64)[:, None]
        self.files = np.stack([each.file for each in members]) + numbers
        self.offsets = np.stack([each.offsets for each in members])
        data = b"".join([each.digests for each in members])
        self.digests = np.frombuffer(data, f"V{DIGEST_BYTES}").reshape(len(members), -1)
        self.dims = list(itertools.accumulate(map(len, members[0].head.chunk_shapes), initial=0))
        self.ends = [0, *np.cumsum(members[0].counts).tolist()]


class Gathered:
    """The regions of all ranks.

    Attributes:
        files: The data files of all ranks.
    """

    def __init__(self, ranks: Sequence[Regions]) -> None:
        self.files = [file for regions in ranks for file in regions.files]
        first_files = list(itertools.accumulate((len(r.files) for r in ranks), initial=0))
        members: dict[tuple[object, bytes], list[int]] = {}
        for rank, regions in enumerate(ranks):
            members.setdefault((regions.head, regions.counts.tobytes()), []).append(rank)
        self._groups = [
            _Group([ranks[rank] for rank in each], [first_files[rank] for rank in each])
            for each in members.values()
        ]
        self._rows: dict[str, list[tuple[_Group, int]]] = {}
        for group in self._groups:
            for row, name in enumerate(group.members[0].head.names):
                self._rows.setdefault(name, []).append((group, row))

    def boxes(self, name: str) -> list[WrittenBox]:
        """Returns the regions of an array one by one."""
        return [
            regions.box(row, group.dims[row], group.ends[row])
            for group, row in self._rows.get(name, ())
            for regions in group.members
        ]

    def chunk_shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of an array's chunks; None if no rank wrote any."""
        rows = self._rows.get(name)
        return None if rows is None else rows[0][0].members[0].head.chunk_shapes[rows[0][1]]

    def columns(self, name: str, spec: ArraySpec, grid: ChunkGrid) -> ArrayColumns | None:
        """Returns an array's chunks; None if it has few regions, irregular or incomplete ones."""
        rows = self._rows.get(name, ())
        if sum(len(group.members) for group, _ in rows) < _FEW or not grid.shape:
            return None
        if any(
            size % chunk for size, chunk in zip(spec.shape[1:], grid.chunk_shape[1:], strict=True)
        ):
            return None
        found = [_columns(group, row, spec, grid) for group, row in rows]
        if any(each is None for each in found):
            return None
        runs = sorted((each for each in found if each is not None), key=lambda each: each.first[0])
        first = np.concatenate([each.first for each in runs])
        count = np.concatenate([each.counts for each in runs])
        ends = np.cumsum(count)
        if ends[-1] != grid.num_chunks or not np.array_equal(first, ends - count):
            return None
        keys, order = _keys(grid.num_chunks_per_dim)
        within = np.arange(ends[-1]) - np.repeat(first, count)
        offsets = np.repeat(np.concatenate([each.offsets for each in runs]), count)
        offsets += within * chunk_bytes(grid, spec.itemsize_bytes)
        files = np.repeat(np.concatenate([each.files for each in runs]), count)
        digests = b"".join([each.digests.tobytes() for each in runs])
        return ArrayColumns(keys, files[order], offsets[order], digests)


class _Runs(NamedTuple):
    """Regions of a group, each a run of chunks, in the order of the chunks."""

    first: Array
    counts: Array
    files: Array
    offsets: Array
    digests: Array


def _columns(group: _Group, row: int, spec: ArraySpec, grid: ChunkGrid) -> _Runs | None:
    dims = slice(group.dims[row], group.dims[row + 1])
    starts, shapes = group.starts[:, dims].astype(np.int64), group.shapes[:, dims]
    chunk = np.array(grid.chunk_shape)
    index = starts // chunk
    counts = -(-(starts + shapes) // chunk) - index
    count = counts.prod(axis=1)
    is_run = (count == 1) | (shapes[:, 1:] == np.array(spec.shape[1:])).all(axis=1)
    if not is_run.all():
        return None
    first: Array = np.asarray(np.ravel_multi_index(tuple(index.T), grid.num_chunks_per_dim))
    order = np.argsort(first)
    digests = group.digests[:, group.ends[row] : group.ends[row + 1]]
    return _Runs(
        first[order],
        count[order],
        group.files[order, row],
        group.offsets[order, row].astype(np.int64),
        digests[order],
    )


@functools.lru_cache(maxsize=64)
def _keys(num_chunks_per_dim: tuple[int, ...]) -> tuple[RunKeys, Array]:
    """Returns the sorted keys of all chunks, and the position of each in C order."""
    keys = [
        "/".join(map(str, index)).encode()
        for index in itertools.product(*map(range, num_chunks_per_dim))
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return RunKeys.of([keys[number] for number in order]), np.array(order)
