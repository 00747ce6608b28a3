"""The real transformers.Trainer: saved by the callback, killed, gone on with to the same end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc

pytest.importorskip("transformers")

import trainer_run
import transformers

from functional_ckpt.interop import trainer as trainer_lib


def losses(trainer: transformers.Trainer) -> dict[int, float]:
    history: list[dict[str, Any]] = trainer.state.log_history
    return {int(entry["step"]): entry["loss"] for entry in history if "loss" in entry}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> transformers.Trainer:
    return trainer_run.run(tmp_path_factory.mktemp("whole"))


def check_same(one: transformers.Trainer, other: transformers.Trainer) -> None:
    assert losses(one) == losses(other)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


@pytest.mark.parametrize("kill_at", [8, 12])  # after step 5, within an epoch; after 10 and epoch 2
def test_killed_and_gone_on_with(whole: transformers.Trainer, tmp_path: Path, kill_at: int) -> None:
    script = Path(trainer_run.__file__)
    done = subprocess.run(
        [sys.executable, script, tmp_path, "12"], capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr.decode()
    with fc.CheckpointManager(tmp_path / "ckpt", read_only=True) as manager:
        assert manager.latest_step() == 10
        metadata = manager.metadata()
    assert metadata.progress is not None
    assert metadata.progress.batch == metadata.step
    assert metadata.progress.sample == 4 * metadata.step
    assert metadata.progress.count("epoch") == metadata.step / 6
    assert metadata.metrics is not None
    assert metadata.metrics["loss"] == losses(whole)[metadata.step]
    resumed = trainer_run.run(tmp_path)
    assert resumed.state.global_step == trainer_run.NUM_STEPS
    check_same(whole, resumed)


def test_at_the_end_of_an_epoch(whole: transformers.Trainer, tmp_path: Path) -> None:
    every_epoch = {"save_policy": fc.policies.every("1ep"), "keep_policy": fc.policies.LatestN(9)}
    stopped = trainer_run.run(tmp_path, **every_epoch)
    check_same(whole, stopped)
    with fc.CheckpointManager(tmp_path / "ckpt") as manager:
        assert manager.all_steps() == [6, 12]
        manager.delete(12)
    check_same(whole, trainer_run.run(tmp_path, **every_epoch))


def test_another_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer_run.run(tmp_path)

    class Other(trainer_run.Model):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Linear(2, 2)

    monkeypatch.setattr(trainer_run, "Model", Other)
    with pytest.raises(fc.errors.MismatchError, match=r"more\.weight"):
        trainer_run.run(tmp_path)


def test_a_checkpoint_of_the_trainers_own_is_refused(tmp_path: Path) -> None:
    with (
        fc.CheckpointManager(tmp_path) as manager,
        pytest.raises(fc.errors.UsageError, match="leave resume_from_checkpoint out"),
    ):
        trainer_lib.train(None, manager, resume_from_checkpoint=True)  # type: ignore[arg-type]
