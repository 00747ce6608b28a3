"""Plans of every rank together: each chunk once, each empty array once, even loads."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_shapes import MESHES, SIZES

from functional_ckpt.core.arrays import chunks
from functional_ckpt.core.arrays.sharding import DimShard, Sharding
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.arrays.write_plan import ShardedArray, grid_of_boxes, plan_writes

MIB = 2**20


def check(arrays: Sequence[ShardedArray], num_ranks: int) -> list[int]:
    """Every rank's load, once it is known that all plans fit together."""
    written: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
    empty: collections.Counter[str] = collections.Counter()
    grids: dict[str, chunks.ChunkGrid] = {}
    loads: list[int] = []
    for rank in range(num_ranks):
        planned = plan_writes(arrays, rank)
        loads.append(0)
        for array, plan in zip(arrays, planned, strict=True):
            assert grids.setdefault(array.name, plan.grid) == plan.grid
            for piece in plan.of(rank):
                indices = list(plan.grid.indices(piece.box))
                assert all(piece.box.contains(plan.grid.box(index)) for index in indices)
                written.update((array.name, index) for index in indices)
                empty[array.name] += not indices
                loads[-1] += piece.box.num_elements * array.spec.itemsize_bytes
    expected = {(name, index) for name, grid in grids.items() for index in grid.indices()}
    assert set(written) == expected
    assert all(count == 1 for count in written.values())
    assert empty == {array.name: int(not array.spec.num_elements) for array in arrays}
    return loads


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[ShardedArray], int]:
    """Arrays that are sharded in different ways over one mesh, or complete on some ranks."""
    mesh_shape = draw(st.sampled_from([shape for shape in MESHES if math.prod(shape) <= 64]))
    num_ranks = math.prod(mesh_shape)
    arrays: list[ShardedArray] = []
    for place in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.sampled_from(SIZES), max_size=2)))
        cuts = st.none()
        if shape:
            dims = st.integers(0, len(shape) - 1)
            cuts = st.one_of(cuts, st.builds(DimShard, dims, st.sampled_from((1, 2, 3))))
        sharding = Sharding(
            mesh_shape, tuple(range(num_ranks)), tuple(draw(cuts) for _ in mesh_shape)
        )
        if draw(st.booleans()):
            holding = draw(st.sets(st.integers(0, num_ranks - 1), min_size=1))
            sharding = Sharding.replicated(tuple(sorted(holding)))
        dtype = draw(st.sampled_from(("float32", "int8", "complex128")))
        arrays.append(ShardedArray("item", f"a{place}", ArraySpec(shape, dtype), sharding))
    return arrays, num_ranks


@given(case=trees())
@settings(max_examples=80)
def test_each_chunk_has_one_writer(
    case: tuple[list[ShardedArray], int],
) -> None:
    check(*case)


def test_the_lowest_rank_that_has_an_empty_array_writes_it() -> None:
    array = ShardedArray("item", "a", ArraySpec((0, 3), "float32"), Sharding.replicated((2, 4, 7)))
    owners = [rank for rank in range(8) if plan_writes([array], rank)[0].of(rank)]
    assert owners == [2]


@pytest.mark.parametrize("mesh_shape", [(1024,), (2, 512), (4, 8, 32)])
def test_a_thousand_ranks_fit_together(mesh_shape: tuple[int, ...]) -> None:
    ranks = tuple(range(1024))
    spreads = (
        (DimShard(0),) * len(mesh_shape),
        (DimShard(0, 2), *(DimShard(0),) * (len(mesh_shape) - 1)),
        (None, *(DimShard(0),) * (len(mesh_shape) - 1)),
        (*(DimShard(0),) * (len(mesh_shape) - 1), DimShard(1)),
        (None,) * len(mesh_shape),
    )
    arrays = [
        ShardedArray(
            "item", f"a{place}", ArraySpec((4096, 7), "float32"), Sharding(mesh_shape, ranks, s)
        )
        for place, s in enumerate(spreads)
    ]
    check(arrays, 1024)


def test_ranks_that_see_parts_of_the_tree_agree() -> None:
    """Pipeline stages: each rank plans only its own leaves, some of which it shares."""
    spec = ArraySpec((1000, 1000), "float32")
    arrays = [
        ShardedArray("item", f"a{place:02d}", spec, Sharding.replicated(holders))
        for place, holders in enumerate([(0, 1), (2, 3), (0, 1, 2, 3), (1, 3), (0, 1)] * 3)
    ]
    written: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
    for rank in range(4):
        held = [array for array in arrays if rank in array.sharding.ranks]
        for array, plan in zip(held, plan_writes(held, rank), strict=True):
            written.update(
                (array.name, index)
                for piece in plan.of(rank)
                for index in plan.grid.indices(piece.box)
            )
    assert set(written.values()) == {1}
    assert len({name for name, _ in written}) == len(arrays)


@pytest.mark.parametrize("num_ranks", range(2, 17))
@pytest.mark.parametrize("tree", ["16 x 128 MiB", "transformer", "500 x 4 MiB"])
def test_replicas_share_two_gib_as_evenly_as_complete_tensors_can(
    num_ranks: int, tree: str
) -> None:
    shapes = {
        "16 x 128 MiB": [(8192, 4096)] * 16,
        "500 x 4 MiB": [(1024, 1024)] * 500,
        "transformer": [(50257, 1280), *[(1280, 3840), (1280, 1280), (5120, 1280), (1280,)] * 30],
    }[tree]
    everyone = Sharding.replicated(tuple(range(num_ranks)))
    arrays = [
        ShardedArray("item", f"a{place:04d}", ArraySpec(shape, "float32"), everyone)
        for place, shape in enumerate(shapes)
    ]
    loads = check(arrays, num_ranks)
    largest = max(array.spec.size_bytes for array in arrays)
    least = max(sum(loads) / num_ranks, -(-len(arrays) // num_ranks) * largest * (tree[:2] == "16"))
    assert max(loads) <= max(largest, 1.1 * least)


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_hsdp_replicas_share_evenly(replicas: int) -> None:
    ranks = tuple(range(replicas * 4))
    sharding = Sharding((replicas, 4), ranks, (None, DimShard(0)))
    arrays = [
        ShardedArray("item", f"a{place:04d}", ArraySpec((4096, 1024), "float32"), sharding)
        for place in range(128)
    ]
    loads = check(arrays, len(ranks))
    assert max(loads) <= 1.1 * sum(loads) / len(ranks)


@given(
    shape=st.lists(st.integers(1, 70_000), min_size=1, max_size=3).map(tuple),
    num_ranks=st.sampled_from((1, 2, 3, 8, 1024)),
    dim=st.integers(0, 2),
)
def test_write_plan_bounds_chunk_sizes(shape: tuple[int, ...], num_ranks: int, dim: int) -> None:
    cut = DimShard(min(dim, len(shape) - 1))
    sharding = Sharding((num_ranks,), tuple(range(num_ranks)), (cut,))
    spec = ArraySpec(shape, "float32")
    grid = chunks.choose_grid(spec, sharding.chunk_alignment(shape))
    size_bytes = math.prod(grid.chunk_shape) * spec.itemsize_bytes
    # More where a shard has no useful divisor: no thousands of slivers.
    assert size_bytes <= 64 * chunks.MAX_CHUNK_BYTES
    if cut.dim == 0 and num_ranks == 1:
        assert size_bytes <= chunks.MAX_CHUNK_BYTES


@given(st.data())
def test_a_chunk_of_any_cut_has_one_writer(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    edges = [
        sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape
    ]
    boxes = [
        Box(tuple(low for low, _ in cut), tuple(high - low for low, high in cut))
        for cut in itertools.product(*map(itertools.pairwise, edges))
    ]
    spec = ArraySpec(shape, "float32")
    grid, is_tensor = grid_of_boxes(spec, boxes)
    seen = [index for box in boxes for index in grid.indices(box)]
    assert sorted(seen) == sorted(grid.indices())
    for box in boxes if is_tensor else ():
        for index in grid.indices(box):
            assert chunks.run_of(box.shape, grid.box(index).relative_to(box.offset)) is not None
