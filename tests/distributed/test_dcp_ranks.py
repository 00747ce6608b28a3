"""PyTorch's distributed checkpoint API over steps, on several ranks: sharded, async, resharded."""

from __future__ import annotations

import os
from pathlib import Path

import dcp_jobs
import pytest
from full import IS_FULL
from gloo_workers import Workers

full_only = pytest.mark.skipif(not IS_FULL, reason="a full run has it")
RANKS = [2, pytest.param(4, marks=full_only)]


@pytest.mark.parametrize("is_async", [False, pytest.param(True, marks=full_only)])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_fsdp_resumes_on_any_number_of_ranks(
    num_ranks: int, is_async: bool, workers: Workers, tmp_path: Path
) -> None:
    saved = workers.run(num_ranks, dcp_jobs.save, str(tmp_path), is_async)
    assert os.listdir(tmp_path) == ["1"]
    for ranks in (1, num_ranks, 4) if IS_FULL else (1,):
        loaded = workers.run(ranks, dcp_jobs.load, str(tmp_path))
        assert loaded[0] == saved[0]


@pytest.mark.parametrize("num_ranks", RANKS)
def test_every_sharding_is_loaded_in_every_other(
    num_ranks: int, workers: Workers, tmp_path: Path
) -> None:
    for equal in workers.run(num_ranks, dcp_jobs.reshard, str(tmp_path)):
        assert len(equal) == 98
        assert all(equal)


@full_only
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_with_keys_of_their_own(num_ranks: int, workers: Workers, tmp_path: Path) -> None:
    (items, *_) = workers.run(num_ranks, dcp_jobs.stages, str(tmp_path))
    layers = [f"layer{rank}" for rank in range(num_ranks)]
    assert items == {"model": [*layers, "shared"]} | {
        f"only{rank}": ["rank"] for rank in range(num_ranks)
    }


@full_only
def test_a_process_group_saves_alone(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(4, dcp_jobs.subgroup, str(tmp_path)) == [[4.0, 4.0]] * 4


def test_a_failing_rank_leaves_nothing(workers: Workers, tmp_path: Path) -> None:
    for text in workers.run(2, dcp_jobs.failing, str(tmp_path)):
        assert "no data" in text
    assert os.listdir(tmp_path) == []
