"""torchtitan's containers are items: restored in their sharding, and the run resumes exactly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import titan_jobs
from gloo_workers import Workers

if os.environ.get("FUNCTIONAL_CKPT_FULL") != "1":
    pytest.skip("a full run has it", allow_module_level=True)
pytest.importorskip("torchtitan")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(
    num_ranks: int, workers: Workers, tmp_path: Path
) -> None:
    directory = str(tmp_path / "run")
    expected = workers.run(num_ranks, titan_jobs.uninterrupted, directory)
    assert workers.run(num_ranks, titan_jobs.resumed, directory) == expected
    whole = [workers.run(ranks, titan_jobs.resharded, directory) for ranks in (1, 2)]
    assert whole[0][0] == whole[1][0] == whole[1][1]
