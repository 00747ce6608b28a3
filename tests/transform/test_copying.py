"""Copies have the bytes of their source, on every kind of store, or are not there."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.open import connect
from functional_ckpt.verify import verify


def place(kind: str, tmp_path: Path) -> str:
    is_local = kind == "local"
    return str(tmp_path / "far") if is_local else f"memory://bucket-{uuid.uuid4().hex[:8]}/far"


def content(path: Any) -> dict[str, bytes]:
    storage, found = connect(path)
    return {name: storage.read(os.path.join(found, name)) for name in storage.walk(found)}


def saved(path: Path) -> Path:
    items = {"x": {"a": torch.randn(1000), "b": torch.ones(3)}, "config": fc.Json({"lr": 1})}
    fc.save(path, items, metrics={"loss": 1.0})
    return path


@pytest.mark.parametrize("kind", ["local", "store"])
def test_a_copy_has_the_same_bytes(kind: str, tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, {"x": torch.randn(1000)}, metrics={"loss": 1.0})
    source, far = str(tmp_path / "run" / "7"), place(kind, tmp_path)
    read: list[tuple[int, int]] = []
    fc.transform.copy(source, f"{far}/7", report=lambda a, b: read.append((a, b)))
    assert read and read[-1][0] == read[-1][1]
    assert content(f"{far}/7") == content(source)
    with fc.CheckpointManager(far, read_only=True) as copied:
        assert copied.all_steps() == [7]
    assert fc.metadata(f"{far}/7").metrics == {"loss": 1.0}
    fc.transform.copy(f"{far}/7", tmp_path / "back")
    fc.transform.copy(f"{far}/7", f"{far}_second")
    assert verify(tmp_path / "back") == [] and content(f"{far}_second") == content(source)


@pytest.mark.parametrize("kind", ["local", "store"])
def test_a_damaged_source_is_named_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    source, far = saved(tmp_path / "in"), place(kind, tmp_path)
    file = source / "x" / "data.safetensors"
    data = bytearray(file.read_bytes())
    for damaged in (data[:-8], data + b"more", data[:-8] + b"12345678"):
        file.write_bytes(damaged)
        with pytest.raises(errors.CorruptCheckpointError, match=r"data\.safetensors: expected"):
            fc.transform.copy(source, far)
        assert content(far) == {} and os.listdir(tmp_path) == ["in"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = saved(tmp_path / "in")
    fc.transform.copy(source, tmp_path / "out")
    for output in (tmp_path / "out", tmp_path / "in"):
        with pytest.raises((errors.StepExistsError, errors.UsageError)):
            fc.transform.copy(source, output)
    with pytest.raises(errors.UsageError, match="overlap"):
        fc.transform.copy(source, source / "inner")
    with pytest.raises(errors.UsageError, match="is a checkpoint"):
        fc.transform.copy(source, tmp_path / "out" / "inner")


def test_a_copy_has_no_name_of_another_step(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, {"x": torch.ones(1)})
    with pytest.raises(errors.UsageError, match="the name of step 8, and the checkpoint is step 7"):
        fc.transform.copy(str(tmp_path / "run" / "7"), tmp_path / "other" / "ckpt_008")
    fc.transform.copy(str(tmp_path / "run" / "7"), tmp_path / "other" / "ckpt_007")
    assert fc.restore(tmp_path / "other" / "ckpt_007").step == 7


def test_files_of_other_programs_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(errors.UsageError, match="no checkpoint of this package or of Orbax"):
        fc.transform.copy(tmp_path / "model.pt", tmp_path / "out")


def test_a_source_that_is_replaced_meanwhile_is_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path / "in")
    sync = LocalStorage.make_directory

    def replaced(self: LocalStorage, path: str, *, parents: bool = True) -> None:
        monkeypatch.setattr(LocalStorage, "make_directory", sync)
        fc.save(source, {"x": {"a": torch.zeros(1000), "b": torch.ones(3)}}, overwrite=True)
        sync(self, path, parents=parents)

    fc.transform.copy(source, tmp_path / "first")
    monkeypatch.setattr(LocalStorage, "make_directory", replaced)
    with pytest.raises((errors.CorruptCheckpointError, errors.StorageError)):
        fc.transform.copy(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["first", "in"]
