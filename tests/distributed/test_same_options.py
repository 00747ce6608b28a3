"""Options that must be equal on all ranks are compared on opening; errors reach all ranks."""

from __future__ import annotations

import pickle
from pathlib import Path

import option_jobs
import pytest
import torch
from gloo_workers import Workers

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.distributed import remote_errors


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_managers_made_differently_are_refused_at_once_on_every_rank(
    num_ranks: int, workers: Workers, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for found in workers.run(num_ranks, option_jobs.open_all, tmp_path):
        assert tuple(found) == option_jobs.NAMES
        for name, text in found.items():
            option = name.partition(" ")[0]
            assert text.startswith(f"({num_ranks - 1},) Rank {num_ranks - 1} has {option}="), text
            assert "every rank must pass the same arguments" in text
    assert not (tmp_path / "far").exists()


def test_equal_options_of_two_processes_are_equal(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(2, option_jobs.open_alike, tmp_path) == [[0, 1, 2]] * 2


def test_ranks_that_open_different_directories_are_refused(
    workers: Workers, tmp_path: Path
) -> None:
    for failure in workers.failures(2, option_jobs.save_elsewhere, tmp_path):
        assert "CoordinationError" in failure.kinds
        assert "Rank 1 cannot see" in failure.text


def test_ranks_that_see_different_directories_at_a_save_are_refused(
    workers: Workers, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for failure in workers.failures(2, option_jobs.save_moved, tmp_path):
        assert "SaveError" in failure.kinds
        assert "Rank 1 cannot see" in failure.text
    with fc.CheckpointManager(tmp_path / "run", read_only=True) as manager:
        assert manager.all_steps() == []


def test_a_mismatch_of_one_rank_is_raised_as_such_on_all_at_once(
    workers: Workers, tmp_path: Path
) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(0, {"t": {"a": torch.ones(3), "b": torch.ones(3)}})
    (kind, seconds, report), other = workers.run(2, option_jobs.restore_mismatched, tmp_path, True)
    assert kind == "MismatchError True"
    assert "(1,)" in report
    assert other[0] == "MismatchError False"
    assert "t['b']: the target expects tensor float32[4]" in report
    assert "t['b']: the target expects tensor float32[4]" in other[2]
    assert max(seconds, other[1]) < option_jobs.SECONDS / 2


def test_calls_with_other_arguments_are_refused_at_once_on_every_rank(
    workers: Workers, tmp_path: Path
) -> None:
    found = workers.run(2, option_jobs.ask_differently, tmp_path / "run")
    for outcomes in zip(*found, strict=True):
        assert all(each != "done" for each in outcomes), outcomes
        assert any(each.split()[1] == "True" for each in outcomes), outcomes
    assert "Rank 1 has step=0, rank 0 has 1: every rank must pass the same" in found[0][0]
    assert "Rank 1 has on_corrupt='older', rank 0 has 'raise'" in found[1][13]
    assert "Rank 1 has strict=False, rank 0 has the default" in found[1][2]
    assert "UsageError: progress must be an fc.Progress or None; got 3." in found[0][19]


@pytest.mark.parametrize(
    "kind", [each for name in errors.__all__ if isinstance(each := getattr(errors, name), type)]
)
def test_an_error_of_another_rank_is_of_its_class(kind: type[errors.CheckpointError]) -> None:
    original = kind("why", step=3, path="/p", key_path="a.b")
    record = remote_errors.to_record(original)
    error = remote_errors.rebuild(record, "Rank 1 failed: why", [1])
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert isinstance(each, kind) and isinstance(each, errors.CoordinationError)
        assert (str(each), each.ranks) == ("Rank 1 failed: why", (1,))
        assert (each.step, each.path, each.key_path) == (3, "/p", "a.b")
    assert remote_errors.to_record(error)["ranks"] == [1]


def test_any_other_error_of_another_rank_is_a_coordination_error() -> None:
    record = remote_errors.to_record(ZeroDivisionError("why"))
    assert type(remote_errors.rebuild(record, "w", [1])) is errors.CoordinationError
