"""accelerate's objects and loaders as steps: stopped, killed, resumed bit for bit."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from full import IS_FULL

import functional_ckpt as fc

pytest.importorskip("accelerate")

import accelerate
import accelerate_run
from accelerate_run import run

from functional_ckpt.interop.accelerate import Checkpointing

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
full_only = pytest.mark.skipif(not IS_FULL, reason="a full run has it")
KINDS = ["plain"] + [
    pytest.param(kind, marks=full_only)
    for kind in ("shuffled", "use_seedable_sampler", "use_stateful_dataloader")
]
STOPS = [2, 6, 9, 12]  # within an epoch, at the end of one


def check_tail(whole: list[Any], first: list[Any], resumed: list[Any]) -> None:
    """Checks that a run in two parts has the losses, batches and values of one in one part."""
    assert [*first, *resumed] == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", kind=kind, save_policy=100)
    for stop in STOPS if IS_FULL else STOPS[2:3]:
        folder = tmp_path / f"{stop}"
        first = run(folder, kind=kind, stop_at=stop)
        check_tail(whole, first, run(folder, kind=kind, seed=99))


@full_only
def test_gradients_are_accumulated(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", accumulation=2, save_policy=100)
    first = run(tmp_path / "a", accumulation=2, stop_at=4)
    check_tail(whole, first, run(tmp_path / "a", accumulation=2, seed=99))


def prepared(tmp_path: Path, **options: Any) -> tuple[Any, Checkpointing]:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters())
    loader = torch.utils.data.DataLoader(torch.randn(6, 4), batch_size=2)
    accelerator.prepare(model, optimizer, loader)
    return accelerator, Checkpointing(accelerator, fc.CheckpointManager(tmp_path))


def test_a_save_within_an_accumulation_is_refused(tmp_path: Path) -> None:
    accelerator, checkpointing = prepared(tmp_path, gradient_accumulation_steps=2)
    (model,) = accelerator._models
    with accelerator.accumulate(model), pytest.raises(fc.errors.UsageError, match="accumulation"):
        checkpointing.save_state(1)


def test_other_objects_than_those_saved_are_refused(tmp_path: Path) -> None:
    accelerator, checkpointing = prepared(tmp_path)
    accelerator.register_for_checkpointing(accelerate_run.Count())
    checkpointing.save_state(1, force=True)
    accelerator._custom_objects.clear()
    with pytest.raises(fc.errors.MismatchError, match="custom"):
        checkpointing.load_state()
    accelerator.register_for_checkpointing(accelerate_run.Count())
    accelerator.prepare(torch.utils.data.DataLoader(torch.randn(6, 4)))
    with pytest.raises(fc.errors.MismatchError, match="data loaders"):
        checkpointing.load_state()


def test_state_beyond_its_reach_is_refused(tmp_path: Path) -> None:
    accelerator, checkpointing = prepared(tmp_path)
    with pytest.raises(fc.errors.UsageError, match="prepare"):
        next(checkpointing.skip_first_batches(torch.utils.data.DataLoader([1])))
    accelerator.register_save_state_pre_hook(print)
    with pytest.raises(fc.errors.UsageError, match="register_save_state_pre_hook"):
        checkpointing.save_state(1)


def test_several_models_and_additional_items(tmp_path: Path) -> None:
    accelerator, _ = prepared(tmp_path / "unused")
    more = torch.nn.Linear(2, 2)
    accelerator.prepare(more, torch.optim.AdamW(more.parameters()))
    with fc.CheckpointManager(tmp_path / "a") as manager:
        Checkpointing(accelerator, manager, {"ema": torch.ones(2)}).save_state(3)
        manager.wait_until_finished()
        expected = {"model", "model_1", "optimizer", "optimizer_1", "rng", "accelerate", "ema"}
        assert set(manager.metadata(3).items) == expected
        with pytest.raises(fc.errors.UsageError, match="model is saved already"):
            Checkpointing(accelerator, manager, {"model": 1}).save_state(4)


@full_only
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_killed_run_resumes_exactly(num_ranks: int, tmp_path: Path) -> None:
    def start(folder: Path, kill_at: int) -> int:
        folder.mkdir(exist_ok=True)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command = [sys.executable, *launch, accelerate_run.__file__, str(folder), str(kill_at)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert start(tmp_path / "whole", -1) == 0
    assert start(tmp_path / "killed", 5) != 0
    with fc.CheckpointManager(tmp_path / "killed", read_only=True) as manager:
        assert manager.latest_step() == 4
    assert start(tmp_path / "killed", -1) == 0
    for rank in range(num_ranks):
        name = f"outcome{rank}.txt"
        whole, resumed = (
            ast.literal_eval((tmp_path / folder / name).read_text())
            for folder in ("whole", "killed")
        )
        assert whole[4:] == resumed
