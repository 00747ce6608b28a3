from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import (
    DIGEST_BLOCK_BYTES,
    MAX_CHUNK_BYTES,
    ChunkGrid,
    asked_bytes,
    choose_grid,
    digest_offsets,
    run_of,
    runs,
)
from functional_ckpt.core.arrays.spec import ArraySpec, Box

SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
BUDGETS = st.sampled_from((1, 4, 16, 64, 256, 4096, MAX_CHUNK_BYTES))


@st.composite
def grids(draw: st.DrawFn) -> ChunkGrid:
    shape = draw(SHAPES)
    return ChunkGrid(shape, tuple(draw(st.integers(1, 12)) for _ in shape))


@given(grid=grids(), itemsize_bytes=st.sampled_from((1, 4, 8)), max_bytes=BUDGETS)
def test_runs_follow_each_other(grid: ChunkGrid, itemsize_bytes: int, max_bytes: int) -> None:
    end = 0
    for box in runs(grid, itemsize_bytes, max_bytes):
        found = run_of(grid.shape, box)
        assert found is not None and found[0] == end
        end = found[1]
        assert box.num_elements == 1 or box.num_elements * itemsize_bytes <= max_bytes
    assert end == math.prod(grid.shape)


@pytest.mark.parametrize("rows", [512, 640, 5000])
def test_runs_end_where_chunks_or_digest_blocks_do(rows: int) -> None:
    grid = ChunkGrid((5000, 1024), (rows, 1024))
    edges = [box.offset[0] for box in runs(grid, 4, 8 * 2**20)]
    assert len(edges) < 5
    assert all(edge % rows == 0 or edge % rows * 4096 % DIGEST_BLOCK_BYTES == 0 for edge in edges)


@given(grid=grids())
def test_chunks_tile_the_array(grid: ChunkGrid) -> None:
    count = np.zeros(grid.shape, int)
    indices = list(grid.indices())
    for index in indices:
        count[grid.box(index).slices()] += 1
    assert (count == 1).all()
    assert len(indices) == grid.num_chunks
    assert [grid.position(index) for index in indices] == list(range(grid.num_chunks))
    assert len({grid.key(index) for index in indices}) == grid.num_chunks


@given(grid=grids(), data=st.data())
def test_a_region_meets_the_chunks_that_intersect_it(grid: ChunkGrid, data: st.DataObject) -> None:
    offset = tuple(data.draw(st.integers(0, n)) for n in grid.shape)
    shape = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(grid.shape, offset, strict=True))
    region = Box(offset, shape)
    expected = [i for i in grid.indices() if grid.box(i).intersect(region) is not None]
    assert list(grid.indices(region)) == expected


@given(shape=SHAPES, dtype=st.sampled_from(("uint8", "float32", "complex128")), budget=BUDGETS)
def test_chunks_of_one_writer_keep_to_the_bound(
    shape: tuple[int, ...], dtype: str, budget: int
) -> None:
    spec = ArraySpec(shape, dtype)
    grid = choose_grid(spec, max_chunk_bytes=budget)
    assert math.prod(grid.chunk_shape) * spec.itemsize_bytes <= max(budget, spec.itemsize_bytes)
    if 0 < spec.size_bytes <= budget:
        assert grid.num_chunks == 1
    # Each chunk is contiguous: complete in every dim but one, of size 1 in the dims before it.
    partial = [d for d, (n, c) in enumerate(zip(shape, grid.chunk_shape, strict=True)) if 1 < c < n]
    for dim in partial:
        assert all(c == 1 for c in grid.chunk_shape[:dim])
        assert grid.chunk_shape[dim + 1 :] == tuple(max(1, n) for n in shape[dim + 1 :])


@given(shape=SHAPES.filter(lambda shape: len(shape) > 0), budget=BUDGETS, data=st.data())
def test_a_chunk_has_one_writer(shape: tuple[int, ...], budget: int, data: st.DataObject) -> None:
    """Whatever dims are sharded into however many parts of `ceil(n / k)`: no chunk spans two."""
    parts = [data.draw(st.integers(1, 5)) for _ in shape]
    shard = tuple(-(-n // k) for n, k in zip(shape, parts, strict=True))
    grid = choose_grid(ArraySpec(shape, "float32"), shard, budget)
    writers = np.zeros(shape, int)
    for dim, size in enumerate(shard):
        position = np.arange(shape[dim]) // max(1, size)
        writers = writers * 10 + position.reshape(
            [-1 if d == dim else 1 for d in range(len(shape))]
        )
    for index in grid.indices():
        assert len(np.unique(writers[grid.box(index).slices()])) == 1


def test_a_prime_shard_is_not_cut_into_slivers() -> None:
    grid = choose_grid(ArraySpec((4 * 10_007, 1024), "float32"), (10_007, 1024), 2**20)
    assert grid.chunk_shape == (10_007, 1024)
    grid = choose_grid(ArraySpec((4 * 10_007, 1024), "float32"), (10_007, 1024), 2**19)
    assert grid.chunk_shape == (1, 1024), "a chunk of 80 times the bound would be worse"


def test_grids_of_the_edges() -> None:
    assert choose_grid(ArraySpec((), "float32")).num_chunks == 1
    assert ChunkGrid((), ()).key(()) == "c"
    empty = choose_grid(ArraySpec((0, 3), "float32"))
    assert empty.num_chunks == 0 and list(empty.indices()) == []
    assert ChunkGrid((5,), (2,)).is_padded((2,)) and not ChunkGrid((4,), (2,)).is_padded((1,))


@pytest.mark.parametrize("chunk_shape", [(0,), (), (2, 2), (-1,), (1.5,), (True,)])
def test_chunk_grid_refuses_invalid_shapes(chunk_shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.UsageError, match="does not fit"):
        ChunkGrid((4,), chunk_shape)


@given(grid=grids(), itemsize=st.sampled_from((1, 4, 16, DIGEST_BLOCK_BYTES // 2)))
def test_digests_cover_every_byte_of_every_chunk(grid: ChunkGrid, itemsize: int) -> None:
    offsets = digest_offsets(grid, itemsize)
    assert len(offsets) == grid.num_chunks + 1
    for index in grid.indices():
        place = grid.position(index)
        count = offsets[place + 1] - offsets[place]
        size = grid.box(index).num_elements * itemsize
        assert (count - 1) * DIGEST_BLOCK_BYTES < size <= count * DIGEST_BLOCK_BYTES


def test_columns_of_a_chunk_ask_for_all_of_it() -> None:
    grid = ChunkGrid((1000, 1000), (1000, 1000))
    columns, row = Box((0, 0), (1000, 10)), Box((500, 0), (1, 1000))
    assert asked_bytes(grid, (0, 0), columns, 4) == 4_000_000
    assert 4_000 <= asked_bytes(grid, (0, 0), row, 4) < 4_000_000
