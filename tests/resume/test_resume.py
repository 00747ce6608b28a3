"""Programs that people have, interrupted and started again: they end like the uninterrupted run.

Killed at a random write of a save, or stopped by SIGTERM, and started again until they end.
`FUNCTIONAL_CKPT_FULL=1` (scripts/resume_matrix) runs all of them, with several moments each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from full import IS_FULL

from functional_ckpt.testing import equality

# Program -> the numbers of ranks, and the modules that it needs, which the launcher imports once.
PROGRAMS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "nanogpt": ((1,), ()),
    "gan": ((1,), ()),
    "replay": ((1,), ()),
    "fsdp_meta": ((2,), ()),
    "tp": ((2,), ()),
    "zero": ((2,), ()),
    "hf_trainer": ((1, 2), ("transformers.trainer", "functional_ckpt.interop.trainer")),
    "hf_fsdp": ((2,), ("transformers.trainer", "functional_ckpt.interop.trainer")),
    "accelerate": ((1,), ("accelerate",)),
    "lightning": ((1, 2), ("lightning.pytorch", "functional_ckpt.interop.lightning")),
    "timm": ((1,), ("torchvision", "timm")),
    "ema": ((1,), ()),
    "torchao": ((1,), ("torchao.optim",)),
    "lora": ((1,), ("peft",)),
}
DEFAULT = ("gan-1", "replay-1")
CASES = [f"{name}-{n}" for name, (ranks, _) in PROGRAMS.items() for n in ranks]
NUM_MOMENTS = int(os.environ.get("RESUME_MOMENTS", "3" if IS_FULL else "1"))
MAX_STARTS = 4
SIGTERM_STEPS = {"lightning": (1, 3)}  # in epochs


class Launcher:
    """The process that forks the programs."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), *filter(None, sys.path)])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(here / "launcher.py")],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, case: str, root: Path, **environment: object) -> int:
        """Runs a program once; returns its exit code."""
        name, _, ranks = case.rpartition("-")
        root.mkdir(exist_ok=True)
        request = {
            "program": str(Path(__file__).parent / f"program_{name}.py"),
            "root": str(root),
            "num_ranks": int(ranks),
            "modules": PROGRAMS[name][1],
            "environment": {key: str(value) for key, value in environment.items()},
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.process.communicate()


def results(case: str, root: Path) -> list[Any] | None:
    """Returns the result of every rank; None until all ranks have finished."""
    paths = [root / f"result-{rank}" for rank in range(int(case.rpartition("-")[2]))]
    if not all(path.exists() for path in paths):
        return None
    return [torch.load(path, weights_only=False) for path in paths]


def interrupted(launcher: Launcher, case: str, root: Path, how: dict[str, object]) -> list[Any]:
    """Runs a program that is interrupted once, and then again until it comes to its end."""
    code = launcher.run(case, root, **how)
    assert results(case, root) is None, f"{how} did not interrupt it"
    assert (code == 0) == ("SIGTERM_AT" in how), (root / "log").read_text()[-3000:]
    for _ in range(MAX_STARTS):
        code = launcher.run(case, root)
        assert code == 0, (root / "log").read_text()[-3000:]
        if (found := results(case, root)) is not None:
            return found
    raise AssertionError("it does not come to its end")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_like_the_whole_one(
    launcher: Launcher, case: str, tmp_path: Path
) -> None:
    name, _, ranks = case.rpartition("-")
    if not IS_FULL and case not in DEFAULT:
        pytest.skip("with FUNCTIONAL_CKPT_FULL=1")
    for module in PROGRAMS[name][1]:
        if importlib.util.find_spec(package := module.partition(".")[0]) is None:
            pytest.skip(f"needs {package}")
    assert launcher.run(case, tmp_path / "whole") == 0, (tmp_path / "whole" / "log").read_text()[
        -3000:
    ]
    expected = results(case, tmp_path / "whole")
    assert expected is not None
    choose = random.Random(case)
    low, high = SIGTERM_STEPS.get(name, (1, 10))
    for moment in range(NUM_MOMENTS):
        rank = choose.randrange(int(ranks))
        num_writes = int((tmp_path / "whole" / f"writes-{rank}").read_text())
        for number, how in enumerate(
            (
                {"KILL_AT": choose.randint(num_writes // 4, num_writes - 4), "KILL_RANK": rank},
                {"SIGTERM_AT": choose.randint(low, high)},
            )
        ):
            got = interrupted(launcher, case, tmp_path / f"{moment}-{number}", how)
            assert equality.differences(got, expected) == [], how
