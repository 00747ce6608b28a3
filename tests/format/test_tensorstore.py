from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from written_items import write_item

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import ChunkGrid, choose_grid
from functional_ckpt.core.arrays.digests import Digests
from functional_ckpt.core.arrays.spec import STORAGE_DTYPES, ArraySpec, Box, numpy_dtype
from functional_ckpt.format import database as database_lib
from functional_ckpt.format import index, read_store, read_tensorstore
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.format.write_files import ArrayWrite
from functional_ckpt.runtime import threads
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.testing import Fault, FaultyStorage


def _data(spec: ArraySpec, seed: int = 0) -> Any:
    data = np.random.default_rng(seed).integers(0, 256, spec.size_bytes, np.uint8)
    if spec.dtype == "bool":
        data %= 2
    elif spec.dtype in ("int2", "int4", "float4_e2m1fn"):
        return (
            (np.arange(spec.num_elements) % 2).astype(numpy_dtype(spec.dtype)).reshape(spec.shape)
        )
    return data.view(numpy_dtype(spec.dtype)).reshape(spec.shape)


def _write(directory: str, contents: dict[str, tuple[Any, ChunkGrid]]) -> dict[str, str]:
    """Writes arrays as one writer does; returns their digests."""
    os.makedirs(directory, exist_ok=True)
    writes = [
        ArrayWrite(
            name=name,
            spec=ArraySpec(data.shape, data.dtype.name),
            grid=grid,
            box=Box.whole(data.shape),
            data=data,
        )
        for name, (data, grid) in contents.items()
    ]
    return write_item(LocalStorage(), directory, writes)[0]


def _request(
    name: str, data: Any, grid: ChunkGrid, text: str | None, box: Box | None = None
) -> ReadRequest:
    spec = ArraySpec(data.shape, data.dtype.name)
    digests = None if text is None else Digests(grid, spec.itemsize_bytes, text)
    return ReadRequest(name, spec, box or Box.whole(data.shape), grid, digests)


def _read(directory: str, request: ReadRequest, memory: Any = None) -> None:
    """Reads as from an object store; without memory only verifies."""
    if memory is not None:
        request = request._replace(destination=Destination(lambda: memory, lambda: None))
    opened = index.open_index(LocalStorage(), directory)
    for task in read_store.StoreReader(opened).tasks([request]):
        task()


@pytest.mark.matrix(3)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (300, 200)])
def test_every_dtype_small_and_large(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    spec = ArraySpec(shape, dtype)
    data, grid = _data(spec), choose_grid(spec)
    digests = _write(str(tmp_path), {"a": (data, grid)})
    got = np.zeros(shape, data.dtype)
    _read(str(tmp_path), _request("a", data, grid, digests["a"]), got)
    assert got.tobytes() == data.tobytes()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_region_of_any_grid(data: st.DataObject, tmp_path_factory: Any) -> None:
    directory = str(tmp_path_factory.mktemp("item"))
    shape = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=2).map(tuple))
    grid = ChunkGrid(shape, tuple(data.draw(st.integers(1, n)) for n in shape))
    if grid.num_chunks > 200:
        grid = ChunkGrid(shape, tuple(-(-n // 8) for n in shape))
    content = _data(ArraySpec(shape, "float64"), seed=1)
    order = data.draw(st.sampled_from("CF"))
    digests = _write(directory, {"a": (np.asarray(content, order=order), grid)})
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = Box(
        offset, tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    )
    got = np.zeros(tuple(2 * n for n in box.shape), content.dtype)[
        tuple(slice(0, n) for n in box.shape)
    ]
    _read(directory, _request("a", content, grid, digests["a"], box), got)
    assert got.tobytes() == content[box.slices()].tobytes()


@pytest.mark.parametrize(
    "name", ["a.b", "a/b", "é", "\U0001f600", "a b", "%41", "..", "a\0b", "?x#y"]
)
def test_arrays_with_any_name_are_read_back(name: str, tmp_path: Path) -> None:
    content, grid = np.arange(6.0), ChunkGrid((6,), (4,))
    digests = _write(str(tmp_path), {name: (content, grid), "other": (content + 1, grid)})
    got = np.zeros(6)
    _read(str(tmp_path), _request(name, content, grid, digests[name]), got)
    assert (got == content).all()


def test_two_writers_of_one_array(tmp_path: Path) -> None:
    content = np.arange(8 * 40_000, dtype=np.float64).reshape(8, 40_000)
    grid, directory = ChunkGrid(content.shape, (2, 40_000)), str(tmp_path)
    writes = [
        ArrayWrite(
            name="a",
            spec=ArraySpec(content.shape, "float64"),
            grid=grid,
            box=Box((row, 0), (4, 40_000)),
            data=content[row : row + 4],
        )
        for row in (0, 4)
    ]
    digests, _ = write_item(LocalStorage(), directory, *([write] for write in writes))
    got = np.zeros_like(content)
    _read(directory, _request("a", content, grid, digests["a"]), got)
    assert (got == content).all()


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("shape", [(2_000,), (400, 400)])
def test_any_flipped_bit_of_the_data_is_found(shape: tuple[int, ...], tmp_path: Path) -> None:
    content = _data(ArraySpec(shape, "uint8"))
    grid = choose_grid(ArraySpec(shape, "uint8"))
    digests = _write(str(tmp_path), {"a": (content, grid)})
    [file] = [f for f in tmp_path.iterdir() if content.tobytes()[:1_000] in f.read_bytes()]
    start = file.read_bytes().index(content.tobytes()[:1_000])
    for place in (0, content.nbytes // 2, content.nbytes - 1):
        _flip(file, start + place)
        got = np.zeros_like(content)
        with pytest.raises(
            errors.CorruptCheckpointError, match="changed after it was written"
        ) as e:
            _read(str(tmp_path), _request("a", content, grid, digests["a"]), got)
        assert e.value.key_path == "a" and str(tmp_path) in str(e.value)
        with pytest.raises(errors.CorruptCheckpointError):
            _read(str(tmp_path), _request("a", content, grid, digests["a"]))
        unverified = _request("a", content, grid, None)
        _read(str(tmp_path), unverified, got)
        _flip(file, start + place)


@pytest.mark.parametrize("shape", [(100,), (400, 400)])
def test_truncated_and_missing_data_is_found(shape: tuple[int, ...], tmp_path: Path) -> None:
    content = _data(ArraySpec((*shape, 8), "uint8"))
    grid = choose_grid(ArraySpec(content.shape, "uint8"))
    digests = _write(
        str(tmp_path), {"a": (content, grid), "b": (np.zeros(2_000), ChunkGrid((2_000,), (2_000,)))}
    )
    read = _request("a", content, grid, digests["a"])
    for file in sorted(tmp_path.glob("*.safetensors")):
        if file.is_file():
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(errors.CorruptCheckpointError):
        _read(str(tmp_path), read, np.zeros_like(content))
    (tmp_path / "manifest.ocdbt").unlink()
    with pytest.raises(errors.CorruptCheckpointError, match=r"manifest\.ocdbt is missing"):
        database_lib.open_for_reading(str(tmp_path), LocalStorage())


def test_an_array_that_is_not_there(tmp_path: Path) -> None:
    content, grid = np.arange(3.0), ChunkGrid((3,), (3,))
    digests = _write(str(tmp_path), {"a": (content, grid)})
    with pytest.raises(errors.CorruptCheckpointError, match="found none"):
        _read(str(tmp_path), _request("b", content, grid, digests["a"]), np.zeros(3))


@pytest.mark.parametrize("text", [b"", b"{", b"not ocdbt" * 100])
def test_damaged_manifest_raises_corrupt(text: bytes, tmp_path: Path) -> None:
    content, grid = np.arange(3.0), ChunkGrid((3,), (3,))
    digests = _write(str(tmp_path), {"a": (content, grid)})
    (tmp_path / "manifest.ocdbt").write_bytes(text)
    with pytest.raises(errors.CorruptCheckpointError):
        _read(str(tmp_path), _request("a", content, grid, digests["a"]), np.zeros(3))


@pytest.mark.parametrize(
    "record",
    [
        {"shape": [2**62], "data_type": "float32"},
        {"shape": [-1], "data_type": "float32"},
        {"shape": "x", "data_type": "float32"},
        {"shape": [2], "data_type": "r16"},
        {"shape": [2], "data_type": {"name": "float32"}},
        {"shape": [2]},
        [],
        None,
    ],
)
def test_metadata_of_others_is_checked_before_tensorstore_sees_it(
    record: Any, tmp_path: Path
) -> None:
    spec = {"driver": "ocdbt", "base": f"file://{tmp_path}/"}
    store = ts.KvStore.open(spec).result()
    store.write("a/zarr.json", json.dumps(record).encode()).result()
    with pytest.raises(errors.CorruptCheckpointError) as caught:
        database = database_lib.open_for_reading(str(tmp_path), LocalStorage())
        read_tensorstore.stored_spec(database, "a", is_zarr3=True)
    assert caught.value.key_path == "a"


def test_a_failing_operation_is_named(tmp_path: Path) -> None:
    content, grid = np.arange(3.0), ChunkGrid((3,), (3,))
    write = ArrayWrite(
        name="a", spec=ArraySpec((3,), "float64"), grid=grid, box=Box.whole((3,)), data=content
    )
    for kind in ("write", "write_data"):
        storage = FaultyStorage(Fault(at=0, kinds=(kind,)))
        with pytest.raises(errors.StorageError, match=str(tmp_path)):
            write_item(storage, str(tmp_path), [write])


def test_threads_stop_at_the_first_error_and_raise_it() -> None:
    done: list[int] = []

    def fail() -> None:
        raise ValueError("first")

    def work() -> None:
        done.append(1)

    with pytest.raises(ValueError, match="first"):
        threads.run_in_threads([fail, *[work] * 1_000])
    assert len(done) < 1_000
    threads.run_in_threads([work] * 10)
    threads.run_in_threads([])


@pytest.mark.parametrize("max_calls", [1, 2, 5])
def test_calls_behind_come_one_after_the_other_and_their_error_once(max_calls: int) -> None:
    done: list[int] = []
    caller = threading.get_ident()

    def fail() -> None:
        raise ValueError("behind")

    behind = threads.BackgroundWriter(max_calls)
    try:
        for number in range(50):
            behind.run(lambda number=number: done.append(number))
        behind.run(lambda: done.append(-threading.get_ident()))
        behind.wait()
        assert done[:-1] == list(range(50)) and done[-1] != -caller
        behind.run(fail)
        for _ in range(max_calls - 1):
            behind.run(lambda: done.append(50))
        with pytest.raises(ValueError, match="behind"):
            behind.run(lambda: done.append(-1))
        behind.wait()
        assert done[51:] == [50] * (max_calls - 1)
    finally:
        behind.close()
        behind.close()


@pytest.mark.parametrize("max_calls", [1, 2, 5])
def test_no_more_calls_than_agreed_are_behind(max_calls: int) -> None:
    """Callers that rotate buffers rely on it."""
    may_end = threading.Semaphore(0)
    handed_on = threading.Semaphore(0)

    def hand_on() -> None:
        with contextlib.closing(threads.BackgroundWriter(max_calls)) as behind:
            for _ in range(max_calls + 2):
                behind.run(may_end.acquire)
                handed_on.release()

    thread = threading.Thread(target=hand_on)
    thread.start()
    try:
        for _ in range(max_calls):
            assert handed_on.acquire(timeout=30)
        assert not handed_on.acquire(timeout=0.05)
        may_end.release()
        assert handed_on.acquire(timeout=30)
        assert not handed_on.acquire(timeout=0.05)
    finally:
        may_end.release(max_calls + 2)
        thread.join()


def test_digests_of_a_block_are_those_of_the_valid_region(tmp_path: Path) -> None:
    """The padding of an edge chunk is not verified."""
    content, grid = np.arange(5, dtype=np.uint8), ChunkGrid((5,), (4,))
    digests = _write(str(tmp_path), {"a": (content, grid)})["a"]
    assert len(digests) == 16 * math.prod(grid.num_chunks_per_dim)
    other = _write(str(tmp_path / "b"), {"a": (content[4:], ChunkGrid((1,), (1,)))})["a"]
    assert digests[16:] == other
    assert os.path.exists(tmp_path / "manifest.ocdbt")
