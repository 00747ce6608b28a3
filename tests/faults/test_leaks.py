"""Failed or finished operations leave no descriptors, memory or partial state."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from descriptors import open_below

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.core.files import file_plan
from functional_ckpt.runtime import host_memory
from functional_ckpt.saving import stage


def items(step: int = 0) -> dict[str, Any]:
    return {"tree": {"w": torch.full((1000,), float(step)), "n": step}}


def test_managers_that_are_closed_leave_no_descriptor(tmp_path: Path) -> None:
    def use() -> None:
        with fc.CheckpointManager(tmp_path, overwrite=True) as manager:
            manager.save(1, items()).result()  # type: ignore[union-attr]

    for _ in range(3):
        use()
    assert open_below(tmp_path) == []


@pytest.mark.parametrize("kind", ["write_data", "sync", "write"])
@pytest.mark.parametrize("road", ["one file", "several files"])
def test_a_save_that_failed_leaves_no_descriptor(
    kind: str, road: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if road == "several files":
        monkeypatch.setattr(file_plan, "BYTES_PER_FILE", 1)
    storage = testing.FaultyStorage()
    with fc.CheckpointManager(tmp_path, overwrite=True, storage=storage) as manager:
        manager.save(1, items()).result()  # type: ignore[union-attr]
        before = open_below(tmp_path)
        for at in range(2):
            at = at if kind in ("sync", "write") else 0
            storage.inject(testing.Fault(at=at, errno=errno.EACCES, kinds=(kind,)))
            with pytest.raises(errors.SaveError):
                manager.save(1, items(2)).result()  # type: ignore[union-attr]
            assert storage.has_failed
        storage.heal()
        assert open_below(tmp_path) == before
        assert manager.restore(1)["tree"]["n"] == 0


def test_a_closed_manager_gives_its_staging_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers: list[host_memory.StagingBuffer] = []
    original = host_memory.StagingBuffer.reserve

    def reserve(self: host_memory.StagingBuffer, slots: Any) -> Any:
        buffers.append(self)
        return original(self, slots)

    monkeypatch.setattr(host_memory.StagingBuffer, "reserve", reserve)
    manager = fc.CheckpointManager(tmp_path)
    manager.save(1, items())
    manager.wait_until_finished()
    assert max(buffer.size_bytes for buffer in buffers) > 0
    manager.close()
    assert max(buffer.size_bytes for buffer in buffers) == 0


def test_a_save_whose_staging_failed_is_an_error_and_the_next_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise MemoryError("no space")

            patch.setattr(stage.Stager, "stage", fail)
            with pytest.raises(MemoryError, match="no space"):
                manager.save(1, items(1))
        manager.save(2, items(2)).result()  # type: ignore[union-attr]
        assert manager.all_steps() == [2]


def test_an_upload_that_fails_is_tried_again_after_a_while(tmp_path: Path) -> None:
    """An outage must not keep a processor busy, nor flood the store."""
    far = testing.FaultyStorage()
    tier = fc.Tier(path=tmp_path / "far", storage=far)
    with fc.CheckpointManager(tmp_path / "near", tiers=[tier]) as manager:
        far.forget()
        far.inject(testing.Fault(mode="lasting", kinds=("write",)))
        manager.save(1, items()).result()  # type: ignore[union-attr]
        deadline = time.monotonic() + 20
        while not far.has_failed and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.4)
        attempts = [each for each in far.operations if each.kind == "write"]
        far.heal()
        assert len(attempts) == 1
        manager.wait_until_finished()
    assert fc.restore(tmp_path / "far" / "1")["tree"]["n"] == 0


def test_an_overwrite_that_was_cut_is_ended_by_the_next_save_of_the_same_manager(
    tmp_path: Path,
) -> None:
    storage = testing.FaultyStorage(can_exchange=False)
    with fc.CheckpointManager(tmp_path, overwrite=True, storage=storage) as manager:
        manager.save(2, items(2)).result()  # type: ignore[union-attr]
        fault = testing.Fault(
            at=1, mode="lasting", kinds=("rename",), where=lambda op: "replacing" not in op.path
        )
        storage.inject(fault)
        with pytest.raises(errors.SaveError):
            manager.save(2, items(20)).result()  # type: ignore[union-attr]
        assert not (tmp_path / "2").exists()  # between the renames, and neither way works
        storage.heal()
        manager.save(3, items(3)).result()  # type: ignore[union-attr]
        assert fc.restore(tmp_path / "2")["tree"]["n"] in (2, 20)
