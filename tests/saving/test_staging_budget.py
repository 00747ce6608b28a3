"""`fc.Eager(budget_bytes=..)`: no more host memory than that, and still the state at `save`."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.core.files import file_plan
from functional_ckpt.runtime import host_memory
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.testing import differences


def tree() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(300, 100),
        "b": [torch.randn(70, 50).t(), torch.arange(9)],
        "c": torch.randn(1000),
        "n": 3,
    }


def overwrite(value: dict[str, Any]) -> None:
    for tensor in (value["a"], *value["b"], value["c"]):
        tensor.zero_()


@pytest.mark.parametrize("budget_bytes", [0, 5_000, 20_000, 130_000, 10**9])
def test_the_state_may_change_once_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_bytes: int
) -> None:
    monkeypatch.setattr(file_plan, "BYTES_PER_FILE", 10_000)
    reserved: list[int] = []
    original = host_memory.StagingBuffer.reserve

    def reserve(self: host_memory.StagingBuffer, slots: Any) -> Any:
        arrays = original(self, slots)
        reserved.append(self.size_bytes)
        return arrays

    monkeypatch.setattr(host_memory.StagingBuffer, "reserve", reserve)
    with fc.CheckpointManager(tmp_path, staging=fc.Eager(budget_bytes=budget_bytes)) as manager:
        for step in range(3):
            first, second = tree(), tree()
            manager.save(step, {"first": first, "second": second})
            overwrite(first)
            overwrite(second)
        manager.wait_until_finished()
        assert max(reserved) <= budget_bytes
        for step in range(3):
            restored = manager.restore(step)
            assert differences(restored["first"], tree()) == []
            assert differences(restored["second"], tree()) == []


def test_a_failing_write_lets_save_return(tmp_path: Path) -> None:
    storage = testing.FaultyStorage()
    with fc.CheckpointManager(
        tmp_path, staging=fc.Eager(budget_bytes=0), storage=storage
    ) as manager:
        storage.inject(testing.Fault(kinds=("write_data",)))
        manager.save(1, {"state": tree()})
        storage.heal()
        with pytest.raises(errors.SaveError):
            manager.wait_until_finished()
        manager.save(2, {"state": tree()}).result()
        assert manager.all_steps() == [2]


class Held(testing.FaultyStorage):
    """A disk on which a commit waits, once all its arrays are written."""

    def __init__(self) -> None:
        super().__init__()
        self.may_commit = threading.Event()

    def operation(self, kind: str, path: str) -> None:
        if kind == "write" and path.endswith("manifest.ocdbt"):
            assert self.may_commit.wait(60)
        super().operation(kind, path)


def test_save_returns_once_live_memory_is_written_and_not_later(tmp_path: Path) -> None:
    storage, state = Held(), tree()
    with fc.CheckpointManager(
        tmp_path, staging=fc.Eager(budget_bytes=0), storage=storage
    ) as manager:
        waker = threading.Timer(30, storage.may_commit.set)
        waker.start()
        commit = manager.save(1, {"state": state})
        assert not storage.may_commit.is_set(), "save waited for the commit"
        waker.cancel()
        overwrite(state)
        storage.may_commit.set()
        assert commit is not None and commit.result() == 1
        assert differences(manager.restore(1)["state"], tree()) == []


def test_a_save_from_live_memory_is_not_repeated_on_a_full_disk(tmp_path: Path) -> None:
    """Space could be freed, but live memory may have changed by then: it is an error."""
    storage = testing.FaultyStorage()
    small, large = torch.arange(10.0), torch.arange(10_000.0)
    with fc.CheckpointManager(
        tmp_path / "near",
        staging=fc.Eager(budget_bytes=10_000),
        storage=storage,
        tiers=[fc.Tier(path=tmp_path / "far")],
    ) as manager:
        manager.save(1, {"small": {"w": small}, "large": {"w": large}})
        manager.wait_until_finished()
        storage.inject(
            testing.Fault(errno=errno.ENOSPC, where=lambda op: op.path.endswith("manifest.ocdbt"))
        )
        commit = manager.save(2, {"small": {"w": small}, "large": {"w": large}})
        large.zero_()
        assert commit is not None
        with pytest.raises(errors.SaveError, match="No space left"):
            commit.result()
        assert LocalStorage().list(str(tmp_path / "near"))[1:] == ["1"]


@pytest.mark.parametrize("budget_bytes", [-1, 1.5, True, "1GB"])
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget_bytes: Any) -> None:
    with pytest.raises(errors.UsageError, match="budget_bytes"):
        fc.Eager(budget_bytes=budget_bytes)
