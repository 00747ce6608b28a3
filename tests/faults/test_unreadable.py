"""A system that refuses once is no damage: the error says so, and nothing is taken for absent."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors, testing


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with fc.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            manager.save(step, {"tree": {"x": torch.arange(9.0)}}, metrics={"loss": float(step)})
        manager.wait_until_finished()
        manager.record_metrics(2, {"late": 2.0})
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "metrics/metrics", "late"])
def test_metrics_that_cannot_be_read_are_not_called_damaged(run: Path, name: str) -> None:
    place = ".functional_ckpt/metrics/2." if name == "late" else f"run/2/{name}"

    class Refusing(testing.FaultyStorage):
        is_refusing = True

        def operation(self, kind: str, path: str) -> None:
            super().operation(kind, path)
            if self.is_refusing and kind == "read" and place in path:
                text = f"Cannot read {path}: {os.strerror(errno.EIO)}."
                raise errors.StorageError(text, errno=errno.EIO, path=path)

    storage = Refusing()
    with fc.CheckpointManager(run, read_only=True, storage=storage) as manager:
        for ask in (lambda: manager.best_step("loss", mode="min"), lambda: manager.metadata(2)):
            with pytest.raises(errors.StorageError, match=os.strerror(errno.EIO)):
                ask()
        assert manager.all_steps() == [1, 2]
        for is_refusing in (False, True):
            storage.is_refusing = is_refusing
            assert manager.best_step("loss", mode="min") == 1, "known metrics are not read again"
        manager.reload()
        with pytest.raises(errors.StorageError, match=os.strerror(errno.EIO)):
            manager.best_step("loss", mode="min")
        storage.is_refusing = False
        assert manager.metadata(2).metrics == {"loss": 2.0, "late": 2.0}


def test_a_file_that_cannot_be_closed_is_an_error_of_this_package(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, path = os.close, os.path.realpath(run / "2")

    def refuse(descriptor: int) -> None:
        is_ours = os.readlink(f"/proc/self/fd/{descriptor}").startswith(path)
        close(descriptor)
        if is_ours:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", refuse)
    with pytest.raises(errors.StorageError, match=os.strerror(errno.EIO)):
        fc.restore(run / "2")


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_metrics_of_a_step_that_goes_away_are_not_reported(run: Path, how: str) -> None:
    class Moving(testing.FaultyStorage):
        def write(self, path: str, data: bytes) -> None:
            if how == "moved":
                run.rename(run.parent / "moved")
            else:
                shutil.rmtree(run / "2")
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            super().write(path, data)

    message = "while its metrics were recorded"
    with (
        fc.CheckpointManager(run, read_only=True, storage=Moving()) as manager,
        pytest.raises(errors.StepNotFoundError, match=message),
    ):
        manager.record_metrics(2, {"later": 1.0})


def test_a_writer_whose_directory_was_moved_away_records_no_metrics(run: Path) -> None:
    tiers = [fc.Tier(path=run.parent / "far")]
    with fc.CheckpointManager(run, tiers=tiers) as manager:
        manager.wait_until_finished()
        run.rename(run.parent / "moved")
        with pytest.raises(errors.LockedError):
            manager.record_metrics(2, {"later": 1.0})
        (run.parent / "moved").rename(run)
        manager.record_metrics(2, {"later": 1.0})
        assert manager.metadata(2).metrics == {"loss": 2.0, "late": 2.0, "later": 1.0}


@pytest.mark.parametrize("looks", [False, True])
def test_an_evaluator_whose_directory_was_moved_away_records_no_metrics(
    looks: bool, run: Path
) -> None:
    tiers = [fc.Tier(path=run.parent / "far")]
    with fc.CheckpointManager(run, tiers=tiers) as manager:
        manager.wait_until_finished()
    with fc.CheckpointManager(run, tiers=tiers, read_only=True) as manager:
        run.rename(run.parent / "moved")
        if looks:
            assert 2 in manager.all_steps()
        with pytest.raises(errors.StorageError, match="was moved or removed"):
            manager.record_metrics(2, {"later": 1.0})
        (run.parent / "moved").rename(run)
        manager.record_metrics(2, {"later": 1.0})
        assert manager.metadata(2).metrics == {"loss": 2.0, "late": 2.0, "later": 1.0}


def test_an_evaluator_opened_without_the_directory_records_in_the_tier_itself(run: Path) -> None:
    far = run.parent / "far"
    with fc.CheckpointManager(run, tiers=[far]) as manager:
        manager.wait_until_finished()
    run.rename(run.parent / "moved")
    with (
        fc.CheckpointManager(run, tiers=[far], read_only=True) as manager,
        pytest.raises(errors.StorageError, match="of the tier itself"),
    ):
        manager.record_metrics(1, {"loss": 0.0})
    with fc.CheckpointManager(far, read_only=True) as manager:
        manager.record_metrics(1, {"loss": 9.0, "far": 1.0})
    (run.parent / "moved").rename(run)
    policy = fc.policies.BestN(1, "far")
    with fc.CheckpointManager(run, tiers=[far], keep_policy=policy) as manager:
        # The first tier's value of a name takes precedence.
        assert manager.metadata(1).metrics == {"loss": 1.0, "far": 1.0}
        assert manager.best_step("far") == 1
        manager.save(3, {"tree": {"x": torch.zeros(9)}}, metrics={"far": 0.0})
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 2, 3]
    with fc.CheckpointManager(run, read_only=True) as manager:
        assert manager.all_steps() == [1, 3]
    with fc.CheckpointManager(far, read_only=True) as manager:
        assert manager.metadata(1).metrics == {"loss": 1.0, "far": 1.0}
