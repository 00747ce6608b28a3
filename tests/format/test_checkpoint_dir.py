from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.core.records import records
from functional_ckpt.format.checkpoint_dir import open_checkpoint
from functional_ckpt.storage.local import LocalStorage

STORAGE = LocalStorage()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "c"
    shared = torch.arange(50_000.0)
    items = {
        "model": {"w": shared, "tied": shared, "n": [1, "x"]},
        "state": {"w": torch.ones(3)},
        "config": fc.Json({"lr": 0.5}),
    }
    fc.save(path, items, custom_metadata={"note": "é"})
    return path


def test_open_checkpoint_lists_its_items(checkpoint: Path) -> None:
    opened = open_checkpoint(STORAGE, str(checkpoint))
    assert dict(opened.items) == {"model": "tree", "state": "tree", "config": "json"}
    assert opened.json("config") == {"lr": 0.5}
    assert opened.metrics is None
    assert opened.metadata["custom_metadata"] == {"note": "é"}
    item = opened.tree("model")
    assert [node.name for node in item.array_nodes()] == ["w"]


def test_open_checkpoint_of_an_empty_path_raises(tmp_path: Path) -> None:
    with pytest.raises(errors.StepNotFoundError, match="no checkpoint at"):
        open_checkpoint(STORAGE, str(tmp_path / "none"))
    with pytest.raises(errors.CorruptCheckpointError, match="not a checkpoint"):
        open_checkpoint(STORAGE, str(tmp_path))


def _every_file(checkpoint: Path) -> list[str]:
    return sorted(str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.is_file())


def _restore(checkpoint: Path) -> object:
    return fc.restore(checkpoint)


@pytest.mark.parametrize("spoil", ["flip_first", "flip_last", "cut", "empty", "remove"])
def test_every_damage_to_a_native_file_is_detected(
    spoil: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Every file that a restore needs, each spoiled in turn: an error, and never other values."""
    expected = fc.restore(checkpoint)
    for name in _every_file(checkpoint):
        spoiled = tmp_path / "spoiled"
        shutil.copytree(checkpoint, spoiled)
        file = spoiled / name
        data = bytearray(file.read_bytes())
        if spoil == "remove":
            file.unlink()
        else:
            if spoil == "flip_first":
                data[0] ^= 1
            elif spoil == "flip_last":
                data[-1] ^= 1
            file.write_bytes({"cut": data[:-1], "empty": b""}.get(spoil, data))
        try:
            restored = fc.restore(spoiled)
        except errors.CorruptCheckpointError as error:
            assert str(spoiled) in str(error), name
        else:  # only Orbax reads the file; the restored values equal the saved ones
            assert name.rsplit("/")[-1] not in (records.EXTENSION_FILE, "metadata"), name
            assert torch.equal(restored["model"]["w"], expected["model"]["w"]), name
            assert restored["model"]["n"] == [1, "x"] and restored["config"] == {"lr": 0.5}
        shutil.rmtree(spoiled)


def test_swapped_items_are_found(checkpoint: Path) -> None:
    (checkpoint / "model").rename(checkpoint / "x")
    (checkpoint / "state").rename(checkpoint / "model")
    (checkpoint / "x").rename(checkpoint / "state")
    with pytest.raises(errors.CorruptCheckpointError, match="model"):
        fc.restore(checkpoint)


def test_a_swapped_step_is_found(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, {"a": {"w": torch.full((3,), step)}}, force=True)
        manager.wait_until_finished()
    steps = sorted(path for path in tmp_path.iterdir() if path.name.isdigit())
    steps[0].rename(tmp_path / "x")
    steps[1].rename(steps[0])
    (tmp_path / "x").rename(steps[1])
    with pytest.raises(errors.CorruptCheckpointError, match="written as step 2, found as step 1"):
        open_checkpoint(STORAGE, str(steps[0]), 1)


def test_a_record_cannot_ask_for_more_than_there_is(checkpoint: Path) -> None:
    """A record made by hand, sealed and all: no allocation for missing data."""
    file = checkpoint / "model" / records.EXTENSION_FILE
    record = json.loads(file.read_bytes())
    del record["xxh3"]
    [place] = [r for r in record["structure"] if "tensor" in r and "tied_to" not in r]
    place["tensor"] = ["float32", [2**40]]
    [tied] = [r for r in record["structure"] if "tied_to" in r]
    tied["tensor"] = ["float32", [2**40]]
    record["arrays"]["w"] = [[2**40], "0" * 16]
    file.write_bytes(records.with_checksum(record))
    step_file = checkpoint / records.EXTENSION_FILE
    step = records.parse_step(step_file.read_bytes(), "x")
    described = STORAGE.checksum(str(file))
    files = {**step.files, f"model/{records.EXTENSION_FILE}": described}
    step_file.write_bytes(records.StepRecord(step=None, items=step.items, files=files).to_json())
    with pytest.raises(errors.CorruptCheckpointError):
        fc.restore(checkpoint)


def test_an_item_that_is_not_there(checkpoint: Path) -> None:
    with pytest.raises(errors.StepNotFoundError, match="no item 'other'; it has config, model"):
        fc.restore(checkpoint, {"other": {}})
