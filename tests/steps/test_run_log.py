"""The log of a run: steps that are gone, torn lines, its size, and that no save fails for it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt.steps import run_log
from functional_ckpt.storage.local import LocalStorage

KEEP = [fc.policies.LatestN(1), fc.policies.BestN(1, "loss", mode="min")]


def save(root: Path, steps: range, keep: object = KEEP) -> None:
    with fc.CheckpointManager(root, keep_policy=keep) as manager:  # pyright: ignore[reportArgumentType]
        for step in steps:
            items = {"x": torch.full((10,), float(step))}
            manager.save(step, items, metrics={"loss": float(abs(step - 2)), "odd": float("nan")})
            manager.wait_until_finished()


def logged(root: Path) -> list[run_log.PastStep]:
    return run_log.read(LocalStorage(), str(root / ".functional_ckpt"))


def test_a_pruned_step_is_remembered_with_its_facts(tmp_path: Path) -> None:
    save(tmp_path, range(5))
    found = logged(tmp_path)
    assert [(past.info.step, past.is_pruned) for past in found] == [
        (0, True), (1, True), (2, False), (3, True), (4, False),
    ]  # fmt: skip
    assert found[3].info.metrics == {"loss": 1.0}
    assert found[3].keep == ("LatestN(1)", "BestN(1, 'loss', mode='min')")
    assert [run_log.policy_of(text) for text in found[3].keep] == KEEP
    assert found[3].seconds is not None and found[3].seconds > 0
    files = [path for path in (tmp_path / "4").rglob("*") if path.is_file()]
    assert found[4].size_bytes == sum(path.stat().st_size for path in files)


def test_late_metrics_of_a_pruned_step_are_remembered(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path, keep_policy=fc.policies.BestN(1, "val")) as manager:
        for step, value in enumerate([3.0, 1.0, 2.0]):
            manager.save(step, {"x": torch.ones(1)})
            manager.record_metrics(step, {"val": value})
        manager.save(3, {"x": torch.ones(1)})
    found = {past.info.step: past for past in logged(tmp_path)}
    assert found[1].is_pruned and found[1].info.metrics == {"val": 1.0}


def test_torn_and_foreign_lines_are_ignored_and_the_next_line_is_whole(tmp_path: Path) -> None:
    save(tmp_path, range(1))
    log = tmp_path / ".functional_ckpt" / "history.jsonl"
    bad = [
        b"[1]",
        b'{"step": -1, "commit": 1, "metrics": {}}',
        b'{"step": 1}',
        b"\xff",
        b"[" * 9999,
    ]
    log.write_bytes(log.read_bytes() + b"\n".join(bad) + b'\n{"step": 99, "com')
    save(tmp_path, range(1, 3))
    assert [past.info.step for past in logged(tmp_path)] == [0, 1, 2]


def test_of_an_overwritten_step_the_last_commit_is_there(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with fc.CheckpointManager(tmp_path, overwrite=True) as manager:
            manager.save(1, {"x": torch.ones(1)}, metrics={"loss": value})
    assert [past.info.metrics for past in logged(tmp_path)] == [{"loss": 2.0}]


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "_MAX_BYTES", 200)
    save(tmp_path, range(9), keep=None)
    hidden = tmp_path / ".functional_ckpt"
    assert sum(path.stat().st_size for path in hidden.glob("history*")) < 2000
    assert [past.info.step for past in logged(tmp_path)][-2:] == [7, 8]


def test_a_log_that_cannot_be_written_fails_no_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".functional_ckpt" / "history.jsonl").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "functional_ckpt"):
        save(tmp_path, range(4))
    assert [text for text in caplog.messages if "reports lack steps" in text] == [
        each for each in caplog.messages if "history.jsonl" in each
    ]
    assert len(caplog.messages) == 1
    with fc.CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.all_steps() == [2, 3]


def test_a_pipe_in_place_of_the_log_blocks_no_save(tmp_path: Path) -> None:
    (tmp_path / ".functional_ckpt").mkdir()
    os.mkfifo(tmp_path / ".functional_ckpt" / "history.jsonl")
    metrics = {f"a metric of many {number}": 0.5 for number in range(5000)}  # too many for a pipe
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"tree": {"w": torch.zeros(3)}}, metrics=metrics)
    with fc.CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.all_steps() == [1]


@pytest.mark.parametrize(
    "text", ["print(1)", "LatestN(", "LatestN('x')", "Mine()", "__import__('os')", "LatestN(n=f())"]
)
def test_only_this_package_s_policies_are_made(text: str) -> None:
    assert run_log.policy_of(text) is None


def test_policies_are_shown_as_they_are_made() -> None:
    p = fc.policies
    made = [p.every("90m"), p.every(5), p.LatestN(), p.CustomSteps([3, 1]), p.LatestDuration("24h")]
    made += [
        p.EveryNSteps(10, max_to_keep=2),
        p.AtEnd(100),
        p.InitialSave(),
        p.CustomSteps(range(3)),
    ]
    assert [repr(each) for each in made] == [
        "every('1h30m')", "every(5)", "LatestN()", "CustomSteps([1, 3])", "LatestDuration('1d')",
        "EveryNSteps(10, max_to_keep=2)", "AtEnd('100ba')", "InitialSave()",
        "CustomSteps(range(0, 3))",
    ]  # fmt: skip
    assert len(repr(p.CustomSteps(list(range(1000))))) < 100
