"""`AtEnd` saves the last step of a training, once, whatever counts its length."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors, policies
from functional_ckpt.policies import save_rules

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def info(step: int, progress: fc.Progress | None = None) -> policies.StepInfo:
    return policies.StepInfo(step=step, time=NOW, progress=progress)


def run(
    policy: policies.AtEnd, counted: Sequence[fc.Progress], until: int | None = None
) -> list[int]:
    """Returns the steps that are saved of a training that passes these counts to `save`."""
    saved: list[policies.StepInfo] = []
    for step, progress in enumerate(counted):
        here = info(step, progress)
        if policy.should_save(here, saved, context=policies.SaveContext()):
            saved.append(here)
    return [each.step for each in saved]


@pytest.mark.parametrize("length", [10, "10ba"])
def test_a_length_in_steps_saves_the_last_of_a_range(length: int | str) -> None:
    policy = policies.AtEnd(length)
    assert [step for step in range(20) if policy.fires_at(step)] == [9, 10]
    rule = save_rules.save_rule([policies.every(4), policy])
    assert rule.step_only
    assert [step for step in range(10) if rule.decide_step(step)] == [0, 4, 8, 9]


def epochs(max_duration: str | None = None) -> list[fc.Progress]:
    progress = fc.Progress(max_duration=max_duration)
    counted: list[fc.Progress] = []
    for _ in range(4):
        for _ in range(3):
            progress = progress.next_batch(tokens=10, seconds=1.0)
            counted.append(progress)
        progress = progress.next_epoch()
    return counted


@pytest.mark.parametrize(
    ("length", "max_duration", "last"),
    [("2ep", None, 6), ("60tok", None, 5), ("6s", None, 5), (None, "2ep", 6), (None, "60tok", 5)],
)
def test_a_length_in_progress_saves_the_first_step_that_reaches_it(
    length: str | None, max_duration: str | None, last: int
) -> None:
    assert run(policies.AtEnd(length), epochs(max_duration)) == [last]


def test_a_resumed_training_does_not_save_its_end_again() -> None:
    counted = epochs()
    policy = policies.AtEnd("60tok")
    saved = [info(5, counted[5])]
    context = policies.SaveContext()
    assert not policy.should_save(info(6, counted[6]), saved, context=context)
    assert policy.should_save(info(6, counted[6]), [info(4)], context=context)


def test_without_progress_or_a_length_it_says_what_is_missing() -> None:
    for policy in (policies.AtEnd("2ep"), policies.AtEnd()):
        with pytest.raises(errors.UsageError, match=r"AtEnd.*expected the training's progress"):
            run(policy, [None])
    with pytest.raises(errors.UsageError, match="max_duration"):
        run(policies.AtEnd(), [fc.Progress()])
    with pytest.raises(errors.UsageError, match="more than zero"):
        policies.AtEnd(0)


def test_a_manager_saves_the_last_step(tmp_path: Path) -> None:
    save_policy = [policies.every(4), policies.AtEnd(10)]
    with fc.CheckpointManager(tmp_path, save_policy=save_policy) as manager:
        for step in range(10):
            manager.save(step, {"state": {"w": torch.full((3,), step)}})
        manager.wait_until_finished()
        assert manager.all_steps() == [0, 4, 8, 9]
