"""The examples: however a run is stopped, it ends with the same bits."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_modules import EXAMPLES, load_example

import functional_ckpt as fc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STEPS = 80


compare: Any = load_example("compare")
functional_state: Any = load_example("functional_state")


def start(example: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, EXAMPLES / f"{example}.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def finish(example: str, *arguments: str, returncode: int = 0) -> str:
    process = start(example, *arguments)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == returncode, output
    return output


def train(workdir: Path, save_interval_steps: int, *more: str) -> tuple[str, ...]:
    return (
        f"--workdir={workdir}",
        f"--num_steps={NUM_STEPS}",
        f"--ckpt_save_every={save_interval_steps}",
        *more,
    )


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stop_after(
    steps: int, workdir: Path, number: signal.Signals, *arguments: str
) -> tuple[int, str]:
    """Starts a training, sends it a signal when it has taken some steps; its end and its output."""
    process = start("train_digits", *arguments)
    deadline = time.monotonic() + 300
    while num_lines(workdir / "curve.jsonl") < steps and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def latest_step(workdir: Path) -> int | None:
    with fc.CheckpointManager(workdir / "checkpoints", read_only=True) as manager:
        return manager.latest_step()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("reference")
    output = finish("train_digits", *train(workdir, 50))
    assert f"step {NUM_STEPS - 1}: loss" in output
    return workdir


def check_same(reference: Path, workdir: Path) -> None:
    result = compare.compare(reference, workdir)
    assert result.differences == []
    assert result.step == NUM_STEPS - 1
    assert result.num_losses == NUM_STEPS
    assert set(result.num_leaves) == {
        *("model", "optimizer", "scheduler", "rng", "loader", "ema", "config")
    }
    assert result.num_leaves["optimizer"] >= 12 * 3


def test_stopped_killed_and_resumed_equals_uninterrupted(reference: Path, tmp_path: Path) -> None:
    rarely = train(tmp_path, 1000)  # no save is due but the first and the last
    returncode, output = stop_after(10, tmp_path, signal.SIGTERM, *rarely)
    stopped = latest_step(tmp_path)
    assert returncode == 0, output
    assert stopped is not None and 9 <= stopped < NUM_STEPS - 1
    assert f"received SIGTERM, saved step {stopped}\n" in output
    assert num_lines(tmp_path / "curve.jsonl") == stopped + 1

    often = train(tmp_path, 25)
    returncode, output = stop_after(45, tmp_path, signal.SIGKILL, *often)
    assert returncode == -signal.SIGKILL
    assert f"resumed after step {stopped}\n" in output
    stopped = latest_step(tmp_path)
    assert stopped is not None
    # Steps were lost with the process: the curve is ahead of the checkpoint and has to be cut.
    assert num_lines(tmp_path / "curve.jsonl") > stopped + 1

    assert f"resumed after step {stopped}\n" in finish("train_digits", *often)
    check_same(reference, tmp_path)


def test_other_settings_are_another_run(reference: Path) -> None:
    output = finish("train_digits", *train(reference, 50, "--learning_rate=0.1"), returncode=1)
    assert "holds a run with" in output and "'learning_rate': 0.003" in output


def resave(workdir: Path, change: Any) -> None:
    """Saves the last step of a run again, as it was but for one change."""
    with fc.CheckpointManager(workdir / "checkpoints", overwrite=True) as manager:
        restored = manager.restore()
        items = dict(restored)
        change(items)
        items["config"] = fc.Json(items["config"])
        assert restored.step is not None
        manager.save(restored.step, items, metrics=restored.metrics)


def flip_a_bit(items: dict[str, Any]) -> None:
    items["model"]["conv1.weight"].view(torch.int32)[3, 0, 1, 2] ^= 1


def forget_a_moment(items: dict[str, Any]) -> None:
    del items["optimizer"]["state"]["output.bias"]["exp_avg"]


def change_a_digit(items: dict[str, Any]) -> None:
    items["optimizer"]["param_groups"][0]["lr"] += 1e-18


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda items: None, []),
        (flip_a_bit, ["model.conv1.weight: not the same"]),
        (forget_a_moment, ["optimizer.state.output.bias.exp_avg: only in "]),
        (change_a_digit, ["optimizer.param_groups.0.lr: not the same"]),
    ],
    ids=["nothing", "one-bit", "a-leaf-less", "a-digit"],
)
def test_comparison_finds_the_smallest_difference(
    change: Any, expected: list[str], reference: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    resave(other, change)
    found = compare.compare(reference, other).differences
    assert [text[: len(start)] for text, start in zip(found, expected, strict=True)] == expected


def test_comparison_reads_the_curve(reference: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    curve = other / "curve.jsonl"
    curve.write_text(curve.read_text().replace("1", "2", 1))
    assert compare.compare(reference, other).differences == ["curve.jsonl: not the same"]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), torch.ones(2, 1), False),
        (torch.tensor(1), torch.tensor(1), True),
        (np.zeros(2), np.zeros(2), True),
        (np.zeros(2), -np.zeros(2), False),
        (np.zeros(2), torch.zeros(2, dtype=torch.float64), False),
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        (1, True, False),
        ([], (), False),
        (None, None, True),
    ],
)
def test_leaves_are_compared_by_type_and_bits(one: object, other: object, expected: bool) -> None:
    assert compare.is_same(one, other) is expected


def test_demo_shows_that_nothing_is_lost_and_fails_if_something_is(tmp_path: Path) -> None:
    arguments = (f"--workdir={tmp_path}", "--num_steps=80", "--num_kills=1")
    output = finish("demo", *arguments)
    assert "killed while saving step" in output
    assert output.count("the same, bit for bit") == 8
    assert "leaves equal PyTorch's" in output
    assert "$ fckpt ls" in output and " 79 " in output
    assert "Nothing was lost." in output

    resave(tmp_path / "interrupted", flip_a_bit)
    output = finish("demo", *arguments, "--compare_only", returncode=1)
    assert "model.conv1.weight: not the same" in output
    assert "Nothing was lost." not in output


# ---------------------------------------------------------------------- functional_state.py


def snapshot(state: Any) -> dict[str, Any]:
    """Copies of everything in a state, and which objects hold it."""
    return {
        "step": state.step,
        "tensors": [
            (name, id(tensor), tensor.data_ptr(), tensor._version, tensor.clone())
            for field in ("params", "momentum")
            for name, tensor in getattr(state, field).items()
        ],
        "key": (id(state.key), state.key._version, state.key.clone()),
    }


def check_untouched(state: Any, before: dict[str, Any]) -> None:
    after = snapshot(state)
    assert after["step"] == before["step"]
    assert after["key"][:2] == before["key"][:2]
    assert torch.equal(after["key"][2], before["key"][2])
    for now, then in zip(after["tensors"], before["tensors"], strict=True):
        assert now[:4] == then[:4]
        assert torch.equal(now[4], then[4])


def test_functional_state_comes_back_as_its_own_type(tmp_path: Path) -> None:
    saved, _ = functional_state.train_step(
        functional_state.initial_state(seed=1), *functional_state.digits()
    )
    target = functional_state.initial_state(seed=2)
    saved_before, target_before = snapshot(saved), snapshot(target)
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"state": saved})
        manager.wait_until_finished()
        state = manager.restore(1, {"state": target})["state"]
    check_untouched(saved, saved_before)
    check_untouched(target, target_before)
    assert type(state) is functional_state.TrainState
    assert state.step == 1
    fields = dataclasses.asdict
    assert compare.is_same(state.key, saved.key)
    for name, leaf in compare.leaves({k: fields(saved)[k] for k in ("params", "momentum")}):
        field, _, key = name.partition(".")
        restored = getattr(state, field)[key]
        assert compare.is_same(restored, leaf)
        assert restored.data_ptr() not in (leaf.data_ptr(), getattr(target, field)[key].data_ptr())


def test_functional_training_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = functional_state.train(tmp_path / "whole", 30, 10)
    functional_state.train(tmp_path / "parts", 17, 10)
    resumed = functional_state.train(tmp_path / "parts", 30, 10)
    assert resumed.step == whole.step == 30
    assert all(compare.is_same(whole.params[name], resumed.params[name]) for name in whole.params)
    assert compare.is_same(whole.key, resumed.key)


def test_functional_example_runs_from_the_command_line(tmp_path: Path) -> None:
    flags = (f"--workdir={tmp_path}", "--num_steps=4", "--save_interval_steps=2")
    assert "saving step 4: loss" in finish("functional_state", *flags)


# ---------------------------------------------------------------------- fine_tune.py


def test_fine_tuning_starts_from_the_base_and_resumes(tmp_path: Path) -> None:
    flags = (f"--workdir={tmp_path}", "--num_epochs=2")
    output = finish("fine_tune", *flags)
    losses = [float(line.rpartition(" ")[2]) for line in output.splitlines() if "loss" in line]
    assert len(losses) == 4
    assert losses[2] < 0.6 * losses[0]  # the body knows something already
    assert os.readlink(tmp_path / "fine" / "latest") == "ep2-ba58"
    assert "loss" not in finish("fine_tune", *flags)  # nothing is left to do
    again = finish("fine_tune", f"--workdir={tmp_path}", "--num_epochs=3")
    assert [line.partition(",")[0] for line in again.splitlines() if "loss" in line] == [
        "base: epoch 3",
        "fine: epoch 3",
    ]
