"""torchrun keeps one store for all attempts to run a job: keys of killed ranks mislead none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import restarted
from full import IS_FULL

import functional_ckpt as fc


@pytest.mark.skipif(not IS_FULL, reason="torchrun, and attempts in which gloo itself fails")
def test_ranks_meet_after_an_attempt_that_one_did_not_survive(tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", "--max-restarts=8", restarted.__file__, str(tmp_path / "run")),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout
    assert "did not reach" not in run.stdout, run.stdout
    with fc.CheckpointManager(tmp_path / "run") as manager:
        assert manager.all_steps() == list(range(restarted.NUM_STEPS))
