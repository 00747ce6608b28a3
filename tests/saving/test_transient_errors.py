"""A write that fails once with a transient error is made again from the staged copy."""

from __future__ import annotations

import collections
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.core.files import file_plan
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.testing import differences

STAGINGS = [fc.Eager(), fc.Eager(budget_bytes=10**9), fc.Overlapped(), fc.Blocking()]
KINDS = ["write_data", "sync", "write"]


def tree(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {"a": torch.randn(300, 100), "b": torch.randn(70), "n": seed}


@pytest.mark.parametrize("staging", STAGINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_holds_the_state_at_save_after_one_failed_write(
    tmp_path: Path, staging: Any, kind: str
) -> None:
    storage = testing.FaultyStorage()
    with fc.CheckpointManager(tmp_path, staging=staging, storage=storage) as manager:
        state = tree()
        storage.inject(testing.Fault(kinds=(kind,)))
        commit = manager.save(1, {"state": state})
        state["a"].zero_()
        assert commit is not None and commit.result() == 1
        assert storage.has_failed
        assert differences(manager.restore(1)["state"], tree()) == []
    assert sorted(os.listdir(tmp_path)) == [".functional_ckpt", "1"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("road", ["one file", "several files"])
def test_a_checkpoint_without_a_manager_survives_one_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, road: str
) -> None:
    if road == "several files":
        monkeypatch.setattr(file_plan, "BYTES_PER_FILE", 1)
    storage = testing.FaultyStorage(testing.Fault(kinds=(kind,)))
    fc.save(tmp_path / "one", {"state": tree()}, storage=storage)
    assert storage.has_failed
    assert differences(fc.restore(tmp_path / "one")["state"], tree()) == []
    assert os.listdir(tmp_path) == ["one"]


@pytest.mark.parametrize("kind", ["write", "sync"])
def test_an_error_that_lasts_fails_the_save_after_the_second_attempt(
    tmp_path: Path, kind: str
) -> None:
    storage = testing.FaultyStorage()
    with fc.CheckpointManager(tmp_path, storage=storage) as manager:
        storage.inject(testing.Fault(mode="lasting", kinds=(kind,)))
        commit = manager.save(1, {"state": tree()})
        assert commit is not None
        with pytest.raises(errors.SaveError, match=os.strerror(errno.EIO)):
            commit.result()
        storage.heal()
        assert manager.all_steps() == []
        manager.save(2, {"state": tree()}).result()  # type: ignore[union-attr]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_an_error_that_will_not_pass_is_raised_at_once(tmp_path: Path, code: int) -> None:
    storage = testing.FaultyStorage()
    with fc.CheckpointManager(tmp_path, storage=storage) as manager:
        storage.inject(testing.Fault(errno=code, kinds=("write_data",)))
        commit = manager.save(1, {"state": tree()})
        assert commit is not None and isinstance(commit.exception(), errors.SaveError)


def test_live_memory_that_the_caller_may_change_is_not_written_again(tmp_path: Path) -> None:
    storage = testing.FaultyStorage()
    unstaged = fc.Eager(budget_bytes=0)
    with fc.CheckpointManager(tmp_path, staging=unstaged, storage=storage) as manager:
        storage.inject(testing.Fault(where=lambda op: op.path.endswith("manifest.ocdbt")))
        state = tree()
        commit = manager.save(1, {"state": state})
        state["a"].zero_()
        assert commit is not None and isinstance(commit.exception(), errors.SaveError)
        assert manager.all_steps() == []


def test_a_step_whose_publishing_failed_is_not_published_again(tmp_path: Path) -> None:
    storage = testing.FaultyStorage()
    with fc.CheckpointManager(tmp_path, storage=storage) as manager:
        storage.inject(testing.Fault(kinds=("rename",)))
        commit = manager.save(1, {"state": tree()})
        assert commit is not None and isinstance(commit.exception(), errors.SaveError)


def test_an_unchanged_copy_that_could_not_be_removed_is_removed_before_the_next_save(
    tmp_path: Path,
) -> None:
    storage = testing.FaultyStorage()
    with fc.CheckpointManager(tmp_path, storage=storage) as manager:
        manager.save(1, {"state": tree()}).result()  # type: ignore[union-attr]
        storage.inject(testing.Fault(kinds=("remove",)))
        manager.save(1, {"state": tree()}, force=True)
        assert storage.has_failed
        manager.save(2, {"state": tree()}).result()  # type: ignore[union-attr]
        assert sorted(os.listdir(tmp_path)) == [".functional_ckpt", "1", "2"]


class Unsynced(LocalStorage):
    """A disk on which the first sync of a step's file fails; it counts the syncs of every path."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.syncs: collections.Counter[str] = collections.Counter()

    def sync(self, path: str) -> None:
        self.syncs[path] += 1
        if not self.failed and "/state/" in path:
            self.failed.append(path)
            raise errors.StorageError("no sync", errno=errno.EIO, path=path)
        super().sync(path)


def test_a_file_whose_sync_failed_is_not_synced_again(tmp_path: Path) -> None:
    storage = Unsynced()
    with fc.CheckpointManager(tmp_path, storage=storage) as manager:
        manager.save(1, {"state": tree()}).result()  # type: ignore[union-attr]
        assert storage.syncs[storage.failed[0]] == 1
        assert differences(manager.restore(1)["state"], tree()) == []
