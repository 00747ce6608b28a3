"""The distributed example: saved by two ranks, it resumes on one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from example_modules import EXAMPLES, load_example

import functional_ckpt as fc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

NUM_STEPS = 12
RESUMED_AFTER = 4


compare: Any = load_example("compare")


def train(num_ranks: int, workdir: Path, *more: str) -> str:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={num_ranks}", EXAMPLES / "train_fsdp.py"),
        f"--workdir={workdir}",
        f"--text={EXAMPLES / 'train_digits.py'}",
        f"--num_steps={NUM_STEPS}",
        "--batch_size=3",  # one of two ranks has more to do than the other
        "--num_blocks=1",
        "--context=16",
        "--width=12",
        "--hidden=10",
        "--num_heads=2",
        "--ckpt_save_every=4",
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run of two ranks that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("reference")
    assert f"step {NUM_STEPS - 1}: loss" in train(2, workdir)
    return workdir


def curve(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "curve.jsonl").read_text().splitlines()]


def test_saved_by_two_ranks_and_resumed_by_one(reference: Path, tmp_path: Path) -> None:
    workdir, gathered = tmp_path / "resumed", tmp_path / "gathered"
    shutil.copytree(reference, workdir)
    for step in (8, NUM_STEPS - 1):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    output = train(1, workdir, f"--restored_dir={gathered}")
    assert f"resumed after step {RESUMED_AFTER} on 1 x 1 ranks" in output

    stored = fc.restore(reference / "checkpoints" / str(RESUMED_AFTER), only=["model", "optimizer"])
    expected = dict(compare.leaves(dict(stored)))
    held = dict(compare.leaves(dict(fc.restore(gathered))))
    assert held.keys() == expected.keys()
    assert [name for name in held if not compare.is_same(held[name], expected[name])] == []
    num_moments = sum(name.endswith("exp_avg_sq") for name in held)
    assert num_moments == sum(name.startswith("model.") for name in held) > 10

    one, other = curve(reference), curve(workdir)
    assert [point["step"] for point in other] == list(range(NUM_STEPS))
    assert other[: RESUMED_AFTER + 1] == one[: RESUMED_AFTER + 1]
    for point, twin in zip(other, one, strict=True):
        assert abs(point["loss"] - twin["loss"]) < 1e-5
        assert point["learning_rate"] == twin["learning_rate"]
    ends = [
        fc.restore(path / "checkpoints" / str(NUM_STEPS - 1))["model"]
        for path in (reference, workdir)
    ]
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=0, atol=1e-5)
