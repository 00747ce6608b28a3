"""Files of another commit of a step, sent by a writer that lost the tier, get into no upload."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_bucket import FakeBucket

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage import commit, object_store
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.object_store import ObjectStorage
from functional_ckpt.verify import checkpoint

_RUN = "fake://bucket/run"


def _save(path: Path, value: float, **options: Any) -> None:
    with fc.CheckpointManager(path, **options) as manager:
        manager.save(1, {"t": {"w": torch.full((50,), value)}, "j": fc.Json({"v": value})})


def _tier(bucket: FakeBucket) -> fc.Tier:
    return fc.Tier(path=_RUN, storage=ObjectStorage(bucket))


@pytest.mark.parametrize("is_large", [False, True])
def test_objects_of_another_commit_that_arrive_late_are_replaced(
    is_large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_large:
        monkeypatch.setattr(object_store, "_SMALL_FILE_BYTES", 100)
    bucket = FakeBucket()
    _save(tmp_path / "near", 1.0)
    _save(tmp_path / "other", 2.0)
    late = {
        name: (tmp_path / "other" / "1" / name).read_bytes()
        for name in LocalStorage().walk(str(tmp_path / "other" / "1"))
    }

    def arrive(kind: str, key: str) -> None:
        if kind == "list" and key == "run/1" and any("unfinished" in each for each in bucket.keys):
            bucket.before = lambda kind, key: None
            for name, data in late.items():
                bucket.write(f"run/1/{name}", data)

    bucket.before = arrive
    with fc.CheckpointManager(tmp_path / "near", tiers=[_tier(bucket)]) as manager:
        manager.wait_until_finished()
    storage = ObjectStorage(bucket)
    assert checkpoint.verify_checkpoint(storage, f"{_RUN}/1", 1) == []
    restored = fc.restore(f"{_RUN}/1", storage=storage)
    assert restored["j"] == {"v": 1.0} and float(restored["t"]["w"][0]) == 1.0


def test_an_object_that_changes_all_the_time_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_SMALL_FILE_BYTES", 0)
    bucket = FakeBucket()
    (tmp_path / "file").write_bytes(b"mine")
    storage = ObjectStorage(bucket)
    storage.write(f"{_RUN}/file", b"old")
    storage.put_file(str(tmp_path / "file"), f"{_RUN}/file")
    assert storage.read(f"{_RUN}/file") == b"mine"

    def change(kind: str, key: str) -> None:
        if kind == "upload":
            bucket.write(key, b"other")

    bucket.before = change
    with pytest.raises(errors.StorageError, match="another writer is active"):
        storage.put_file(str(tmp_path / "file"), f"{_RUN}/file")


def test_files_that_go_to_an_object_store_have_names_of_their_commit(tmp_path: Path) -> None:
    bucket = FakeBucket()
    names: list[set[str]] = []
    for value, tiers in ((1.0, [_tier(bucket)]), (2.0, [_tier(bucket)]), (3.0, [tmp_path / "far"])):
        _save(tmp_path / "near", value, tiers=tiers, overwrite=True)
        names.append(set(os.listdir(tmp_path / "near" / "1" / "t")))
    assert {"data.safetensors", "index.ocdbt"} <= names[2]
    fixed = names[0] & names[1]
    assert fixed == names[2] - {"data.safetensors", "index.ocdbt"}
    assert len(names[0]) == len(names[2])


def test_uploads_of_two_commits_to_a_file_system_have_a_directory_each(tmp_path: Path) -> None:
    commits = commit.protocol(LocalStorage(), str(tmp_path))
    final = str(tmp_path / "1")
    first = commits.begin_upload(final, "a" * 16)
    assert commits.begin_upload(final, "a" * 16) == first
    (Path(first) / "file").write_text("first")
    second = commits.begin_upload(final, "b" * 16)
    assert second != first and not os.path.exists(first)
    shutil.rmtree(second)
    Path(first).mkdir()  # by the suspended one
    commits.end_uploads(final)
    assert os.listdir(tmp_path) in ([], [".functional_ckpt"])
