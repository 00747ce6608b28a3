"""Trees of another form, and data files that are not plain files: each check refuses one."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from descriptors import open_below
from written_items import write_item

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.format import (
    backends,
    ocdbt,
    ocdbt_decode,
    read_direct,
)
from functional_ckpt.format.ocdbt_decode import InvalidNodeError
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.format.write_files import ArrayWrite
from functional_ckpt.storage.local import LocalStorage

STORAGE = LocalStorage()
KEYS = [b"a/c/0", b"a/c/1", b"b/zarr.json"]
VARINTS = ocdbt.varints


def leaf_of(
    *,
    kind: bytes = b"\0",
    files: bytes | None = None,
    count: int = 3,
    shared: Sequence[int] = (4, 0),
    kinds: bytes = b"\1\1\1",
    numbers: Sequence[int] = (0, 1, 0),
    offsets: bytes | None = None,
    magic: int = ocdbt.NODE_MAGIC,
) -> bytes:
    """A leaf of three keys in two files; each argument spoils one field."""
    body = b"".join(
        (
            kind,
            ocdbt.encode_files(["d/x", "d/y"]) if files is None else files,
            VARINTS([count]),
            VARINTS(list(shared)),
            VARINTS([5, 1, 11]),
            *(b"a/c/0", b"1", b"b/zarr.json"),
            VARINTS([7, 9, 3]),
            kinds,
            VARINTS(list(numbers)),
            VARINTS([0, 7, 16]) if offsets is None else offsets,
        )
    )
    return ocdbt.seal(magic, body)


def test_the_leaf_that_the_cases_spoil_is_read() -> None:
    found = ocdbt_decode.decode_node(leaf_of())
    assert found.files == ["d/x", "d/y"] and found.entries.keys == KEYS


@pytest.mark.parametrize(
    "spoiled",
    [
        {"kind": b"\1"},
        {"magic": ocdbt.MANIFEST_MAGIC},
        {"files": VARINTS([10_000])},
        {"files": VARINTS([2, 0, 3, 3, 2, 0]) + b"d/xd/y"},
        {"shared": (6, 0)},
        {"files": VARINTS([1]) + VARINTS([2**20]) + VARINTS([0]) + b"d/x"},
        {"files": VARINTS([1]) + VARINTS([1]) + VARINTS([0]) + b"\xff"},
        {"count": 0},
        {"count": 10_000},
        {"kinds": b"\1\0\1"},
        {"numbers": (0, 2, 0)},
        {"offsets": b"\0\7"},
        {"offsets": b"\0\7" + b"\xff" * 9 + b"\1"},
    ],
    ids=lambda spoiled: str(next(iter(spoiled))),
)
def test_a_leaf_of_another_form_is_refused(spoiled: dict[str, Any]) -> None:
    with pytest.raises(ocdbt_decode.InvalidNodeError):
        ocdbt_decode.decode_node(leaf_of(**spoiled))


ROOT = ocdbt.Root(ocdbt.Span("d/x", 16, 9), 0)


def manifest_of(
    *,
    kind: int = 0,
    num_versions: int = 1,
    generation: int = 1,
    height: bytes = b"\0",
    file: int = 0,
) -> bytes:
    config = b"u" * 16 + VARINTS([kind, 1024, 10**8]) + b"\4" + VARINTS([1]) + struct.pack("<i", 0)
    files = ocdbt.encode_files(["d/x"])
    version = VARINTS([num_versions, generation]) + height + VARINTS([file, 16, 9, 2, 9, 16])
    body = config + files + version + b"\0" * 8 + VARINTS([0])
    return ocdbt.seal(ocdbt.MANIFEST_MAGIC, body)


def test_the_manifest_that_the_cases_spoil_is_read() -> None:
    assert ocdbt_decode.decode_manifest(manifest_of()) == ROOT
    assert ocdbt_decode.decode_manifest(manifest_of(height=b"\2")) == ROOT._replace(height=2)


@pytest.mark.parametrize(
    "spoiled",
    [
        {"kind": 1},
        {"num_versions": 2},
        {"num_versions": 0},
        {"generation": 0},
        {"file": 1},
    ],
    ids=lambda spoiled: "-".join(map(str, next(iter(spoiled.items())))),
)
def test_a_manifest_of_another_form_is_left_to_tensorstore(spoiled: dict[str, Any]) -> None:
    assert ocdbt_decode.decode_manifest(manifest_of(**spoiled)) is None


@pytest.mark.parametrize("change", [lambda d: d + b"\0", lambda d: d[:-1], lambda d: b"", bytes])
def test_a_record_of_another_length_is_not_decoded(change: Callable[[bytes], bytes]) -> None:
    expected = change is bytes
    assert (ocdbt_decode.decode_manifest(change(manifest_of())) is not None) == expected
    refusal = contextlib.nullcontext() if expected else pytest.raises(InvalidNodeError)
    with refusal:
        ocdbt_decode.decode_node(change(leaf_of()))


# ------------------------------------------------------------------------------------ data files

DATA = np.random.default_rng(0).integers(0, 255, (2, 200_000), np.uint8)
GRID = ChunkGrid(DATA.shape, (1, 200_000))


@pytest.fixture
def item(tmp_path: Path) -> tuple[Path, Path]:
    """An item, and its file of data."""
    write = ArrayWrite("a", ArraySpec(DATA.shape, "uint8"), GRID, Box.whole(DATA.shape), DATA)
    path = tmp_path / "item"
    path.mkdir()
    write_item(STORAGE, str(path), [write])
    [file] = path.glob("*.safetensors")
    return path, file


def read(path: Path) -> np.ndarray:
    memory = np.zeros_like(DATA)
    destination = Destination(lambda: memory, lambda: None)
    spec = ArraySpec(DATA.shape, "uint8")
    request = ReadRequest("a", spec, Box.whole(DATA.shape), GRID, destination=destination)
    with contextlib.closing(backends.open_reader(STORAGE, str(path), {})) as reader:
        assert isinstance(reader, read_direct.DirectReader)
        for task in reader.tasks([request]):
            task()
    return memory


@pytest.mark.parametrize("kind", ["link", "fifo", "missing", "directory"])
def test_only_regular_data_files_are_read(item: tuple[Path, Path], kind: str) -> None:
    path, file = item
    moved = path.parent / "outside"
    file.rename(moved)
    if kind == "link":
        file.symlink_to(moved)
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    with pytest.raises(errors.CorruptCheckpointError):
        read(path)


@pytest.mark.parametrize("most_bytes", [1000, 70_000])
def test_a_short_read_is_continued(
    item: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    preadv = os.preadv

    def read_less(descriptor: int, views: Any, offset: int) -> int:
        return preadv(descriptor, [memoryview(views[0])[:most_bytes]], offset)

    monkeypatch.setattr(os, "preadv", read_less)
    assert np.array_equal(read(item[0]), DATA)


def test_descriptors_are_closed(item: tuple[Path, Path]) -> None:
    for _ in range(5):
        read(item[0])
    assert open_below(item[0]) == []


def test_a_file_is_read_by_one_descriptor(item: tuple[Path, Path]) -> None:
    spec = ArraySpec(DATA.shape, "uint8")
    opened = backends.open_reader(STORAGE, str(item[0]), {})
    with contextlib.closing(opened) as reader:
        before = open_below(item[0])
        request = ReadRequest("a", spec, Box.whole(DATA.shape), GRID)
        plans = [functools.partial(reader.tasks, [request]) for _ in range(3)]
        for plan in plans:
            plan()
        assert len(open_below(item[0])) == len(before) + 1


@pytest.mark.parametrize("start", range(8))
def test_a_number_does_not_go_on_in_the_checksum(start: int) -> None:
    data = ocdbt.seal(ocdbt.NODE_MAGIC, bytes([start, 0x80]))
    with pytest.raises(InvalidNodeError, match="ends too early"):
        ocdbt_decode._Reader(ocdbt.NODE_MAGIC, data).varints(2)
