"""Managers with tiers that are dropped without `close`, and tiers that are moved away."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors, testing


class Slow(testing.FaultyStorage):
    """A tier that receives nothing before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    def put_file(self, source: str, path: str) -> None:
        self.entered.set()
        self.go.wait(30)
        super().put_file(source, path)


def items(step: int) -> dict[str, Any]:
    return {"tree": {"w": torch.full((10,), float(step))}}


def uploading(tmp_path: Path) -> tuple[fc.CheckpointManager, Slow]:
    """A manager that has saved step 1, and its tier, with an upload that has started and waits."""
    slow = Slow()
    tier = fc.Tier(path=tmp_path / "far", storage=slow)
    manager = fc.CheckpointManager(tmp_path / "near", tiers=[tier])
    manager.save(1, items(1)).result()  # type: ignore[union-attr]
    assert slow.entered.wait(30)
    return manager, slow


def upload_threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == "upload"}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("is_listened_to", [False, True], ids=["alone", "with its own listener"])
def test_a_dropped_manager_ends_its_threads_and_unlocks_its_tiers(
    is_listened_to: bool, tmp_path: Path
) -> None:
    """Also one that its own listener refers to, once it is collected."""
    before = upload_threads()

    def run() -> None:
        seen: list[Any] = []
        manager = fc.CheckpointManager(
            tmp_path / "near", tiers=[tmp_path / "far"], on_event=seen.append
        )
        manager.save(1, items(1))
        manager.wait_until_finished()
        if is_listened_to:
            seen.append(manager)
        assert len(upload_threads() - before) == 1

    run()
    gc.collect()
    wait_for(lambda: upload_threads() <= before)
    with fc.CheckpointManager(tmp_path / "other", tiers=[tmp_path / "far"]) as other:
        assert other.all_steps() == [1]


def test_an_upload_in_progress_finishes_before_others_get_in(tmp_path: Path) -> None:
    before = upload_threads()
    manager, slow = uploading(tmp_path)
    manager.save(2, items(2)).result()  # type: ignore[union-attr]
    del manager
    gc.collect()
    threading.Timer(0.3, slow.go.set).start()
    with fc.CheckpointManager(tmp_path / "near", tiers=[tmp_path / "far"]) as again:
        assert slow.go.is_set(), "the next writer came in during the upload"
        assert (tmp_path / "far" / "1").exists() and again.all_steps() == [1, 2]
    assert fc.restore(tmp_path / "far" / "2")["tree"]["w"][0] == 2
    wait_for(lambda: upload_threads() <= before)


def test_another_process_is_kept_out_during_the_upload(tmp_path: Path) -> None:
    manager, slow = uploading(tmp_path)
    locks = [manager._steps.lock, manager._steps.remote[0].lock]
    del manager
    gc.collect()
    time.sleep(0.2)
    assert all(lock is not None and not lock.is_released for lock in locks)
    slow.go.set()
    wait_for(lambda: all(lock is not None and lock.is_released for lock in locks))


@pytest.mark.parametrize("which", ["far", "near"])
def test_a_tier_that_was_replaced_is_not_written(which: str, tmp_path: Path) -> None:
    manager = fc.CheckpointManager(tmp_path / "near", tiers=[tmp_path / "far"])
    manager.save(1, items(1))
    manager.wait_until_finished()
    (tmp_path / which).rename(tmp_path / "moved")
    (tmp_path / which / ".functional_ckpt").mkdir(parents=True)
    with pytest.raises(errors.CheckpointError, match="no longer the directory"):
        manager.save(2, items(2))
        manager.wait_until_finished()
    assert [each.name for each in (tmp_path / which).iterdir()] == [".functional_ckpt"]
    assert list((tmp_path / which / ".functional_ckpt").iterdir()) == []
    manager._saver.release()
    manager._steps.unlock()
    assert fc.restore(tmp_path / "moved" / "1")["tree"]["w"][0] == 1


def test_promises_are_not_written_into_another_directory(tmp_path: Path) -> None:
    """An upload that arrives after the first tier was moved away."""
    manager, slow = uploading(tmp_path)
    (tmp_path / "near").rename(tmp_path / "moved")
    (tmp_path / "near" / ".functional_ckpt").mkdir(parents=True)
    slow.go.set()
    with pytest.raises(errors.CheckpointError):
        manager.wait_until_finished()
    assert list((tmp_path / "near" / ".functional_ckpt").iterdir()) == []
    manager._saver.release()
    manager._steps.unlock()
