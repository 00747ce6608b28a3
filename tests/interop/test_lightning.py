"""The real Lightning: saved by the callback, killed, gone on with to the same end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import functional_ckpt as fc

pytest.importorskip("lightning")

import lightning_run

from functional_ckpt.interop import lightning


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> lightning_run.Module:
    return lightning_run.run(tmp_path_factory.mktemp("whole"))


def check_same(whole: lightning_run.Module, other: lightning_run.Module, start: int) -> None:
    assert other.losses == {step: x for step, x in whole.losses.items() if step >= start}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_killed_and_gone_on_with(whole: lightning_run.Module, tmp_path: Path) -> None:
    script = Path(lightning_run.__file__)
    done = subprocess.run(
        [sys.executable, script, tmp_path, "10"], capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr.decode()
    with fc.CheckpointManager(tmp_path / "ckpt", read_only=True) as manager:
        assert manager.all_steps() == [6]
        metadata = manager.metadata(6)
    assert metadata.progress is not None
    assert metadata.progress.count("epoch") == 1
    assert metadata.metrics == {"loss": pytest.approx(whole.losses[5])}
    check_same(whole, lightning_run.run(tmp_path), 6)


def test_steps_within_an_epoch(whole: lightning_run.Module, tmp_path: Path) -> None:
    other = lightning_run.run(tmp_path, save_policy=fc.policies.every(4))
    check_same(whole, other, 0)
    with fc.CheckpointManager(tmp_path / "ckpt") as manager:
        assert manager.all_steps() == [4, 8, 12, 16]
        checkpoint = manager.restore(8)["lightning"]
        assert checkpoint["global_step"] == 8
        assert (
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 8
        )


def test_paths_that_are_no_steps_are_refused(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "ckpt") as manager:
        io = lightning.ManagerIO(manager)
        assert io.latest() is None
        for path in (tmp_path / "last.ckpt", tmp_path / "ckpt" / "last", tmp_path / "7"):
            with pytest.raises(fc.errors.UsageError, match="the number of a step"):
                io.load_checkpoint(path)
        with pytest.raises(fc.errors.UsageError, match="its own storage"):
            io.save_checkpoint({}, io.path(1), storage_options={})
        with pytest.raises(fc.errors.StepNotFoundError):
            io.load_checkpoint(io.path(1))
