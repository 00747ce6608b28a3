"""Progress through the manager: saved, restored, decided by, at most once for a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from managing import looked_into, state

import functional_ckpt as fc
from functional_ckpt import policies


def train(
    directory: Path,
    *save_policies: Any,
    until: int = 20,
    batches_per_epoch: int = 6,
    **options: Any,
) -> list[int]:
    """A training that resumes from the latest step, and calls save twice after each batch.

    Returns:
        The steps that this run saved.
    """
    saved: list[int] = []
    with fc.CheckpointManager(directory, save_policy=list(save_policies), **options) as manager:
        progress = fc.Progress(max_duration=f"{until}ba", batches_per_epoch=batches_per_epoch)
        if manager.latest_step() is not None:
            restored = manager.restore()
            assert restored.progress is not None
            progress = restored.progress
            _save(manager, progress, saved)  # a possible first call of a loop
        while progress.batch < until:
            if progress.batch_in_epoch == batches_per_epoch:
                progress = progress.next_epoch()
                _save(manager, progress, saved)
            progress = progress.next_batch(samples=8, tokens=100, seconds=0.5)
            _save(manager, progress, saved)
            _save(manager, progress, saved)
    return saved


def _save(manager: fc.CheckpointManager, progress: fc.Progress, saved: list[int]) -> None:
    expected = manager.should_save(progress.batch, progress=progress)
    handle = manager.save(progress.batch, state(progress.batch), progress=progress)
    assert (handle is not None) is expected
    if handle is not None:
        saved.append(progress.batch)


POLICIES = [
    ("5ba", [5, 10, 15, 20]),
    (4, [4, 8, 12, 16, 20]),
    ("1ep", [6, 12, 18]),
    ("0.5ep", [3, 6, 9, 12, 15, 18]),
    ("1.5ep", [9, 18]),
    ("7e2tok", [7, 14]),
    ("40sp", [5, 10, 15, 20]),
    ("0.25dur", [5, 10, 15, 20]),
    ("1dur", [20]),
]


@pytest.mark.parametrize(("interval", "expected"), POLICIES)
def test_once_at_each_boundary_however_often_the_run_is_cut(
    tmp_path: Path, interval: str | int, expected: list[int]
) -> None:
    policy = policies.every(interval)
    assert train(tmp_path / "whole", policy) == expected
    # Cut right at a boundary, then between two: nothing is saved twice and nothing is left out.
    first, second = expected[0], expected[0] + 2
    runs = [train(tmp_path / "cut", policy, until=each) for each in (first, second, 20)]
    if interval in ("0.25dur", "1dur"):
        return  # of another length of training there are other quarters
    assert [step for run in runs for step in run] == expected
    assert looked_into(tmp_path / "cut").all_steps() == expected


def test_several_policies_save_a_batch_once(tmp_path: Path) -> None:
    saved = train(tmp_path, policies.every("6ba"), policies.every("1ep"), policies.every("600tok"))
    assert saved == [6, 12, 18]


def test_a_function_of_the_progress(tmp_path: Path) -> None:
    def at_the_end_of_odd_epochs(info: policies.StepInfo) -> bool:
        assert info.progress is not None
        return info.progress.batch_in_epoch == 0 and info.progress.epoch % 2 == 1

    assert train(tmp_path, policies.When(at_the_end_of_odd_epochs)) == [6, 18]


def test_time_and_preemption_go_with_progress(tmp_path: Path) -> None:
    assert train(tmp_path, policies.every("10h"), policies.every("10ba")) == [10, 20]


def test_a_run_that_goes_back_saves_its_own_boundaries(tmp_path: Path) -> None:
    with fc.CheckpointManager(
        tmp_path, save_policy=policies.every("1ep"), overwrite=True
    ) as manager:
        for step, epoch in ((10, 1), (20, 2), (30, 3)):
            progress = fc.Progress(epoch=epoch, batch=step)
            assert manager.save(step, state(step), progress=progress)
        restored = manager.restore(10)
        assert restored.progress == fc.Progress(epoch=1, batch=10)
        again = fc.Progress(epoch=1, batch=15)
        assert manager.save(15, state(15), progress=again) is None
        # Step 20 is there, but of the run that was left behind.
        again = fc.Progress(epoch=2, batch=20)
        assert manager.save(20, {"state": {"other": 1}}, progress=again)
        assert manager.save(20, {"state": {"other": 2}}, progress=again) is None
        assert manager.save(21, state(21), progress=fc.Progress(epoch=2, batch=21)) is None
        manager.wait_until_finished()
        assert manager.restore(20)["state"] == {"other": 1}


def test_force_saves_the_batch_again(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path, overwrite=True) as manager:
        progress = fc.Progress(batch=3)
        assert manager.save(3, state(3), progress=progress)
        assert manager.save(3, state(3), progress=progress) is None
        assert manager.save(3, state(4), progress=progress, force=True)
        assert manager.save(4, state(4), progress=progress.next_batch())


def test_where_it_is_kept(tmp_path: Path) -> None:
    progress = fc.Progress(max_duration="10ep").next_batch(samples=32, tokens=512, seconds=0.25)
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1), progress=progress)
        manager.save(2, state(2))
        manager.wait_until_finished()
        assert manager.restore(1).progress == progress
        assert set(manager.restore(1)) == {"state"}
        assert manager.metadata(1).progress == progress
        assert manager.restore(2).progress is None
        assert manager.metadata(2).progress is None
    record = json.loads((tmp_path / "1" / "progress" / "metadata").read_text())
    assert record == progress.to_json()
    assert fc.restore(tmp_path / "1").progress == progress
    with pytest.raises(fc.CheckpointError, match="reserved"):
        fc.save(tmp_path / "own", {"progress": fc.Json(1)})


def test_orbax_reads_it_as_a_json_item(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1), progress=fc.Progress(epoch=2, batch=7))
    with ocp.CheckpointManager(tmp_path) as theirs:
        restored = theirs.restore(1)
    assert restored["progress"]["epoch"] == 2
    assert np.array_equal(restored["state"]["weight"], np.ones(3, np.float32))


def test_a_damaged_one_is_found_and_a_foreign_one_is_none(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(1, state(1), progress=fc.Progress(epoch=2))
    file = tmp_path / "1" / "progress" / "metadata"
    file.write_text(file.read_text().replace("2", "3"))
    with looked_into(tmp_path) as manager, pytest.raises(fc.errors.CorruptCheckpointError):
        manager.restore(1)


@pytest.mark.parametrize("progress", [{"epoch": 1}, 3, "1ep"])
def test_save_refuses_a_progress_of_another_type(tmp_path: Path, progress: Any) -> None:
    with fc.CheckpointManager(tmp_path, save_policy=policies.every(5)) as manager:
        with pytest.raises(fc.errors.UsageError, match="progress must be an fc"):
            manager.save(1, state(1), progress=progress)
        with pytest.raises(fc.errors.UsageError, match="progress must be an fc"):
            manager.should_save(1, progress=progress)
        assert manager.all_steps() == []


def test_a_policy_that_needs_progress_says_so(tmp_path: Path) -> None:
    with (
        fc.CheckpointManager(tmp_path, save_policy=policies.every("1ep")) as manager,
        pytest.raises(fc.errors.UsageError, match=r"Pass save\(progress=fc.Progress"),
    ):
        manager.save(1, state(1))
