"""FSDP1's flat pieces are refused, or saved the ways that the errors name; groups of stages."""

from __future__ import annotations

from pathlib import Path

import fsdp1_jobs
import pytest
from gloo_workers import Workers

import functional_ckpt as fc


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flattened_optimizer_state_is_refused_on_every_rank(
    use_orig_params: bool, workers: Workers, tmp_path: Path
) -> None:
    for found in workers.run(2, fsdp1_jobs.refused, tmp_path, use_orig_params):
        assert len(found) == 4
        for text in found[:2]:
            assert text.startswith("UsageError: The optimizer updates parameters that Fully")
        for text in found[2:]:
            assert text.startswith("CoordinationError: o.")
            assert "rank 0" in text and "rank 1" in text and "per_rank=True" in text


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_training_under_fsdp1_goes_on_with_the_state_that_it_gathers(
    use_orig_params: bool, workers: Workers, tmp_path: Path
) -> None:
    assert workers.run(2, fsdp1_jobs.goes_on, tmp_path, use_orig_params) == [True, True]
    assert fc.restore(tmp_path / "0")["optimizer"]["state"]["0.weight"]["exp_avg"].shape == (8, 8)


def test_flat_pieces_come_back_to_their_ranks(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(2, fsdp1_jobs.own_pieces, tmp_path) == [True, True]


def test_stages_whose_optimizers_have_other_groups_are_told_to_add_empty_ones(
    workers: Workers, tmp_path: Path
) -> None:
    for failure in workers.failures(2, fsdp1_jobs.save_stage, tmp_path / "a", False):
        assert "optimizer.param_groups: rank 0 holds" in failure.text.replace("['", ".").replace(
            "']", ""
        )
        assert "add an empty group" in failure.text
    workers.run(2, fsdp1_jobs.save_stage, tmp_path / "b", True)
    groups = fc.restore(tmp_path / "b" / "0")["optimizer"]["param_groups"]
    assert [group["params"] for group in groups] == [
        ["layer0.weight", "layer1.weight"],
        ["layer1.bias"],
    ]
