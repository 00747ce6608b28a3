"""Databases written without TensorStore: it reads them, and they equal its own."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import xxhash
from fake_bucket import FakeBucket
from hypothesis import given, settings
from hypothesis import strategies as st
from written_items import write_item

from functional_ckpt import errors, testing
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.files import file_plan
from functional_ckpt.core.tree.structure import key_prefix
from functional_ckpt.format import data_file, index, read_direct, read_plan, tuning
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.format.write_files import ArrayWrite
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.object_store import ObjectStorage

STORAGE = LocalStorage()


def store_of(path: Path) -> ts.KvStore:
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()


def reader_of(path: Path) -> read_direct.DirectReader:
    return read_direct.DirectReader(index.open_index(STORAGE, str(path)))


def write_of(name: str, data: np.ndarray, chunk: tuple[int, ...]) -> ArrayWrite:
    spec = ArraySpec(data.shape, data.dtype.name)
    grid = ChunkGrid(data.shape, chunk)
    return ArrayWrite(name=name, spec=spec, grid=grid, box=Box.whole(data.shape), data=data)


# ------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("is_stable", [False, True])
@pytest.mark.parametrize(("bytes_per_file", "num_threads"), [(1, 4), (1, 1), (2**30, 4)])
def test_tensorstore_reads_ordinary_zarr3_arrays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bytes_per_file: int,
    num_threads: int,
    is_stable: bool,
) -> None:
    monkeypatch.setattr(file_plan, "BYTES_PER_FILE", bytes_per_file)
    if is_stable:  # as large files are written, in place
        monkeypatch.setattr(data_file, "DIRECT_FROM_BYTES", 1)
        monkeypatch.setattr(data_file, "LENT_FROM_BYTES", 2 * 4096)
    rng = np.random.default_rng(0)
    writes = [
        write_of("a", rng.random((50, 3)), (50, 3)),
        write_of("a.b/", rng.random((7, 1000, 40)), (3, 1000, 40)),
        write_of("corner", rng.random((5, 7)), (3, 4)),
        write_of("edge", rng.random((30_001, 9)), (20_000, 9)),
        write_of("empty", np.empty((0, 3)), (1, 3)),
        write_of("scalar", np.array(3.5), ()),
        write_of("strided", rng.random((70, 90)).T, (45, 70)),
        write_of("same", rng.random((50, 3)), (50, 3)),
    ]
    writes = [write._replace(is_stable=is_stable) for write in writes]
    scalars = [("n", ArraySpec((), "int64"), 7)]
    tied = {"b": "a.b/"}
    digests, files = write_item(
        STORAGE, str(tmp_path), writes, scalars=scalars, tied=tied, num_threads=num_threads
    )
    assert digests.keys() == {write.name for write in writes}
    expected = {write.name: write.data for write in writes} | {"b": writes[1].data, "n": 7}
    store = store_of(tmp_path)
    for name, value in expected.items():
        kvstore = (store / key_prefix(name)).spec().to_json()
        array = ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
        assert np.array_equal(array.read().result(), value)
    for name, record in files.items():
        data = (tmp_path / name).read_bytes()
        assert (len(data), xxhash.xxh3_64_hexdigest(data)) == (record.size_bytes, record.xxh3)
    assert set(files) == set(os.listdir(tmp_path))


def test_few_of_many_files_are_open_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "MAX_OPEN_FILES", 10)
    monkeypatch.setattr(read_plan, "BATCH_FILES", 4)
    rows = np.random.default_rng(0).random((40, 9))
    write_item(
        STORAGE, str(tmp_path), *([write_of(f"{n}", row, (9,))] for n, row in enumerate(rows))
    )
    found = np.zeros_like(rows)
    spec = ArraySpec((9,), "float64")
    requests = [
        ReadRequest(
            f"{number}",
            spec,
            Box.whole((9,)),
            ChunkGrid((9,), (9,)),
            None,
            Destination(lambda number=number: found[number], lambda: None),
        )
        for number in range(len(rows))
    ]
    reader = reader_of(tmp_path)
    most = 0
    opened = reader._open

    def count(file: str) -> int:
        nonlocal most
        most = max(most, len(reader._descriptors) + 1)
        return opened(file)

    monkeypatch.setattr(reader, "_open", count)
    for task in reader.tasks(requests):
        task()
    assert np.array_equal(found, rows)
    assert most <= 4 and not reader._descriptors
    for task in reader.tasks(requests[:5]):
        task()
    assert len(reader._descriptors) == 5, "few files stay open"
    reader.close()
    (tmp_path / "shard-00039-data.safetensors").unlink()
    with pytest.raises(errors.CorruptCheckpointError, match="missing"):
        reader.tasks(requests)  # before anything is read


def test_only_what_is_wanted_is_asked_for_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(0).random((16, 2**13))
    names = [f"{number:02}" for number in range(len(data))]
    writes = [write_of(name, row, row.shape) for name, row in zip(names, data, strict=True)]
    write_item(STORAGE, str(tmp_path), writes)
    asked: list[int] = []

    def advise(descriptor: int, offset: int, size_bytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            asked.append(size_bytes)

    monkeypatch.setattr(read_direct.os, "posix_fadvise", advise)
    read = np.zeros_like(data)
    requests = [
        ReadRequest(
            names[place],
            writes[place].spec,
            writes[place].box,
            writes[place].grid,
            destination=Destination(functools.partial(read.__getitem__, place), lambda: None),
        )
        for place in (0, 1, 2, 15)
    ]
    with contextlib.closing(reader_of(tmp_path)) as reader:
        for task in reader.tasks(requests):
            task()
    assert asked == [3 * data[0].nbytes, data[0].nbytes]
    assert np.array_equal(read[[0, 1, 2, 15]], data[[0, 1, 2, 15]]) and not read[3:15].any()


# ------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, 5 * 2**20 + 3, 17 * 2**20 + 5])
@pytest.mark.parametrize("promised", [0, 1])
def test_a_data_file_holds_what_it_was_given(
    tmp_path: Path, size_bytes: int, promised: int
) -> None:
    data = np.random.default_rng(0).integers(0, 255, size_bytes, np.uint8)
    path = tmp_path / "x"
    cuts = [0, size_bytes // 3, size_bytes // 3, size_bytes // 3 + size_bytes // 2, size_bytes]
    with contextlib.closing(
        data_file.DataFile(STORAGE, str(path), size_bytes * (1 + promised))
    ) as file:
        for start, end in itertools.pairwise(cuts):
            assert file.append(data[start:end]) == start
        record = file.finish()
    assert path.read_bytes() == data.tobytes()
    assert (record.size_bytes, record.xxh3) == (
        size_bytes,
        xxhash.xxh3_64_hexdigest(data.tobytes()),
    )


@given(
    sizes=st.lists(
        st.sampled_from([0, 1, 63, 4096, 2**20, 2**20 + 4160, 3 * 2**20 + 7]), max_size=9
    ),
    begins=st.lists(st.integers(0, 5000), min_size=9, max_size=9),
    lent=st.lists(st.booleans(), min_size=9, max_size=9),
)
@settings(max_examples=60, deadline=None)
def test_a_data_file_writes_from_where_lent_data_lies(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: Sequence[int],
    begins: Sequence[int],
    lent: Sequence[bool],
) -> None:
    """For any alignment in memory: every byte is at its offset, and the digest is the file's."""
    path = tmp_path_factory.mktemp("lent") / "x"
    random = np.random.default_rng(len(sizes))
    values = [
        random.integers(0, 255, begin + size, np.uint8)[begin:]
        for begin, size in zip(begins, sizes, strict=False)
    ]
    with contextlib.closing(data_file.DataFile(STORAGE, str(path), 2**26)) as file:
        offsets = [
            file.append(value, is_lent=is_lent)
            for value, is_lent in zip(values, lent, strict=False)
        ]
        record = file.finish()
    written = path.read_bytes()
    end = 0
    for offset, value in zip(offsets, values, strict=True):
        assert offset == end
        end = offset + len(value)
        assert written[offset:end] == value.tobytes()
    assert (record.size_bytes, record.xxh3) == (end, xxhash.xxh3_64_hexdigest(written))
    assert len(written) == end


def test_a_buffer_is_filled_again_only_when_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is far behind, and data of many buffers, some of it lent."""
    write = os.pwritev

    def write_late(*arguments: Any) -> int:
        time.sleep(0.02)
        return write(*arguments)

    monkeypatch.setattr(os, "pwritev", write_late)
    data = np.random.default_rng(0).integers(0, 255, 50 * 2**20 + 5, np.uint8)
    pieces = np.array_split(data, 17)
    with contextlib.closing(
        data_file.DataFile(STORAGE, str(tmp_path / "x"), len(data) + 17 * 4096)
    ) as file:
        offsets = [file.append(piece, is_lent=place % 5 == 1) for place, piece in enumerate(pieces)]
        record = file.finish()
    written = (tmp_path / "x").read_bytes()
    assert record.xxh3 == xxhash.xxh3_64_hexdigest(written)
    for offset, piece in zip(offsets, pieces, strict=True):
        assert written[offset : offset + len(piece)] == piece.tobytes()


def test_lent_data_is_not_copied(tmp_path: Path) -> None:
    """Data that changes before it is written, against the contract, shows in the file."""
    pages = np.zeros(2 * 2**20 + 4096, np.uint8)
    start = -pages.__array_interface__["data"][0] % 4096
    data = pages[start : start + 2 * 2**20]
    with contextlib.closing(data_file.DataFile(STORAGE, str(tmp_path / "x"), 2**26)) as file:
        file.append(data, is_lent=True)
        data[2**20] = 1
        file.finish()
    assert (tmp_path / "x").read_bytes().count(1) == 1


def test_a_file_system_without_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    data = np.arange(2**22, dtype=np.int64).view(np.uint8)
    for is_lent in (False, True):
        path = tmp_path / f"x{is_lent}"
        with contextlib.closing(data_file.DataFile(STORAGE, str(path), len(data))) as file:
            begin = file.append(data, is_lent=is_lent)
            file.finish()
        assert path.read_bytes()[begin:] == data.tobytes()


def test_a_refused_write_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(errors.StorageError) as caught:
        data_file.DataFile(STORAGE, str(tmp_path / "missing" / "x"), 10)
    assert caught.value.errno == 2
    with pytest.raises(errors.StorageError) as caught:
        data_file.DataFile(STORAGE, str(tmp_path / "x"), 2**45)  # no disk has this much space
    assert caught.value.errno in (27, 28)
    storage = testing.FaultyStorage(testing.Fault(kinds=("write_data",)))
    write = write_of("a", np.zeros(3), (3,))
    with pytest.raises(errors.StorageError):
        write_item(storage, str(tmp_path), [write])


@pytest.mark.parametrize("num_buffers", [1, 2, 6])
def test_failed_background_write_is_raised(num_buffers: int) -> None:
    """The device that is always full takes nothing; a later call says so, or the last."""
    data = np.ones(num_buffers * 4 * 2**20, np.uint8)
    with (
        contextlib.closing(data_file.DataFile(STORAGE, "/dev/full", 2**26)) as file,
        pytest.raises(errors.StorageError, match="/dev/full") as caught,
    ):
        file.append(data)
        file.finish()
    assert caught.value.errno == errno.ENOSPC


def test_twenty_thousand_small_arrays_take_microseconds_each(tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((20_000, 8))
    writes = [
        write_of("x", row, (8,))._replace(name=f"layers.{place}.weight")
        for place, row in enumerate(data)
    ]
    begun = time.process_time()
    digests, files = write_item(STORAGE, str(tmp_path), writes)
    assert time.process_time() - begun < 5
    assert len(digests) == 20_000 and len(files) == 3


@pytest.mark.parametrize("size_bytes", [10, 9 * 2**20 + 1])
def test_a_data_file_of_an_object_store(size_bytes: int) -> None:
    bucket = FakeBucket()
    data = np.random.default_rng(0).integers(0, 255, size_bytes, np.uint8)
    path = f"{bucket.uri}/run/x"
    with contextlib.closing(data_file.DataFile(ObjectStorage(bucket), path, size_bytes)) as file:
        file.append(data[:7])
        file.append(data[7:], is_lent=True)
        record = file.finish()
    assert ObjectStorage(bucket).read(path) == data.tobytes()
    assert record.xxh3 == xxhash.xxh3_64_hexdigest(data.tobytes())
