"""The real transformers.Trainer: saved by the callback, killed, gone on with to the same end."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import functional_ckpt as fc

pytest.importorskip("transformers")

import trainer_run
import transformers
from torch.distributed.fsdp import FullyShardedDataParallel

from functional_ckpt.cli import main
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


def test_a_folder_of_the_trainer_s_own_becomes_a_step_that_a_run_goes_on_from(
    whole: transformers.Trainer, tmp_path: Path
) -> None:
    def trainer(manager: fc.CheckpointManager, **changes: Any) -> transformers.Trainer:
        return trainer_run.make_trainer(tmp_path, manager, **changes)

    with fc.CheckpointManager(tmp_path / "unused", save_policy=100) as manager:
        native = trainer(manager, save_strategy="steps", save_steps=7)
        trainer_lib.train(native, manager)
    folder = tmp_path / "out" / "checkpoint-7"
    model = trainer_run.Model()
    fc.restore(folder, {"model": model})
    assert main(["convert", str(folder), str(tmp_path / "ckpt"), "--step", "7"]) == 0
    resumed = trainer_run.run(tmp_path)
    assert resumed.state.global_step == trainer_run.NUM_STEPS
    check_same(whole, resumed)
    with fc.CheckpointManager(tmp_path / "ckpt", read_only=True) as manager:
        assert manager.all_steps() == [7, 10, 14]


@pytest.mark.parametrize("kill_at", [8, 12])  # after step 5, within an epoch; after 10 and epoch 2
def test_killed_training_resumes_exactly(
    whole: transformers.Trainer, tmp_path: Path, kill_at: int
) -> None:
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
        assert manager.all_steps() == [6, 12, 14]
        manager.delete(14)
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


def cut_and_resume(
    root: Path, stop_at: int, *, policy: Any = None, keep: Any = None, **how: Any
) -> tuple[transformers.Trainer, transformers.Trainer]:
    """A complete training, and one that stops at a step and is resumed by a new Trainer."""

    def train(name: str, **changes: Any) -> transformers.Trainer:
        make = {**how, **changes}
        make["more_callbacks"] = [each() for each in make.get("more_callbacks", ())]
        with fc.CheckpointManager(
            root / name, save_policy=policy or fc.policies.every(1), keep_policy=keep
        ) as manager:
            trainer = trainer_run.make_trainer(root, manager, **make)
            trainer_lib.train(trainer, manager)
        return trainer

    whole = train("whole")
    stop = functools.partial(StopAt, stop_at)
    train("cut", more_callbacks=[*how.get("more_callbacks", ()), stop])
    return whole, train("cut")


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def constant_metrics(_: Any) -> dict[str, float]:
    return {"score": 1.0}  # never improves after the first evaluation


EVALUATED = {"eval_dataset": trainer_run.Data(), "compute_metrics": constant_metrics}


def test_patience_of_early_stopping_survives_a_resume(tmp_path: Path) -> None:
    whole, resumed = cut_and_resume(
        tmp_path,
        6,
        more_callbacks=[functools.partial(transformers.EarlyStoppingCallback, 5)],
        parts=EVALUATED,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="score",
        load_best_model_at_end=False,
        restore_callback_states_from_checkpoint=True,
        max_steps=30,
    )
    assert whole.state.global_step == 12  # the first evaluation, and five that are no better
    assert resumed.state.global_step == 12


def test_an_evaluation_at_the_end_of_an_epoch_is_the_step_s_metrics(tmp_path: Path) -> None:
    calls = iter([3.0, 1.0, 2.0] * 3)

    def metrics(_: Any) -> dict[str, float]:
        return {"score": next(calls)}

    best = fc.policies.BestN(1, "eval_score", mode="min")
    with fc.CheckpointManager(
        tmp_path / "ckpt",
        save_policy=fc.policies.every("1ep"),
        keep_policy=[fc.policies.LatestN(1), best],
    ) as manager:
        trainer = trainer_run.make_trainer(
            tmp_path,
            manager,
            parts={**EVALUATED, "compute_metrics": metrics},
            eval_strategy="epoch",
            max_steps=18,
        )
        trainer_lib.train(trainer, manager)
        manager.wait_until_finished()
        assert manager.all_steps() == [12, 18]
        assert manager.best_step("eval_score", mode="min") == 12


def test_resumed_after_an_evaluated_epoch_with_the_same_end(tmp_path: Path) -> None:
    whole, resumed = cut_and_resume(
        tmp_path, 6, policy=fc.policies.every("1ep"), parts=EVALUATED, eval_strategy="epoch"
    )
    check_same(whole, resumed)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("bad", [math.nan, math.inf, (1.0, 2.0), np.float32(0.5)])
def test_numbers_that_json_lacks_may_be_logged(tmp_path: Path, bad: Any) -> None:
    class LogBad(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                state.log_history.append({"odd": bad, "step": 2})

    _, resumed = cut_and_resume(tmp_path, 4, more_callbacks=[LogBad], max_steps=6)
    (odd,) = [entry["odd"] for entry in resumed.state.log_history if "odd" in entry]
    expected = list(bad) if isinstance(bad, tuple) else float(bad)
    assert repr(odd) == repr(expected)


class Stream(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    def __iter__(self) -> Any:
        return iter([trainer_run.Data()[i % 24] for i in range(96)])


def test_a_streamed_data_set_trains_and_resumes(tmp_path: Path) -> None:
    whole, resumed = cut_and_resume(tmp_path, 7, parts={"train_dataset": Stream()})
    check_same(whole, resumed)


def test_the_last_step_is_saved_whatever_the_policy_says(tmp_path: Path) -> None:
    trainer_run.run(tmp_path)
    with fc.CheckpointManager(tmp_path / "ckpt", read_only=True) as manager:
        assert manager.all_steps() == [5, 10, trainer_run.NUM_STEPS]


def test_the_gradient_scaler_is_saved_and_restored(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "ckpt", save_policy=fc.policies.every(1)) as manager:
        trainer = trainer_run.make_trainer(tmp_path, manager, max_steps=2)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        trainer.accelerator.scaler.scale(torch.ones(1))  # the scale is made at the first use
        trainer_lib.train(trainer, manager)
        again = trainer_run.make_trainer(tmp_path, manager, max_steps=3)
        again.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        trainer_lib.train(again, manager)
        assert again.accelerator.scaler.get_scale() == 4.0


def test_a_trainer_that_was_resumed_has_its_own_methods_again(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "ckpt") as manager:
        trainer_lib.train(trainer_run.make_trainer(tmp_path, manager, max_steps=1), manager)
        resumed = trainer_run.make_trainer(tmp_path, manager, max_steps=2)
        before = set(vars(resumed))
        trainer_lib.train(resumed, manager)
    assert resumed.state.global_step == 2
    assert not {name for name in set(vars(resumed)) - before if name.startswith("_load")}


def test_a_checkpoint_of_the_trainers_own_is_passed_through(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "ckpt", save_policy=fc.policies.every(100)) as manager:
        own = trainer_run.make_trainer(tmp_path, manager, max_steps=4, save_strategy="steps")
        trainer_lib.train(own, manager)
        resumed = trainer_run.make_trainer(tmp_path, manager, max_steps=6)
        folder = str(tmp_path / "out" / "checkpoint-4")
        trainer_lib.train(resumed, manager, resume_from_checkpoint=folder)
    assert set(losses(resumed)) == {1, 2, 3, 4, 5, 6}


def test_a_trainer_without_the_callback_is_refused(tmp_path: Path) -> None:
    with (
        fc.CheckpointManager(tmp_path / "a") as manager,
        fc.CheckpointManager(tmp_path / "b") as other,
        pytest.raises(fc.errors.UsageError, match=r"needs a ManagerCallback\(manager\)"),
    ):
        trainer_lib.train(trainer_run.make_trainer(tmp_path, other), manager)


def test_state_that_only_train_can_save_is_refused_without_it(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "ckpt") as manager:
        trainer = trainer_run.make_trainer(
            tmp_path,
            manager,
            more_callbacks=[transformers.EarlyStoppingCallback()],
            parts=EVALUATED,
            eval_strategy="steps",
            metric_for_best_model="score",
            load_best_model_at_end=True,
            save_strategy="steps",
        )
        with pytest.raises(fc.errors.UsageError, match="EarlyStoppingCallback"):
            trainer.train()


def test_fsdp1_is_refused_when_the_training_starts(tmp_path: Path) -> None:
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    with fc.CheckpointManager(tmp_path / "ckpt") as manager:
        callback = trainer_lib.ManagerCallback(manager)
        with pytest.raises(fc.errors.UsageError, match='"version": 2'):
            callback.on_train_begin(None, None, None, model=model)
