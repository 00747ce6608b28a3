"""fckpt merge, edit and cp: the steps they take, their output, and their errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt.cli import app


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of steps 0, 10, 20, 30, whose best loss is at 20, then 10."""
    with fc.CheckpointManager(tmp_path / "run") as manager:
        for step, loss in ((0, 4.0), (10, 2.0), (20, 1.0), (30, 3.0)):
            items = {"model": {"a": torch.full((2,), float(step)), "n": torch.tensor(step)}}
            manager.save(step, items, metrics={"loss": loss})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def fckpt(*arguments: Any) -> int:
    return app.main([str(each) for each in arguments])


@pytest.mark.parametrize(
    ("chosen", "mean", "last"),
    [
        (["run", "--last", 2], 25.0, 30),
        (["run", "--best", 2, "loss"], 15.0, 20),
        (["run", "--best", 2, "loss:max"], 15.0, 30),
        (["run", 30, "best:loss"], 25.0, 20),
        (["run/0", "run", "latest", 20], 50 / 3, 20),
        (["run/30", "run/0", "--weights", 1, 2], 10.0, 0),
        (["run", "run/10"], 20.0, 10),
    ],
)
def test_the_named_steps_are_merged(run: Path, chosen: list[Any], mean: float, last: int) -> None:
    assert fckpt("merge", *chosen, "-o", "out") == 0
    found = fc.restore("out")["model"]
    assert torch.equal(found["a"], torch.full((2,), mean)) and found["n"] == last
    assert fckpt("verify", "out") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--last", 5], "has 4 such steps, not 5: 0, 10, 20, 30"),
        (["run", "--best", 2, "los"], "No step has the metric 'los'; they have: loss"),
        (["run", "--best", "x", "loss"], "expected a number above zero, got 'x'"),
        (["run/0", "--last", 2], "is one checkpoint, not a directory of steps"),
        (["run", 0, "--last", 2], "among the steps of one directory"),
        (["run", 10, 15], "step 15"),
        (["run"], "at least two checkpoints"),
        (["run", 0, 10, "--lst", 2], "did you mean --last?"),
    ],
)
def test_a_wrong_choice_is_one_error(
    run: Path, arguments: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fckpt("merge", *arguments, "-o", "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (run.parent / "out").exists()


def test_records_name_what_was_made(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fckpt("merge", "run", 0, 10, "-o", "soup", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    paths = [str(run / "0"), str(run / "10")]
    expected = {"schema": "fckpt.merge/1", "path": "soup", "checkpoints": paths, "weights": None}
    assert record == expected
    options = ["--keep", "model.a", "--cast", "float16:model.*", "--rename", "model=net"]
    assert fckpt("edit", "run", "--step", 10, "-o", "small", *options, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record == {"schema": "fckpt.edit/1", "path": "small", "checkpoint": str(run / "10")}
    assert fc.restore("small")["net"]["a"].dtype == torch.float16
    assert fckpt("cp", "run", "copied", "--step", "best:loss") == 0
    assert capsys.readouterr().out == f"{run / '20'} -> copied\n"
    assert fc.restore("copied").step == 20
    assert fckpt("cp", "run", "copied") == 2
    assert "copied exists and is never overwritten" in capsys.readouterr().err


def test_help_has_examples_without_torch() -> None:
    code = (
        "import sys; from functional_ckpt.cli import app\n"
        "for each in ('merge', 'edit', 'cp'): app.main([each, '--help'])\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("Example: fckpt") == 3
