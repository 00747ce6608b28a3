"""Steps that may be removed after a commit, for any policies, numbers and clocks."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import pytest

from functional_ckpt import policies
from functional_ckpt.policies import lines
from functional_ckpt.policies.base import KeepContext, StepInfo
from functional_ckpt.policies.keep_rules import (
    decide_keep,
    keep_policies,
    steps_to_prune,
    steps_to_prune_after,
    with_plausible_times,
)

START = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
YEAR = 365 * 86_400


def at(step: int, seconds: float = 0, generation: int = 0, **fields: Any) -> StepInfo:
    time = START + datetime.timedelta(seconds=seconds)
    return StepInfo(step=step, time=time, generation=generation, **fields)


def left(
    committed: int | None, policy: Any, history: Sequence[StepInfo], now: float = 1000
) -> list[int]:
    context = KeepContext(now=START + datetime.timedelta(seconds=now))
    marked = lines.marked(history)
    gone = steps_to_prune_after(committed, keep_policies(policy), marked, context=context)
    return [info.step for info in history if info.step not in gone]


NAN = {"acc": float("nan")}
FIRST = [at(step, step) for step in (10, 20, 30, 40, 50)]
BACK = [at(11, 61, 1, ancestors=((0, 10),)), at(12, 62, 1, ancestors=((0, 10),))]
BOTH = sorted([*FIRST, *BACK], key=lambda info: info.step)


@pytest.mark.parametrize(
    ("committed", "policy", "history", "kept"),
    [
        # The step that was committed has a low number, a bad metric or no metric.
        (3, policies.LatestN(1), [at(3, 9), at(500, 1), at(600, 2)], [3, 600]),
        (
            3,
            policies.BestN(1, "acc"),
            [at(1, 1, metrics={"acc": 1}), at(3, 2, metrics=NAN)],
            [1, 3],
        ),
        (2, policies.CustomSteps([]), [at(1, 1), at(2, 3), at(3, 2)], [2, 3]),
        # Nothing was committed: the last one by the clock stays.
        (None, policies.LatestN(1), [at(3, 9), at(500, 1), at(600, 2)], [3, 600]),
        # Abandoned steps do not displace others.
        (12, policies.LatestN(1), BOTH, [12, 50]),
        (12, policies.LatestN(2), BOTH, [11, 12, 40, 50]),
        (12, policies.LatestN(3), BOTH, [10, 11, 12, 30, 40, 50]),
        (12, policies.EveryNSteps(20), BOTH, [12, 20, 40]),
        (12, [], BOTH, [10, 11, 12, 20, 30, 40, 50]),
        (12, policies.LatestDuration("5s"), BOTH, [12]),
    ],
)
def test_steps_kept_after_a_commit(
    committed: int | None, policy: Any, history: list[StepInfo], kept: list[int]
) -> None:
    assert left(committed, policy, history) == kept


def test_a_policy_can_let_every_abandoned_step_go() -> None:
    class PresentOnly:
        def should_preserve(
            self, checkpoints: Sequence[StepInfo], /, *, context: KeepContext
        ) -> list[bool]:
            del context
            return [not info.is_abandoned for info in checkpoints]

    assert left(12, PresentOnly(), BOTH) == [10, 11, 12]


@pytest.mark.parametrize(
    ("history", "times"),
    [
        ([], []),
        ([at(1, 1), at(2, 2), at(3, 3)], [1, 2, 3]),
        ([at(1, 1), at(2, YEAR), at(3, 3)], [1, 1, 3]),  # from the future
        ([at(1, 1), at(2, 2), at(3, -YEAR), at(4, 4)], [1, 2, 2, 4]),  # a clock that was reset
        ([at(1, 1), at(2, 500), at(3, 3), at(4, 4)], [1, 1, 3, 4]),  # ahead for a while
        ([at(1, YEAR), at(2, 2)], [2, 2]),
        ([at(1, YEAR), at(2, 2), at(3, 3)], [2, 2, 3]),
        ([at(1, YEAR), at(2, YEAR)], [1000, 1000]),
        ([at(1, 1), at(5, 9, 1), at(7, 7)], [1, 9, 7]),  # a later generation has lower numbers
    ],
)
def test_times_that_contradict_the_others_are_replaced(
    history: list[StepInfo], times: list[float]
) -> None:
    now = START + datetime.timedelta(seconds=1000)
    plausible = with_plausible_times(history, now)
    assert [(info.time - START).total_seconds() for info in plausible] == times


def test_a_wrong_clock_makes_an_interval_lose_no_steps() -> None:
    policy = policies.EveryNSeconds(10)
    history = [at(1, 0), at(2, YEAR), *(at(step, 3 * step) for step in range(3, 20))]
    assert left(19, policy, history) == [1, 2, 4, 8, 12, 16, 19]
    ahead = [at(1, 0), at(2, 600), *(at(step, 3 * step) for step in range(3, 20))]
    assert left(19, policy, ahead, now=100) == left(19, policy, ahead, now=5000)


def test_protected_steps_stay() -> None:
    context = KeepContext(now=START)
    ready = keep_policies(policies.LatestN(1))
    kept = decide_keep(ready, FIRST, context=context, protected=(20,))
    assert kept == (False, True, False, False, True)
    assert steps_to_prune(ready, FIRST, context=context, protected=(20,)) == (10, 30, 40)
