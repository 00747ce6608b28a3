"""Metrics of one commit of a step are never those of another; handles belong to one process."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors


def items(value: float) -> dict[str, Any]:
    return {"t": {"w": torch.full((3,), float(value))}}


def value_of(restored: fc.Restored) -> float:
    return float(restored["t"]["w"][0])


# ------------------------------------------------------------------------------------ late metrics


@pytest.mark.parametrize("has_tier", [False, True], ids=["alone", "tier"])
def test_metrics_of_an_overwritten_step_are_not_recorded_of_the_new_one(
    has_tier: bool, tmp_path: Path
) -> None:
    tiers = [tmp_path / "far"] if has_tier else []
    run = tmp_path / "run"
    with (
        fc.CheckpointManager(run, overwrite=True, tiers=tiers) as trainer,
        fc.CheckpointManager(run, read_only=True, tiers=tiers) as evaluator,
    ):
        trainer.save(1, items(1)).result()
        assert value_of(evaluator.restore(1)) == 1
        trainer.save(1, items(2)).result()
        with pytest.raises(errors.StepNotFoundError, match="overwritten after this manager"):
            evaluator.record_metrics(1, {"accuracy": 0.1})
        assert not trainer.metadata(1).metrics
        assert value_of(evaluator.restore(1)) == 2
        evaluator.record_metrics(1, {"accuracy": 0.2})
        assert trainer.metadata(1).metrics == {"accuracy": 0.2}


def test_metrics_do_not_move_to_the_run_that_replaced_the_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with fc.CheckpointManager(run) as first:
        first.save(1, items(1)).result()
    with fc.CheckpointManager(run, read_only=True) as evaluator:
        evaluator.restore(1)
        run.rename(tmp_path / "old")
        with fc.CheckpointManager(run) as second:
            second.save(1, items(2)).result()
            with pytest.raises(errors.StepNotFoundError):
                evaluator.record_metrics(1, {"accuracy": 0.1})
            assert not second.metadata(1).metrics


def test_a_trainer_records_metrics_of_the_step_that_it_replaced(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path, overwrite=True) as manager:
        manager.save(1, items(1)).result()
        manager.restore(1)
        manager.save(1, items(2)).result()
        manager.record_metrics(1, {"accuracy": 0.2})
        assert manager.metadata(1).metrics == {"accuracy": 0.2}


# ------------------------------------------------------------------------- checkpoints of fc.save


def test_a_checkpoint_of_fc_save_under_the_name_of_a_step_is_that_step(tmp_path: Path) -> None:
    for step in (1, 5):
        fc.save(tmp_path / str(step), items(step), metrics={"loss": step})
    with fc.CheckpointManager(tmp_path, keep_policy=fc.policies.LatestN(2)) as manager:
        assert manager.all_steps() == [1, 5] and manager.best_step("loss", mode="min") == 1
        restored = manager.restore_or(items(0))
        assert (restored.step, restored.next_step, value_of(restored)) == (5, 6, 5)
        manager.record_metrics(5, {"late": 1})
        assert manager.metadata(5).metrics == {"loss": 5, "late": 1}
        with pytest.raises(errors.StepExistsError):
            manager.save(5, items(0))
        manager.save(6, items(6)).result()
        assert manager.all_steps() == [5, 6]
    assert fc.restore(tmp_path / "5").step is None


def test_a_step_under_the_name_of_another_is_damaged(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(1, items(1)).result()
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    with fc.CheckpointManager(tmp_path, read_only=True) as reader:
        with pytest.raises(errors.CorruptCheckpointError, match="written as step 1"):
            reader.restore(2)
        assert value_of(reader.restore_or(items(0), on_corrupt="older")) == 1


# ---------------------------------------------------------------------------------------- handles


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_manager_and_its_handles_cannot_be_copied(
    copied: Callable[[Any], Any], tmp_path: Path
) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        commit = manager.save(1, items(1))
        for handle in (manager, commit):
            with pytest.raises(errors.UsageError, match="copied or pickled"):
                copied(handle)
