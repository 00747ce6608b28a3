"""Hostile and damaged checkpoints: refused with a clear error, or harmless; never an abort."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
import tensorstore as ts
import torch
from full import IS_FULL

import functional_ckpt as fc

# Together more than a thousand, of which a quarter is made by default.
NUMBERS = {"records": 420, "bytes": 160, "orbax": 180, "zarr2": 140, "databases": 140}
if not IS_FULL:
    NUMBERS = {kind: number // 4 for kind, number in NUMBERS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NUMBERS)
def test_mutations_are_refused_or_harmless(kind: str, figure: Callable[[str], None]) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", hostile.__file__, kind, str(NUMBERS[kind])],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert result.returncode == 0, result.stderr[-5000:]
    counts = json.loads(result.stdout)
    assert counts["refused"] + counts["harmless"] == NUMBERS[kind]
    assert counts["refused"] > NUMBERS[kind] / 4
    assert counts["grown_kib"] < 300 * 1024
    figure(
        f"{kind}: {NUMBERS[kind]} mutations, {counts['refused']} refused, "
        f"{counts['harmless']} harmless, memory grew by {counts['grown_kib'] // 1024} MiB"
    )


def test_a_database_that_points_outside_is_refused(tmp_path: Path) -> None:
    """A tree node whose data file is `../`, its checksum put right."""
    path = tmp_path / "checkpoint"
    fc.save(path, {"tree": {"w": torch.arange(100)}})
    (path / "_FUNCTIONAL_CKPT").unlink()
    item = path / "tree"
    (item / "_FUNCTIONAL_CKPT").unlink()
    values = _values(item)
    (item / "manifest.ocdbt").unlink()
    (item / "index.ocdbt").unlink()
    for file in item.glob("*.safetensors"):
        file.unlink()
    _write_through_child(item, "aa/inner", values)
    assert fc.restore(path)["tree"]["w"].tolist() == list(range(100))

    (node,) = (item / "d").iterdir()
    data = node.read_bytes()
    assert data.count(b"aa/inner") == 1 and data[-4:] == _crc32c(data[:-4])
    data = data[:-4].replace(b"aa/inner", b"../inner")
    node.write_bytes(data + _crc32c(data))
    (item / "aa" / "inner").rename(path / "inner")
    with pytest.raises(fc.errors.CorruptCheckpointError, match="Invalid key"):
        fc.restore(path)


def _values(item: Path) -> dict[str, bytes]:
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{item}/"}).result()
    return {key.decode(): store.read(key).result().value for key in store.list().result()}


def _write_through_child(item: Path, child: str, values: dict[str, bytes]) -> None:
    context = ts.Context()
    config = {"compression": None, "max_inline_value_bytes": 0}
    stores = [
        ts.KvStore.open(
            {"driver": "ocdbt", "base": f"file://{item}/{name}", "config": config}, context=context
        ).result()
        for name in (f"{child}/", "")
    ]
    with ts.Transaction() as transaction:
        for key, value in values.items():
            stores[0].with_transaction(transaction).write(key, value).result()
    stores[0].experimental_copy_range_to(stores[1]).result()


def _crc32c(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


@pytest.mark.parametrize("dtype", ["r8", "r16", "r2147483647", "string", "json"])
def test_a_dtype_that_aborts_tensorstore_never_reaches_it(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    fc.save(path, {"tree": {"w": torch.arange(3)}})
    site = hostile.Site(path)
    record = json.loads((path / "tree/_FUNCTIONAL_CKPT").read_bytes())
    text = json.dumps(record).replace('"int64"', f'"{dtype}"')
    assert dtype in text
    site.seal_item(json.loads(text))
    with pytest.raises(fc.errors.CorruptCheckpointError, match=dtype):
        fc.restore(path)


def test_a_shape_of_2_to_the_62_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    fc.save(path, {"tree": {"w": torch.arange(3)}})
    for shape in ("[4611686018427387903]", "[4611686018427387904]", "[1099511627776]"):
        copy = tmp_path / shape
        shutil.copytree(path, copy)
        record = json.loads((copy / "tree/_FUNCTIONAL_CKPT").read_bytes())
        hostile.Site(copy).seal_item(json.loads(json.dumps(record).replace("[3]", shape)))
        with pytest.raises(fc.errors.CorruptCheckpointError):
            fc.restore(copy)
        with pytest.raises(fc.errors.CorruptCheckpointError):
            fc.restore(copy, {"tree": {"w": torch.zeros(3, dtype=torch.int64)}}, strict=False)
