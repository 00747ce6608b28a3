"""Plans reads of arrays: requests and locations in, batches of chunk reads out. Pure.

A request is a region of one array. It is cut into one part per chunk; of a chunk, the
digest blocks that hold the region are read, so that every byte can be verified. `plan_reads` sorts
the reads by file and offset and groups them; `read_direct` and `read_tensorstore` execute them.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import (
    ChunkGrid,
    digest_offsets,
    run_in_chunk,
    run_of,
    whole_blocks,
)
from functional_ckpt.core.arrays.digests import Digests
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.format.tuning import BATCH_BYTES, BATCH_FILES, BATCH_READS, PADDING_BYTES

if TYPE_CHECKING:
    from functional_ckpt.core.arrays.spec import Array

Location: TypeAlias = tuple[int, int, int]
"""Data file (its index), offset of a stored chunk in it, and its bytes."""
_NOWHERE = (-1, 0, -1)


class Destination(NamedTuple):
    """Where the bytes of a request go. Its functions are called on any thread.

    Attributes:
        memory: Returns host memory of the region's shape; it may be strided. Called before the
            first byte is written.
        done: Called after each chunk's part is verified and copied.
        send: Given for device memory, which then gets the bytes instead of `memory`:
            `send(start, size_bytes, fill)` changes `size_bytes` bytes from byte `start` on. It
            calls `fill` with its own host memory, piece by piece in order, to have it filled; all
            pieces but the last are multiples of a digest block.
    """

    memory: Callable[[], Array]
    done: Callable[[], None]
    send: Callable[[int, int, Callable[[Array], None]], None] | None = None

    @classmethod
    def into(cls, memory: Array) -> Destination:
        """Returns that of host memory, for a caller that waits until all is read."""
        return cls(lambda: memory, lambda: None)


class ReadRequest(NamedTuple):
    """A region of an array to be read.

    Attributes:
        name: The name under which the bytes are stored.
        spec: Shape and dtype of the entire array.
        box: The region.
        grid: The array's chunks; None for a foreign array, whose chunks TensorStore knows.
        digests: The recorded digests; None reads unverified.
        destination: Where the region goes; None verifies every chunk that it meets and keeps
            nothing.
    """

    name: str
    spec: ArraySpec
    box: Box
    grid: ChunkGrid | None = None
    digests: Digests | None = None
    destination: Destination | None = None

    @property
    def parts(self) -> Sequence[ChunkPart]:
        """One part per chunk; none for a foreign array."""
        if self.grid is None:
            return ()
        return _parts(
            self.grid.shape,
            self.grid.chunk_shape,
            self.grid.block_bytes,
            self.spec.itemsize_bytes,
            self.box.offset,
            self.box.shape,
            self.digests is not None,
            self.destination is not None,
        )

    @property
    def num_reads(self) -> int:
        """How often `destination.done` is called."""
        return len(self.parts) if self.grid is not None else 1 if self.box.num_elements else 0


class ChunkPart(NamedTuple):
    """The part of a region that is in one chunk, in bytes; equal arrays share it.

    Attributes:
        chunk: The chunk's index.
        key: Its key, relative to the array.
        stored_bytes: Bytes of the chunk as it is stored.
        first: The first of its bytes to read.
        end: One past the last of its bytes to read.
        block: The index of the digest block of `first` among the array's.
        start: Where exactly the read bytes go in contiguous memory of the region's shape; None
            where they must be cut or spread.
        local: The part, counted from the region's first element.
        inside: The part, counted from the chunk's first element.
        valid_shape: Shape of the chunk within the array.
        stored_shape: Shape of the chunk as it is stored, where it is stored with gaps between the
            rows of the valid region: it is verified after they are removed. Else None.
        skip: Bytes between `first` and the part, where the part is one run of the chunk's bytes;
            else None.
    """

    chunk: tuple[int, ...]
    key: str
    stored_bytes: int
    first: int
    end: int
    block: int
    start: int | None
    local: tuple[Any, ...]
    inside: Box
    valid_shape: tuple[int, ...]
    stored_shape: tuple[int, ...] | None
    skip: int | None


class ChunkRead(NamedTuple):
    """One read of a plan.

    Attributes:
        file: The data file; -1 where the location is not known.
        offset: Where the first byte to read is in the file; 0 where that is not known.
        request: The request that it serves.
        part: The part of a chunk to read; None for a foreign array, which is read at once.
    """

    file: int
    offset: int
    request: ReadRequest
    part: ChunkPart | None

    @property
    def num_bytes(self) -> int:
        """Bytes to read; of a foreign array, bytes of the region."""
        if self.part is None:
            return self.request.box.num_elements * self.request.spec.itemsize_bytes
        return self.part.end - self.part.first


Batch: TypeAlias = Sequence[ChunkRead]


def plan_reads(
    requests: Sequence[ReadRequest],
    locate: Callable[[Collection[bytes]], Mapping[bytes, Location]] | None = None,
    *,
    path: str = "",
    delivered: Collection[tuple[int, tuple[int, ...]]] = (),
) -> list[Batch]:
    """Plans the reads of requests.

    Args:
        requests: The regions to read, of one item.
        locate: Returns where the values of keys are stored; None for foreign arrays.
        path: The item's directory, for errors.
        delivered: Chunks that are not to be read: the index of the request, the chunk's index.

    Returns:
        Batches of reads, in the order of the files where that is known. One batch is executed on
        one thread; batches may be executed in any order.

    Raises:
        CorruptCheckpointError: A chunk is missing, or of another size than its grid says.
    """
    if locate is None:
        return list(_batches(list(_unlocated(requests, delivered))))
    wanted: list[tuple[bytes, ReadRequest, ChunkPart]] = []
    for number, request in enumerate(requests):
        prefix = key_prefix(request.name)
        wanted += [
            ((prefix + part.key).encode(), request, part)
            for part in request.parts
            if not delivered or (number, part.chunk) not in delivered
        ]
    reads: list[ChunkRead] = []
    locations = locate([key for key, _, _ in wanted])
    for key, request, part in wanted:
        file, offset, size_bytes = locations.get(key, _NOWHERE)
        if size_bytes != part.stored_bytes:
            got = "found none" if key not in locations else f"got {size_bytes} bytes"
            raise errors.CorruptCheckpointError(
                f"{path}: array {request.name!r}, chunk {key.decode()!r}: expected "
                f"{part.stored_bytes} bytes, {got}.",
                path=path,
                key_path=request.name,
            )
        reads.append(ChunkRead(file, offset + part.first, request, part))
    reads.sort(key=operator.itemgetter(0, 1))
    return list(_batches(reads))


def _unlocated(
    requests: Sequence[ReadRequest], delivered: Collection[tuple[int, tuple[int, ...]]]
) -> Iterator[ChunkRead]:
    for number, request in enumerate(requests):
        if request.grid is None:
            yield from [ChunkRead(-1, 0, request, None)] * request.num_reads
        for part in request.parts:
            if (number, part.chunk) not in delivered:
                yield ChunkRead(-1, 0, request, part)


def _batches(reads: Sequence[ChunkRead]) -> Iterator[Batch]:
    batch: list[ChunkRead] = []
    filled = num_files = 0
    for read in reads:
        if batch and read.file != batch[-1].file:
            num_files += 1
        if batch and (
            filled >= BATCH_BYTES or len(batch) >= BATCH_READS or num_files >= BATCH_FILES
        ):
            yield batch
            batch, filled, num_files = [], 0, 0
        batch.append(read)
        filled += read.num_bytes
    if batch:
        yield batch


class Located(Protocol):
    """A read of a known location."""

    @property
    def file(self) -> int:
        """The index of the data file."""
        ...

    @property
    def offset(self) -> int:
        """The first byte."""
        ...

    @property
    def num_bytes(self) -> int:
        """The number of bytes."""
        ...


_Read = TypeVar("_Read", bound=Located)


def adjacent(reads: Sequence[_Read]) -> Iterator[list[_Read]]:
    """Yields reads, sorted by location, in runs that are stored side by side, padding aside."""
    run: list[_Read] = []
    file = end = -2
    for read in reads:
        if run and (read.file != file or read.offset - end > PADDING_BYTES):
            yield run
            run = []
        run.append(read)
        file, end = read.file, read.offset + read.num_bytes
    if run:
        yield run


# Its arguments are plain tuples, which are hashed faster than the records made of them.
@functools.lru_cache(maxsize=4096)
def _parts(
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    block_bytes: int,
    itemsize_bytes: int,
    offset: tuple[int, ...],
    size: tuple[int, ...],
    is_verified: bool,
    keeps: bool,
) -> Sequence[ChunkPart]:
    """Returns the part of a region that is in each chunk, chunks in C order.

    With `is_verified`, entire digest blocks are read; without `keeps`, every chunk in full.
    """
    grid, box = ChunkGrid(shape, chunk_shape, block_bytes), Box(offset, size)
    parts: list[ChunkPart] = []
    for index in grid.indices(box):
        chunk = grid.box(index)
        common = chunk.intersect(box) if keeps else chunk
        if common is not None and common.num_elements:
            target = box if keeps else chunk
            parts.append(_part(grid, itemsize_bytes, target, index, common, is_verified))
    return tuple(parts)


def _part(
    grid: ChunkGrid,
    itemsize_bytes: int,
    box: Box,
    index: tuple[int, ...],
    common: Box,
    is_verified: bool,
) -> ChunkPart:
    chunk = grid.box(index)
    inside, local = common.relative_to(chunk.offset), common.relative_to(box.offset)
    stored_bytes = math.prod(grid.chunk_shape) * itemsize_bytes
    valid_bytes = chunk.num_elements * itemsize_bytes
    has_gaps = chunk.shape[1:] != grid.chunk_shape[1:]
    run = run_in_chunk(grid, index, inside, itemsize_bytes)
    first, end = (0, stored_bytes if has_gaps else valid_bytes) if run is None else run
    if run is not None and is_verified:
        first, end = whole_blocks(*run, valid_bytes, grid.block_bytes)
    target = run_of(box.shape, local)
    is_exact = run == (first, end) and target is not None
    offsets = digest_offsets(grid, itemsize_bytes)
    return ChunkPart(
        chunk=index,
        key=grid.key(index),
        stored_bytes=stored_bytes,
        first=first,
        end=end,
        block=offsets[grid.position(index)] + first // grid.block_bytes,
        start=target[0] * itemsize_bytes if is_exact and target is not None else None,
        local=local.slices(),
        inside=inside,
        valid_shape=chunk.shape,
        stored_shape=grid.chunk_shape if has_gaps else None,
        skip=None if run is None else run[0] - first,
    )
