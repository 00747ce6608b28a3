"""Which data files hold the boxes of arrays that a rank writes, and where in them. Pure.

Tensors are stored back to back in `.safetensors` files; the chunks of the index are runs of their
bytes. A chunk at the end of an array is shorter than its grid says: the index counts the bytes that
follow it as padding, which readers ignore. Boxes of which this is not possible are stored chunk by
chunk in a file without a header.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import heapq
import itertools
import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from functional_ckpt.core.arrays.chunks import ChunkGrid, choose_grid, run_of
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.files import safetensors_header as header_lib
from functional_ckpt.core.files.safetensors_header import Tensor

BYTES_PER_FILE = 32 * 2**20
"""Data of one file at least: several writers keep the disk busy while others hash and copy."""
NUM_FILES = 4
"""Files of one rank and group, if they need not be more: as many as threads write."""
SMALL_SHARE = 100
"""The part of the bytes that the small arrays of a file of their own have, from 100 MiB on."""
_GROUP_BYTES = 2**20
_MAX_ALIGNMENT = 64
_PADDING = "functional_ckpt.padding"
_MARKS = ("format", header_lib.SHARDING)


class StoredBox(NamedTuple):
    """A region of an array that one rank writes.

    Attributes:
        name: The array's name.
        spec: The array.
        box: The region; its edges are on the grid, or at the array's end.
        grid: The array's chunks.
        is_tensor: Whether it may be a tensor of a `.safetensors` file: its dtype is the one that
            readers see, and its chunks are runs of its bytes.
        is_frozen: Whether it is known that nothing trains it.
    """

    name: str
    spec: ArraySpec
    box: Box
    grid: ChunkGrid
    is_tensor: bool = True
    is_frozen: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of the region."""
        return self.box.num_elements * self.spec.itemsize_bytes


class Member(NamedTuple):
    """A box in a file: its number among the boxes, its first byte, and the array's chunks."""

    number: int
    offset: int
    grid: ChunkGrid


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """A data file.

    Attributes:
        name: Its name in the item's directory.
        header: Its first bytes; empty for a file of chunks.
        members: The boxes that it holds, in order.
        size_bytes: Its size.
    """

    name: str
    header: bytes
    members: tuple[Member, ...]
    size_bytes: int

    @property
    def has_tensors(self) -> bool:
        """Whether it is a `.safetensors` file."""
        return bool(self.header)


def plan_files(
    boxes: Sequence[StoredBox],
    *,
    is_sharded: bool = False,
    tied: Mapping[str, str] | None = None,
    rank: int = 0,
) -> list[FilePlan]:
    """Returns the files of a rank, without names; a file of chunks is the last.

    Args:
        boxes: All that the rank writes of an item.
        is_sharded: Whether the offsets of all boxes are recorded; else they are complete arrays.
        tied: Name of a leaf that shares the memory of an array -> the array's name.
        rank: The rank, by which the padding of two files has different names.
    """
    sizes = [each.size_bytes for each in boxes]
    entries = [header_lib.entry_bytes(each.name, len(each.spec.shape)) for each in boxes]
    tensors = [index for index, each in enumerate(boxes) if _fits(each, entries[index])]
    chunks = sorted({*range(len(boxes))} - {*tensors})
    aliases: dict[str, list[str]] = {}
    for alias, owner in (tied or {}).items():
        aliases.setdefault(owner, []).append(alias)
    planned = [
        _plan_tensors(
            boxes, sizes, group, aliases, f"{_PADDING}.{rank}.{number}" if is_sharded else ""
        )
        for number, group in enumerate(
            file
            for group in _groups(boxes, sizes, tensors)
            for file in _deal(boxes, sizes, entries, group)
        )
    ]
    return [*planned, *([_plan_chunks(boxes, chunks)] if chunks else [])]


def file_names(
    stem: str,
    plans: Sequence[FilePlan],
    *,
    shard: int | None = None,
    rank: int = 0,
    first: int = 0,
    total: int = 0,
) -> list[FilePlan]:
    """Returns the plans with names.

    Args:
        stem: `model`, or `data` for a value that is not a module.
        plans: Of `plan_files`.
        shard: The rank, where its tensors are parts of arrays.
        rank: The rank, where they are complete.
        first: How many `.safetensors` files of other ranks precede.
        total: How many there are of all ranks; 0 for the number of these.
    """
    prefix = "" if shard is None else f"shard-{shard:05d}-"
    chunks = prefix or (f"shard-{rank:05d}-" if rank else "")
    total = total or sum(plan.has_tensors for plan in plans)
    named: list[FilePlan] = []
    for number, plan in enumerate(plans, first + 1):
        part = f"-{number:05d}-of-{total:05d}" if total > 1 else ""
        tensors = f"{prefix}{stem}{part}.safetensors"
        name = tensors if plan.has_tensors else f"{chunks}chunks.bin"
        named.append(dataclasses.replace(plan, name=name))
    return named


def is_shard(name: str) -> bool:
    """Returns whether a file has this name because its boxes may be parts of arrays."""
    return name.startswith("shard-") and not name.endswith(".bin")


def is_padding(name: str) -> bool:
    """Returns whether a tensor is padding at the end of a file."""
    return name.startswith(_PADDING)


def _fits(box: StoredBox, entry_bytes: int) -> bool:
    return (
        box.is_tensor
        and box.spec.dtype in header_lib.DTYPES
        and box.name != header_lib.METADATA
        and not is_padding(box.name)
        and entry_bytes < header_lib.MAX_HEADER_BYTES
    )


class _File:
    """A file that is being filled."""

    def __init__(self) -> None:
        self.members: list[int] = []
        self.is_full = False
        self._names: set[str] = set()
        self._header_bytes = 0

    def takes(self, name: str, entry_bytes: int) -> bool:
        """Adds a box's name, if there is space for it and it is not there yet."""
        if name in self._names:
            return False
        header_bytes = self._header_bytes + entry_bytes
        is_long = header_bytes > header_lib.MAX_HEADER_BYTES
        if is_long or len(self.members) >= header_lib.MAX_TENSORS:
            self.is_full = True
            return False
        self._names.add(name)
        self._header_bytes = header_bytes
        return True


def _groups(
    boxes: Sequence[StoredBox], sizes: Sequence[int], tensors: Sequence[int]
) -> list[list[int]]:
    """Returns the boxes that share files: those that may change together from step to step.

    A file that stays the same is not written again. So frozen parameters are apart, and the small
    arrays: scales, biases, adapters, counters, which may change where large ones do not.
    """
    frozen = [index for index in tensors if boxes[index].is_frozen]
    if sum(sizes[index] for index in frozen) < _GROUP_BYTES:
        frozen = []
    rest = sorted({*tensors} - {*frozen}, key=sizes.__getitem__)
    ends = list(itertools.accumulate(map(sizes.__getitem__, rest)))
    count = 0
    if ends and ends[-1] >= SMALL_SHARE * _GROUP_BYTES:
        count = bisect.bisect(ends, ends[-1] // SMALL_SHARE)
    return [sorted(rest[count:]), rest[:count], frozen]


def _deal(
    boxes: Sequence[StoredBox],
    sizes: Sequence[int],
    entries: Sequence[int],
    tensors: Sequence[int],
) -> list[list[int]]:
    """Returns the boxes of each file: the largest first, each to the smallest file.

    Args:
        boxes: All boxes.
        sizes: The bytes of each.
        entries: The bytes that each takes in a header, at most.
        tensors: The indices of the boxes that are dealt out.
    """
    total = sum([sizes[index] for index in tensors])
    count = min(NUM_FILES, max(1, total // BYTES_PER_FILE), len(tensors))
    files = [_File() for _ in range(count)]
    heap = [(0, number) for number in range(count)]  # of the files that are not full
    for index in sorted(tensors, key=lambda index: -sizes[index]):
        skipped: list[tuple[int, int]] = []
        entry = boxes[index].name, entries[index]
        while heap and not files[heap[0][1]].takes(*entry):
            refusing = heapq.heappop(heap)
            if not files[refusing[1]].is_full:
                skipped.append(refusing)
        if not heap:
            heap = [(0, len(files))]
            files.append(_File())
            files[-1].takes(*entry)
        size_bytes, number = heap[0]
        files[number].members.append(index)
        heapq.heapreplace(heap, (size_bytes + sizes[index], number))
        for each in skipped:
            heapq.heappush(heap, each)
    return [sorted(file.members) for file in files]


def _plan_tensors(
    boxes: Sequence[StoredBox],
    sizes: Sequence[int],
    group: Sequence[int],
    aliases: Mapping[str, Sequence[str]],
    padding: str,
) -> FilePlan:
    """Lays out one file.

    Tensors are sorted by the alignment of their ends, so that each is aligned to its elements, and
    then by the padding that their last chunks need. Where too few bytes follow a chunk at the end,
    complete arrays get chunks that divide them, and a tensor of padding is added to the others.
    """
    missing = {index: _missing_bytes(boxes[index]) for index in group}
    order = sorted(group, key=lambda index: (-_alignment(sizes[index]), -missing[index]))
    tensors: list[Tensor] = []
    end = 0
    for index in order:
        box = boxes[index]
        start, end = end, end + sizes[index]
        tensors.append(Tensor(box.name, box.spec.dtype, box.box.shape, start, end))
    grids = [boxes[index].grid for index in order]
    most_missing = 0
    for position, index in enumerate(order):
        if not missing[index]:  # thousands of small arrays
            continue
        missing_bytes = missing[index] - (end - tensors[position].end)
        if missing_bytes > 0 and not padding:
            grids[position] = choose_grid(boxes[index].spec, is_even=True)
        most_missing = max(most_missing, missing_bytes)
    metadata = {"format": "pt"}
    if padding:
        offsets = {boxes[i].name: {"saved_offsets": boxes[i].box.offset} for i in order}
        if most_missing > 0:
            # A dtype of one byte that torch's consolidation accepts.
            start, end = end, end + most_missing
            tensors.append(Tensor(padding, "float8_e5m2", (most_missing,), start, end))
            offsets[padding] = {"saved_offsets": (0,)}
        metadata[header_lib.SHARDING] = json.dumps(offsets, separators=(",", ":"))
    else:
        names = [boxes[index].name for index in order]
        metadata |= {a: name for name in names for a in aliases.get(name, ()) if a not in _MARKS}
    header = header_lib.encode(tensors, metadata)
    members = [
        Member(index, len(header) + tensor.start, grid)
        for index, tensor, grid in zip(order, tensors, grids, strict=False)
    ]
    return FilePlan(name="", header=header, members=tuple(members), size_bytes=len(header) + end)


def _plan_chunks(boxes: Sequence[StoredBox], group: Sequence[int]) -> FilePlan:
    members: list[Member] = []
    end = 0
    for index in group:
        members.append(Member(index, end, boxes[index].grid))
        box = boxes[index]
        stored = stored_chunks(box.grid, box.box, box.spec.itemsize_bytes, is_tensor=False)
        end += len(stored) * chunk_bytes(box.grid, box.spec.itemsize_bytes)
    return FilePlan(name="", header=b"", members=tuple(members), size_bytes=end)


class StoredChunk(NamedTuple):
    """A chunk of a stored box: its index, its key in the array, and its first byte in the box."""

    chunk: tuple[int, ...]
    key: bytes
    start: int


def chunk_bytes(grid: ChunkGrid, itemsize_bytes: int) -> int:
    """Returns the bytes of a chunk in the index, padding included."""
    return math.prod(grid.chunk_shape) * itemsize_bytes


def stored_chunks(
    grid: ChunkGrid, box: Box, itemsize_bytes: int, *, is_tensor: bool
) -> Sequence[StoredChunk]:
    """Returns the chunks of a box, in C order.

    Args:
        grid: The array's chunks.
        box: The region.
        itemsize_bytes: Bytes of an element.
        is_tensor: Whether the box is stored as it is; else chunk by chunk, padded.
    """
    if box.shape == grid.chunk_shape == grid.shape:  # thousands of small arrays
        return _only_chunk((0,) * len(grid.shape))
    if all(map(operator.le, box.shape, grid.chunk_shape)) and box.num_elements:  # of many ranks
        return _only_chunk(tuple(map(operator.floordiv, box.offset, grid.chunk_shape)))
    return _all_chunks(grid, box, itemsize_bytes, is_tensor)


@functools.lru_cache(maxsize=4096)
def _only_chunk(index: tuple[int, ...]) -> Sequence[StoredChunk]:
    return (StoredChunk(index, "/".join(("c", *map(str, index))).encode(), 0),)


@functools.lru_cache(maxsize=4096)
def _all_chunks(
    grid: ChunkGrid, box: Box, itemsize_bytes: int, is_tensor: bool
) -> Sequence[StoredChunk]:
    return tuple(_iter_chunks(grid, box, itemsize_bytes, is_tensor))


def _iter_chunks(
    grid: ChunkGrid, box: Box, itemsize_bytes: int, is_tensor: bool
) -> Iterator[StoredChunk]:
    size_bytes = chunk_bytes(grid, itemsize_bytes)
    for number, index in enumerate(grid.indices(box)):
        start = number * size_bytes
        if is_tensor:
            run = run_of(box.shape, grid.box(index).relative_to(box.offset))
            if run is None:
                raise ValueError(f"chunk {index} of {grid} is not one run of {box}")
            start = run[0] * itemsize_bytes
        yield StoredChunk(index, grid.key(index).encode(), start)


def _alignment(size_bytes: int) -> int:
    """Returns the power of two that the end of a box is aligned to, if its start is."""
    return min(size_bytes & -size_bytes, _MAX_ALIGNMENT) if size_bytes else _MAX_ALIGNMENT


def _missing_bytes(box: StoredBox) -> int:
    """Returns by how many bytes the last chunk of a box is shorter than its grid says."""
    if box.box.shape == box.grid.chunk_shape or not box.box.num_elements:
        return 0  # thousands of small arrays
    pairs = zip(box.box.end, box.grid.chunk_shape, strict=True)
    last = box.grid.box(tuple((end - 1) // size for end, size in pairs))
    missing = math.prod(box.grid.chunk_shape) - last.num_elements
    return missing * box.spec.itemsize_bytes
