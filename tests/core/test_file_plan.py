"""Planned files of tensors: the safetensors package reads them, and they hold all chunks."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_shapes import MESHES, SIZES

from functional_ckpt.core.arrays.chunks import choose_grid
from functional_ckpt.core.arrays.sharding import DimShard, Sharding
from functional_ckpt.core.arrays.spec import STORAGE_DTYPES, ArraySpec, Box
from functional_ckpt.core.arrays.write_plan import ShardedArray, plan_writes
from functional_ckpt.core.files import file_plan, safetensors_header
from functional_ckpt.core.files.file_plan import FilePlan, StoredBox
from functional_ckpt.core.files.safetensors_header import Tensor

DTYPES = ("float32", "int8", "bfloat16", "complex64", "bool", "float64", "complex128")


def value_of(spec: ArraySpec) -> np.ndarray[Any, Any]:
    """An array in which every byte says where it is."""
    numbers = np.arange(spec.num_elements * spec.itemsize_bytes, dtype=np.uint32)
    data = (numbers * 2654435761 >> 13).astype(np.uint8)
    return data.reshape(*spec.shape, spec.itemsize_bytes)


def image_of(plan: FilePlan, boxes: list[StoredBox]) -> bytes:
    """The bytes of a file: its boxes where the plan says, and zeros elsewhere."""
    image = bytearray(plan.size_bytes)
    image[: len(plan.header)] = plan.header
    for index, offset, grid in plan.members:
        box = boxes[index]
        values = value_of(box.spec)
        if plan.has_tensors:
            data = values[box.box.slices()].tobytes()
            image[offset : offset + len(data)] = data
            continue
        size = file_plan.chunk_bytes(grid, box.spec.itemsize_bytes)
        for number, chunk in enumerate(grid.indices(box.box)):
            padded = np.zeros((*grid.chunk_shape, box.spec.itemsize_bytes), np.uint8)
            valid = grid.box(chunk)
            padded[Box.whole(valid.shape).slices()] = values[valid.slices()]
            start = offset + number * size
            image[start : start + size] = padded.tobytes()
    return bytes(image)


def check(plans: list[FilePlan], boxes: list[StoredBox]) -> list[tuple[str, Box]]:
    """Every chunk is found by its location; returns the tensors of the files."""
    stored: list[tuple[str, Box]] = []
    for plan in plans:
        image = image_of(plan, boxes)
        assert len(image) == plan.size_bytes
        for index, offset, grid in plan.members:
            box = boxes[index]
            itemsize = box.spec.itemsize_bytes
            size = file_plan.chunk_bytes(grid, itemsize)
            chunks = file_plan.stored_chunks(grid, box.box, itemsize, is_tensor=plan.has_tensors)
            assert [chunk.chunk for chunk in chunks] == list(grid.indices(box.box))
            for chunk in chunks:
                data = image[offset + chunk.start : offset + chunk.start + size]
                assert len(data) == size, "a chunk reaches over the end of its file"
                valid = grid.box(chunk.chunk)
                values = np.frombuffer(data, np.uint8).reshape(*grid.chunk_shape, itemsize)
                expected = value_of(box.spec)[valid.slices()]
                assert np.array_equal(values[Box.whole(valid.shape).slices()], expected)
        if not plan.has_tensors:
            continue
        tensors, metadata = safetensors_header.decode(plan.header, plan.size_bytes)
        assert metadata["format"] == "pt"
        found = dict(safetensors.deserialize(image))
        assert found.keys() == {tensor.name for tensor in tensors}
        names = [boxes[member.number].name for member in plan.members]
        paddings = {name for name in found if name.startswith("functional_ckpt.")}
        assert found.keys() - paddings == set(names)
        for index, offset, _ in plan.members:
            box = boxes[index]
            assert found[box.name]["shape"] == list(box.box.shape)
            assert bytes(found[box.name]["data"]) == value_of(box.spec)[box.box.slices()].tobytes()
            assert offset % box.spec.itemsize_bytes == 0
            if safetensors_header.SHARDING in metadata:
                offsets = json.loads(metadata[safetensors_header.SHARDING])
                assert offsets.keys() == found.keys()
                assert offsets[box.name]["saved_offsets"] == list(box.box.offset)
            stored.append((box.name, box.box))
    return stored


@st.composite
def complete_boxes(draw: st.DrawFn) -> list[StoredBox]:
    boxes: list[StoredBox] = []
    names = st.text(st.characters(codec="utf-8"), max_size=6)
    for name in draw(st.lists(names | st.just("__metadata__"), unique=True, max_size=12)):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        spec = ArraySpec(shape, draw(st.sampled_from(DTYPES)))
        grid = choose_grid(spec, max_chunk_bytes=draw(st.sampled_from((1, 8, 40, 2**20))))
        boxes.append(
            StoredBox(name, spec, Box.whole(shape), grid, draw(st.booleans() | st.just(True)))
        )
    return boxes


@given(boxes=complete_boxes(), bytes_per_file=st.sampled_from((1, 100, 2**20)))
@settings(deadline=None, max_examples=60)
def test_complete_arrays_are_tensors_that_safetensors_reads(
    boxes: list[StoredBox], bytes_per_file: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_plan, "BYTES_PER_FILE", bytes_per_file)
        plans = file_plan.plan_files(boxes)
    stored = check(plans, boxes)
    assert sorted(name for name, _ in stored) == sorted(
        box.name
        for box in boxes
        if box.is_tensor and box.spec.dtype != "complex128" and box.name != "__metadata__"
    )
    assert sum(len(plan.members) for plan in plans) == len(boxes)


@st.composite
def sharded(draw: st.DrawFn) -> tuple[list[ShardedArray], int]:
    mesh_shape = draw(st.sampled_from([shape for shape in MESHES if math.prod(shape) <= 12]))
    num_ranks = math.prod(mesh_shape)
    arrays: list[ShardedArray] = []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)))
        while math.prod(shape) > 20_000:
            shape = shape[1:]
        dims = st.integers(0, len(shape) - 1)
        cuts = st.one_of(st.none(), st.builds(DimShard, dims, st.sampled_from((1, 2, 3))))
        sharding = Sharding(
            mesh_shape, tuple(range(num_ranks)), tuple(draw(cuts) for _ in mesh_shape)
        )
        dtype = draw(st.sampled_from(("float32", "int8", "bfloat16")))
        arrays.append(ShardedArray("item", f"a{number}", ArraySpec(shape, dtype), sharding))
    return arrays, num_ranks


@given(case=sharded())
@settings(deadline=None, max_examples=30)
def test_every_rank_stores_boxes_of_its_shards(case: tuple[list[ShardedArray], int]) -> None:
    arrays, num_ranks = case
    stored: dict[str, list[Box]] = {}
    for rank in range(num_ranks):
        planned = plan_writes(arrays, rank)
        boxes = [
            StoredBox(array.name, array.spec, piece.box, plan.grid, plan.is_tensor)
            for array, plan in zip(arrays, planned, strict=True)
            for piece in plan.of(rank)
        ]
        for name, box in check(file_plan.plan_files(boxes, is_sharded=True, rank=rank), boxes):
            stored.setdefault(name, []).append(box)
    for array in arrays:
        if array.name in stored:
            elements = sum(box.num_elements for box in stored[array.name])
            assert elements == array.spec.num_elements


def test_a_prime_number_of_rows_needs_no_bytes_after_the_file() -> None:
    spec = ArraySpec((32_003, 1000), "float32")
    boxes = [StoredBox("w", spec, Box.whole(spec.shape), choose_grid(spec))]
    (plan,) = file_plan.plan_files(boxes)
    assert plan.members[0].grid.chunk_shape == spec.shape
    boxes.append(
        StoredBox(
            "b",
            ArraySpec((4000,), "float32"),
            Box((0,), (4000,)),
            choose_grid(ArraySpec((4000,), "float32")),
        )
    )
    plans = file_plan.plan_files(boxes)
    assert [len(plan.members) for plan in plans] == [1, 1]


def test_a_file_has_a_bounded_number_of_tensors_and_bytes_of_header(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = ArraySpec((), "int8")
    grid = choose_grid(spec)
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 50)
    names = [f"{n}" for n in range(70)]
    plans = file_plan.plan_files([StoredBox(name, spec, Box((), ()), grid) for name in names])
    assert [len(plan.members) for plan in plans] == [50, 20]
    monkeypatch.setattr(safetensors_header, "MAX_HEADER_BYTES", 10_000)
    names = [f'{n}"\\\n' + "x" * 300 for n in range(40)]
    boxes = [StoredBox(name, spec, Box((), ()), grid) for name in names]
    for is_sharded in (False, True):
        plans = file_plan.plan_files(boxes, is_sharded=is_sharded)
        assert len(plans) > 2
        assert max(len(plan.header) for plan in plans) <= 12_288


def test_names_are_those_of_the_hub() -> None:
    spec = ArraySpec((2**21,), "float64")
    boxes = [StoredBox(f"{n}", spec, Box.whole(spec.shape), choose_grid(spec)) for n in range(8)]
    boxes.append(boxes[0]._replace(name="c", is_tensor=False))
    plans = file_plan.plan_files(boxes)
    names = [plan.name for plan in file_plan.file_names("model", plans)]
    assert names == [*(f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)), "chunks.bin"]
    named = file_plan.file_names("model", plans[:1])
    assert [plan.name for plan in named] == ["model.safetensors"]
    named = file_plan.file_names("data", plans[3:], shard=3)
    assert [plan.name for plan in named] == [
        "shard-00003-data.safetensors",
        "shard-00003-chunks.bin",
    ]
    named = file_plan.file_names("model", plans[:2], first=3, total=7)
    assert [plan.name for plan in named] == [f"model-{n:05d}-of-00007.safetensors" for n in (4, 5)]


def test_ties_are_metadata_of_the_file_that_holds_the_bytes() -> None:
    spec = ArraySpec((2,), "float32")
    boxes = [StoredBox("w", spec, Box.whole(spec.shape), choose_grid(spec))]
    (plan,) = file_plan.plan_files(boxes, tied={"head": "w", "format": "w"})
    _, metadata = safetensors_header.decode(plan.header, plan.size_bytes)
    assert metadata == {"format": "pt", "head": "w"}


# ------------------------------------------------------------------------------------ headers


def test_a_file_of_the_package_is_decoded() -> None:
    values = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0, 4), "c": torch.tensor(3)}
    image = safetensors.torch.save(values, {"format": "pt"})
    length = int.from_bytes(image[:8], "little")
    tensors, metadata = safetensors_header.decode(image[: 8 + length], len(image))
    assert {t.name: (t.dtype, t.shape) for t in tensors} == {
        "a": ("float32", (2, 3)),
        "b": ("float32", (0, 4)),
        "c": ("int64", ()),
    }
    assert metadata == {"format": "pt"}


def test_dtypes_are_those_of_the_package() -> None:
    tensors: list[Tensor] = []
    for number, dtype in enumerate(safetensors_header.DTYPES):
        start = tensors[-1].end if tensors else 0
        end = start + 8 * STORAGE_DTYPES[dtype]
        tensors.append(Tensor(f"{number}", dtype, (8,), start, end))
    header = safetensors_header.encode(tensors, {})
    image = header + bytes(tensors[-1].end)
    found = safetensors.torch.load(image)
    for number, dtype in enumerate(safetensors_header.DTYPES):
        assert found[f"{number}"].dtype == getattr(torch, dtype)
        assert found[f"{number}"].element_size() == STORAGE_DTYPES[dtype]


def entry(dtype: object, shape: object, offsets: object, name: str = "a") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


A = entry("U8", [4], [0, 4])
HOSTILE = {
    "overlap": (f"{{{A},{entry('U8', [4], [2, 6], 'b')}}}", 6, "overlaps"),
    "hole": (f"{{{entry('U8', [4], [1, 5])}}}", 5, "gap"),
    "tail": (f"{{{A}}}", 5, "end at byte"),
    "short": (f"{{{A}}}", 3, "end at byte"),
    "twice": (f"{{{A},{entry('U8', [0], [4, 4])}}}", 4, "twice"),
    "huge": (f"{{{entry('U8', [2**63], [0, 2**63])}}}", 4, "tensor 'a'"),
    "negative": (f"{{{entry('U8', [-1, -4], [0, 4])}}}", 4, "tensor 'a'"),
    "offsets": (f"{{{entry('F32', [4], [0, 4])}}}", 4, "tensor 'a'"),
    "dtype": (f"{{{entry('X8', [4], [0, 4])}}}", 4, "dtype"),
    "type": ('{"a":[1]}', 0, "not a header"),
    "list": ("[]", 0, "not a header"),
    "metadata": ('{"__metadata__":{"a":1}}', 0, "not a string"),
    "float": (f"{{{entry('U8', [4.0], [0, 4])}}}", 4, "integer"),
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_hostile_headers_are_refused(kind: str) -> None:
    text, data_bytes, why = HOSTILE[kind]
    data = len(text).to_bytes(8, "little") + text.encode()
    with pytest.raises(ValueError, match=why):
        safetensors_header.decode(data, len(data) + data_bytes)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 100])
def test_hostile_lengths_are_refused(length: int) -> None:
    data = length.to_bytes(8, "little") + b"{}"
    with pytest.raises(ValueError, match="header"):
        safetensors_header.decode(data, len(data))
