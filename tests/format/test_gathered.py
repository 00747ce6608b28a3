"""Regions of many ranks: in columns they are the same chunks and digests as one by one."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_shapes import MESHES, SIZES

from functional_ckpt.core.arrays.sharding import DimShard, Sharding
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.arrays.write_plan import ShardedArray, plan_writes
from functional_ckpt.core.files.file_plan import stored_chunks
from functional_ckpt.format.gathered import Gathered
from functional_ckpt.format.regions import Regions
from functional_ckpt.format.write_files import WrittenBox
from functional_ckpt.format.write_index import IndexedArray
from functional_ckpt.saving.finalize import joined_digests


def regions_of(arrays: list[ShardedArray], rank: int) -> Regions:
    """A rank's report, encoded and decoded; every digest names its chunk."""
    boxes: list[WrittenBox] = []
    file, end = f"shard-{rank:05d}-data.safetensors", 4096
    for array, plan in zip(arrays, plan_writes(arrays, rank), strict=True):
        for piece in plan.of(rank):
            digests = ""
            for index in plan.grid.indices(piece.box):
                count = plan.grid.num_digests(index, array.spec.itemsize_bytes)
                position = plan.grid.position(index)
                digests += "".join(f"{position:012x}{number:04x}" for number in range(count))
            boxes.append(
                WrittenBox(array.name, plan.grid.chunk_shape, piece.box, file, end, True, digests)
            )
            end += piece.box.num_elements * array.spec.itemsize_bytes
    header, data = Regions.of(boxes, [file]).encode()
    decoded = Regions.decode(header, data)
    gathered = Gathered([decoded])
    assert [
        box for name in dict.fromkeys(b.name for b in boxes) for box in gathered.boxes(name)
    ] == boxes
    return decoded


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[ShardedArray], int]:
    mesh_shape = draw(st.sampled_from([s for s in MESHES if 16 <= math.prod(s) <= 64]))
    num_ranks = math.prod(mesh_shape)
    arrays: list[ShardedArray] = []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=2)))
        dims = st.integers(0, len(shape) - 1)
        cuts = st.one_of(st.none(), st.builds(DimShard, dims))
        sharding = Sharding(
            mesh_shape, tuple(range(num_ranks)), tuple(draw(cuts) for _ in mesh_shape)
        )
        arrays.append(ShardedArray("item", f"a{number}", ArraySpec(shape, "float32"), sharding))
    return arrays, num_ranks


@given(case=cases())
@settings(deadline=None, max_examples=30)
def test_columns_are_the_regions_one_by_one(case: tuple[list[ShardedArray], int]) -> None:
    arrays, num_ranks = case
    ranks = [regions_of(arrays, rank) for rank in range(num_ranks)]
    gathered = Gathered(ranks)
    for array, plan in zip(arrays, plan_writes(arrays, 0), strict=True):
        name, spec, grid = array.name, array.spec, plan.grid
        boxes = gathered.boxes(name)
        columns = gathered.columns(name, spec, grid)
        if columns is None:
            continue
        one_by_one = {
            chunk.key: (box.file, box.offset + chunk.start)
            for box in boxes
            for chunk in stored_chunks(grid, box.box, spec.itemsize_bytes, is_tensor=True)
        }
        files = [gathered.files[number] for number in columns.files.tolist()]
        places = zip(files, columns.offsets.tolist(), strict=True)
        keys = [b"c/" + key for key in columns.keys.suffixes]
        assert dict(zip(keys, places, strict=True)) == one_by_one
        assert keys == sorted(keys)
        assert columns.digests == joined_digests(IndexedArray(name, spec, grid, boxes))


def test_rows_of_many_ranks_are_columns() -> None:
    sharding = Sharding((32,), tuple(range(32)), (DimShard(0),))
    arrays = [ShardedArray("item", "w", ArraySpec((640, 7), "float32"), sharding)]
    gathered = Gathered([regions_of(arrays, rank) for rank in range(32)])
    grid = plan_writes(arrays, 0)[0].grid
    columns = gathered.columns("w", arrays[0].spec, grid)
    assert columns is not None and len(columns.files) == 32
    missing = Gathered([regions_of(arrays, rank) for rank in range(31)])
    assert missing.columns("w", arrays[0].spec, grid) is None, "a chunk is missing"
