"""`staging_budget_bytes`: no more host memory than that, and still the moment of `save`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.format import write_direct
from functional_ckpt.runtime import host_memory
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
@pytest.mark.parametrize("road", ["ours", "tensorstore"])
def test_the_state_may_change_once_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_bytes: int, road: str
) -> None:
    if road == "tensorstore":
        monkeypatch.setattr(write_direct, "MAX_KEYS", 0)
    monkeypatch.setattr(write_direct, "BYTES_PER_FILE", 10_000)
    reserved: list[int] = []
    original = host_memory.StagingBuffer.reserve

    def reserve(self: host_memory.StagingBuffer, slots: Any) -> Any:
        arrays = original(self, slots)
        reserved.append(self.size_bytes)
        return arrays

    monkeypatch.setattr(host_memory.StagingBuffer, "reserve", reserve)
    with fc.CheckpointManager(tmp_path, staging_budget_bytes=budget_bytes) as manager:
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
    with fc.CheckpointManager(tmp_path, staging_budget_bytes=0, storage=storage) as manager:
        storage.inject(testing.Fault(kinds=("write_data",)))
        manager.save(1, {"state": tree()})
        storage.heal()
        with pytest.raises(errors.SaveError):
            manager.wait_until_finished()
        manager.save(2, {"state": tree()}).result()
        assert manager.all_steps() == [2]


@pytest.mark.parametrize(
    "options",
    [{"staging_budget_bytes": -1}, {"staging_budget_bytes": 1.5}, {"staging_budget_bytes": True}],
)
def test_wrong_budgets(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError, match="staging_budget_bytes"):
        fc.CheckpointManager(tmp_path, **options)
    with pytest.raises(errors.UsageError, match="eager"):
        fc.CheckpointManager(tmp_path, staging_budget_bytes=1, staging="overlapped")
