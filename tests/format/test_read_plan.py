"""The plan of reads: its coverage, and that both executors follow it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_items import write_item

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import DIGEST_BLOCK_BYTES, ChunkGrid
from functional_ckpt.core.arrays.digests import Digests
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.format import backends, index, read_plan, reader
from functional_ckpt.format.read_plan import ChunkRead, Destination, Location, ReadRequest
from functional_ckpt.format.read_store import StoreReader
from functional_ckpt.format.write_files import ArrayWrite
from functional_ckpt.storage.local import LocalStorage

STORAGE = LocalStorage()


@st.composite
def regions(draw: st.DrawFn) -> tuple[ChunkGrid, Box]:
    shape = tuple(draw(st.lists(st.integers(1, 90), max_size=3)))
    chunk_shape = tuple(draw(st.integers(max(1, size // 4), size + 1)) for size in shape)
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    size = tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True))
    return ChunkGrid(shape, chunk_shape), Box(offset, size)


def request_of(
    name: str, grid: ChunkGrid, box: Box, *, text: str | None = "", keeps: bool = True
) -> ReadRequest:
    digests = None if text is None else Digests(grid, 8, text)
    destination = Destination(lambda: np.empty(box.shape), lambda: None) if keeps else None
    return ReadRequest(name, ArraySpec(grid.shape, "float64"), box, grid, digests, destination)


def located(name: str, grid: ChunkGrid, itemsize: int = 8) -> dict[bytes, Location]:
    size = int(np.prod(grid.chunk_shape)) * itemsize
    keys = [f"{name}/{grid.key(index)}".encode() for index in grid.indices()]
    return {key: (place % 3, (len(keys) - place) * size, size) for place, key in enumerate(keys)}


def flat(batches: Sequence[read_plan.Batch]) -> list[ChunkRead]:
    return list(itertools.chain.from_iterable(batches))


@given(regions(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_plan_covers_every_element_of_a_region_once(
    region: tuple[ChunkGrid, Box], is_verified: bool
) -> None:
    grid, box = region
    request = request_of("a", grid, box, text="" if is_verified else None)
    reads = flat(read_plan.plan_reads([request], lambda _: located("a", grid)))
    covered = np.zeros(box.shape, int)
    for read in reads:
        part = read.part
        assert part is not None
        covered[part.local] += 1
        chunk = grid.box(part.chunk)
        assert chunk.offset == tuple(
            o + place.start - i
            for o, place, i in zip(box.offset, part.local, part.inside.offset, strict=False)
        )
        assert 0 <= part.first < part.end <= part.stored_bytes
    assert (covered == 1).all() and len(reads) == request.num_reads


@given(regions())
@settings(max_examples=100, deadline=None)
def test_plan_reads_entire_digest_blocks(region: tuple[ChunkGrid, Box]) -> None:
    grid, box = region
    for read in flat(read_plan.plan_reads([request_of("a", grid, box)])):
        part = read.part
        assert part is not None
        valid_bytes = grid.box(part.chunk).num_elements * 8
        assert part.first % DIGEST_BLOCK_BYTES == 0
        if part.stored_shape is None:
            assert part.end == valid_bytes or part.end % DIGEST_BLOCK_BYTES == 0
        else:
            assert (part.first, part.end) == (0, part.stored_bytes)


@given(regions())
@settings(max_examples=60, deadline=None)
def test_plan_without_destination_reads_entire_chunks(region: tuple[ChunkGrid, Box]) -> None:
    grid, box = region
    reads = flat(read_plan.plan_reads([request_of("a", grid, box, keeps=False)]))
    assert [read.part and read.part.chunk for read in reads] == list(grid.indices(box))
    for read in reads:
        assert read.part is not None
        valid = grid.box(read.part.chunk).num_elements * 8
        assert read.num_bytes == (read.part.stored_bytes if read.part.stored_shape else valid)


@given(st.lists(regions(), min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_plan_is_ordered_by_place_and_leaves_out_what_was_delivered(
    several: list[tuple[ChunkGrid, Box]], data: st.DataObject
) -> None:
    requests = [request_of(f"a{n}", grid, box) for n, (grid, box) in enumerate(several)]
    locations = {
        k: v for n, (grid, _) in enumerate(several) for k, v in located(f"a{n}", grid).items()
    }
    wanted = [(n, part.chunk) for n, request in enumerate(requests) for part in request.parts]
    delivered = data.draw(st.sets(st.sampled_from(wanted))) if wanted else set()
    reads = flat(read_plan.plan_reads(requests, lambda _: locations, delivered=delivered))
    assert [read[:2] for read in reads] == sorted(read[:2] for read in reads)
    found = [(int(read.request.name[1:]), read.part.chunk) for read in reads if read.part]
    assert sorted(found) == sorted(set(wanted) - delivered)


def test_batches_are_bounded() -> None:
    small = [request_of(str(n), ChunkGrid((2,), (2,)), Box((0,), (2,))) for n in range(1200)]
    batches = read_plan.plan_reads(small)
    assert [len(batch) for batch in batches] == [512, 512, 176]
    large = [
        request_of(str(n), ChunkGrid((2**19,), (2**19,)), Box((0,), (2**19,))) for n in range(5)
    ]
    assert [len(batch) for batch in read_plan.plan_reads(large)] == [2, 2, 1]


@pytest.mark.parametrize("stored_bytes", [None, 15, 17])
def test_a_chunk_that_is_missing_or_of_another_size_is_damage(stored_bytes: int | None) -> None:
    request = request_of("a", ChunkGrid((2,), (2,)), Box((0,), (2,)))
    locations = {} if stored_bytes is None else {b"a/c/0": (0, 0, stored_bytes)}
    got = "found none" if stored_bytes is None else f"got {stored_bytes} bytes"
    with pytest.raises(errors.CorruptCheckpointError, match=f"expected 16 bytes, {got}") as caught:
        read_plan.plan_reads([request], lambda _: locations, path="/step/item")
    assert caught.value.key_path == "a" and caught.value.path == "/step/item"


# ------------------------------------------------------------------------------------ executors

CONTENT = np.random.default_rng(0).random((70, 300))
GRIDS = [(70, 300), (33, 300), (70, 77), (1, 300), (20, 299)]
BOXES = [
    Box((0, 0), (70, 300)),
    Box((3, 0), (60, 300)),
    Box((0, 5), (70, 90)),
    Box((69, 299), (1, 1)),
    Box((10, 10), (0, 5)),
]


@pytest.fixture(scope="module", params=["files", "store"])
def arrays(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Any, list[str]]:
    """Opens a reader of an item with `CONTENT` once per grid; and the recorded digests."""
    path = str(tmp_path_factory.mktemp("item"))
    writes = [
        ArrayWrite(
            name=f"a{n}",
            spec=ArraySpec(CONTENT.shape, "float64"),
            grid=ChunkGrid(CONTENT.shape, grid),
            box=Box.whole(CONTENT.shape),
            data=CONTENT,
        )
        for n, grid in enumerate(GRIDS)
    ]
    joined, _ = write_item(STORAGE, path, writes)

    def open_reader() -> Any:
        if request.param == "files":
            return backends.open_reader(STORAGE, path, {})
        return StoreReader(index.open_index(STORAGE, path))

    return open_reader, [joined[write.name] for write in writes]


@pytest.mark.parametrize("kind", ["contiguous", "strided", "sent", "unverified", "checked"])
@pytest.mark.parametrize("box", BOXES)
def test_executors_read_any_region_into_any_destination(
    arrays: tuple[Any, list[str]], box: Box, kind: str
) -> None:
    open_reader, texts = arrays
    with contextlib.closing(open_reader()) as reader:
        for number, shape in enumerate(GRIDS):
            memory = np.zeros(box.shape)
            if kind == "strided":
                memory = np.zeros((box.shape[0], 2 * box.shape[1]))[:, ::2]
            done: list[int] = []

            def send(start: int, size: int, fill: Any, memory: Any = memory) -> None:
                target = memory.reshape(-1).view(np.uint8)
                for at in range(start, start + size, DIGEST_BLOCK_BYTES):
                    fill(target[at : min(at + DIGEST_BLOCK_BYTES, start + size)])

            destination = Destination(
                lambda memory=memory: memory,
                lambda done=done: done.append(1),
                send if kind == "sent" else None,
            )
            text = None if kind == "unverified" else texts[number]
            request = request_of(f"a{number}", ChunkGrid(CONTENT.shape, shape), box, text=text)
            request = request._replace(destination=None if kind == "checked" else destination)
            for task in reader.tasks([request]):
                task()
            if kind != "checked":
                assert len(done) == request.num_reads
                assert np.array_equal(memory, CONTENT[box.slices()])


@pytest.mark.parametrize("keeps", [True, False])
def test_executors_notice_a_wrong_digest_of_any_block(
    arrays: tuple[Any, list[str]], keeps: bool
) -> None:
    open_reader, texts = arrays
    with contextlib.closing(open_reader()) as reader:
        for number, shape in enumerate(GRIDS):
            grid, text = ChunkGrid(CONTENT.shape, shape), texts[number]
            for block in range(0, len(text) // 16, 5):
                wrong = text[: 16 * block] + "0" * 16 + text[16 * block + 16 :]
                request = request_of(f"a{number}", grid, Box.whole(grid.shape), text=wrong)
                request = request if keeps else request._replace(destination=None)
                with pytest.raises(errors.CorruptCheckpointError, match="expected digest 00000000"):
                    for task in reader.tasks([request]):
                        task()


def test_a_truncated_or_missing_data_file_is_damage(tmp_path: Path) -> None:
    grid = ChunkGrid(CONTENT.shape, CONTENT.shape)
    write = ArrayWrite(
        "a", ArraySpec(CONTENT.shape, "float64"), grid, Box.whole(CONTENT.shape), CONTENT
    )
    item = str(tmp_path / "item")
    STORAGE.make_directory(item)
    _, files = write_item(STORAGE, item, [write])
    request = request_of("a", grid, Box.whole(grid.shape), text=None)
    [file] = [tmp_path / "item" / name for name in files if name.endswith(".safetensors")]
    with contextlib.closing(backends.open_reader(STORAGE, item, files)) as reader:
        [task] = reader.tasks([request])
        content = file.read_bytes()
        file.write_bytes(content[:1000])
        with pytest.raises(errors.CorruptCheckpointError, match="truncated"):
            task()
    for kind in ("missing", "link"):
        file.unlink()
        if kind == "link":
            outside = tmp_path / "outside"
            outside.write_bytes(content)
            file.symlink_to(outside)
        with (
            contextlib.closing(backends.open_reader(STORAGE, item, files)) as reader,
            pytest.raises(errors.CorruptCheckpointError, match=r"missing|got a link"),
        ):
            reader.tasks([request])
        file.write_bytes(b"")


def test_bytes_for_a_device_are_sent_piece_by_piece() -> None:
    data, got = np.arange(10, dtype=np.uint8), list[int]()

    def send(start: int, num_bytes: int, fill: Callable[[Any], None]) -> None:
        assert (start, num_bytes) == (40, 10)
        for size in (4, 4, 2):
            piece = np.zeros(size, np.uint8)
            fill(piece)
            got.extend(piece.tolist())

    destination = mock.Mock(send=send)
    read = mock.Mock(request=mock.Mock(destination=destination))
    reader.put(read, mock.Mock(start=40), data)
    assert got == list(range(10))
    destination.done.assert_called_once_with()
