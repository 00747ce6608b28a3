"""Modules, optimizers and generators inside one item, and stateful objects with DTensors."""

from __future__ import annotations

from pathlib import Path

import nested_jobs
import pytest
from gloo_workers import Workers

import functional_ckpt as fc


def test_one_item_of_all(workers: Workers, tmp_path: Path) -> None:
    saved = workers.run(2, nested_jobs.save_nested, tmp_path)
    assert saved[0][1] != saved[1][1]  # each rank's own generator
    assert workers.run(2, nested_jobs.restore_nested, tmp_path, False, True) == saved
    # On the meta device, optimizers before their modules.
    assert workers.run(2, nested_jobs.restore_nested, tmp_path, True, True) == saved


def test_generators_need_as_many_ranks(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, nested_jobs.save_nested, tmp_path)
    for failure in workers.failures(1, nested_jobs.restore_nested, tmp_path, False, True):
        assert "MismatchError" in failure.kinds
        assert "all['state']['rng']: " in failure.text and "2 ranks" in failure.text
    workers.run(1, nested_jobs.restore_nested, tmp_path, False, False)
    plain = fc.restore(tmp_path / "2")["all"]
    assert plain["state"]["rng"].keys() == {"rank_0", "rank_1"}


@pytest.mark.parametrize("low_bit", [False, True], ids=["AppState", "low-bit"])
def test_state_comes_back_in_its_sharding(low_bit: bool, workers: Workers, tmp_path: Path) -> None:
    first, second = workers.run(2, nested_jobs.app_state, tmp_path, low_bit)
    assert first == second
    if low_bit:
        for failure in workers.failures(1, nested_jobs.restore_low_bit, tmp_path):
            assert "MismatchError" in failure.kinds and "mesh of [1]" in failure.text
