"""Save and keep policies by themselves: pure, stateless, and without a way to lose the newest."""

from __future__ import annotations

import datetime
import math
import operator
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt import policies
from functional_ckpt.errors import UsageError
from functional_ckpt.policies.base import KeepContext, SaveContext, SavePolicy, StepInfo, StepPolicy
from functional_ckpt.policies.keep import rank_steps
from functional_ckpt.policies.keep_rules import AnyKeep, decide_keep, keep_policies, steps_to_prune
from functional_ckpt.policies.progress import Progress
from functional_ckpt.policies.save import ElapsedInterval, ProgressInterval
from functional_ckpt.policies.save_rules import AnySave, decide_save, save_rule
from functional_ckpt.policies.timespan import Timespan

START = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
NOW = KeepContext(now=START)
QUIET = SaveContext()


def at(
    step: int,
    seconds: float = 0,
    metrics: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> StepInfo:
    time = START + datetime.timedelta(seconds=seconds)
    return StepInfo(step=step, time=time, metrics=metrics, progress=progress)


def reached(amount: float, unit: str = "epoch") -> Progress:
    """A training of 20 batches an epoch, or of 100 in all, that is so far."""
    if unit == "duration":
        return Progress(batch=round(amount * 1000), max_duration="1000ba")
    if unit == "epoch":
        return Progress(
            epoch=int(amount),
            batch=round(amount * 20),
            batch_in_epoch=round(amount % 1 * 20),
            batches_per_epoch=20,
        )
    return Progress(**{unit: int(amount)})


def saves(
    policy: SavePolicy,
    step: StepInfo,
    history: Sequence[StepInfo] = (),
    context: SaveContext = QUIET,
) -> bool:
    return policy.should_save(step, history, context=context)


# Records


@pytest.mark.parametrize("step", [-1, True, 1.0, None])
def test_a_step_is_a_natural_number(step: int) -> None:
    with pytest.raises(UsageError, match="step: expected an int of at least 0; got"):
        StepInfo(step=step, time=START)


def test_policy_times_without_zone_are_refused() -> None:
    naive = datetime.datetime(2025, 1, 1)
    for build in (
        lambda: StepInfo(step=1, time=naive),
        lambda: SaveContext(start_time=naive),
        lambda: KeepContext(now=naive),
    ):
        with pytest.raises(UsageError, match="expected a datetime with a time zone"):
            build()
    with pytest.raises(UsageError, match="expected a datetime with a time zone; got 3"):
        KeepContext(now=3)  # type: ignore[arg-type]


# Save policies


def test_every_so_many_steps() -> None:
    for policy in (policies.every(500), policies.every("500ba"), policies.every("5e2BA")):
        assert policy == policies.FixedInterval(500)
        assert isinstance(policy, StepPolicy)
        fired = [step for step in range(1501) if saves(policy, at(step))]
        assert fired == [0, 500, 1000, 1500]
        assert fired == [step for step in range(1501) if policy.fires_at(step)]


def test_specific_steps_saves_only_these() -> None:
    for steps in ([3, 7], (3, 7), range(3, 8, 4), iter([3, 7])):
        policy = policies.SpecificSteps(steps)
        assert isinstance(policy, StepPolicy)
        assert [step for step in range(10) if policy.fires_at(step)] == [3, 7]
        assert [step for step in range(10) if saves(policy, at(step))] == [3, 7]
    assert policies.SpecificSteps([1, 2]) == policies.SpecificSteps([2, 1])


def test_initial_save_saves_only_without_steps() -> None:
    assert saves(policies.InitialSave(), at(7))
    assert not saves(policies.InitialSave(), at(7), [at(3)])


def test_preemption_saves_only_after_sigterm() -> None:
    assert not saves(policies.Preemption(), at(7))
    assert saves(policies.Preemption(), at(7), context=SaveContext(reached_preemption=True))


def test_continuous_saves_unless_a_save_is_in_progress() -> None:
    policy = policies.Continuous()
    rule = save_rule([policy, "10s"])
    assert rule.ignores_step and rule.shortest_seconds == 0
    for busy in (False, True):
        context = SaveContext(is_saving_in_progress=busy)
        assert saves(policy, at(3), [at(2)], context) is not busy


def test_when_saves_the_steps_that_its_function_accepts() -> None:
    policy = policies.When(lambda info: info.step > 5)
    assert saves(policy, at(6)) is True
    assert saves(policy, at(5)) is False


@pytest.mark.parametrize(
    ("now", "history", "start", "expected"),
    [
        (0, [], None, True),  # no step, and no start time
        (59, [], 0, False),
        (60, [], 0, True),
        (60, [at(1, 0)], None, True),
        (59.999, [at(1, 0)], None, False),
        (600, [at(1, 0)], 590, False),  # resumed ten seconds ago: no save at the first step
        (650, [at(1, 0)], 590, True),
        (100, [at(1, 90), at(2, 0)], None, False),  # an older step was overwritten lately
        (100, [at(1, 0), at(2, 5000)], None, True),  # the clock was set back: the future is no past
        (100, [at(1, 70), at(2, 5000)], None, False),
        (100, [at(1, 0)], 5000, True),
    ],
)
def test_every_so_many_seconds(
    now: float, history: list[StepInfo], start: float | None, expected: bool
) -> None:
    context = SaveContext(start_time=None if start is None else at(0, start).time)
    for interval in ("60s", "1m", "60SEC", datetime.timedelta(minutes=1)):
        assert saves(policies.every(interval), at(9, now), history, context) is expected


@given(st.lists(st.floats(0.01, 50), max_size=60), st.sampled_from(["10s", "1m", "0.5s"]))
def test_elapsed_time_saves_neither_early_nor_late(gaps: list[float], interval: str) -> None:
    policy = policies.every(interval)
    assert isinstance(policy, ElapsedInterval)
    seconds = policy.interval.value
    history: list[StepInfo] = []
    now, last = 0.0, None
    for step, gap in enumerate(gaps):
        now += gap
        info = at(step, now)
        due = last is None or (info.time - last).total_seconds() >= seconds
        assert saves(policy, info, history) is due
        if due:
            history.append(info)
            last = info.time


def _run(interval: str, progress: Sequence[float], restart_at: int | None = None) -> list[int]:
    """The steps that a training saves; a restarted one has new policy objects, the same history."""
    policy = policies.every(interval)
    assert isinstance(policy, ProgressInterval)
    history: list[StepInfo] = []
    for step, amount in enumerate(progress):
        if step == restart_at:
            policy = policies.every(interval)
        info = at(step, progress=reached(amount, policy.interval.unit))
        if saves(policy, info, history):
            history.append(info)
    return [info.step for info in history]


@pytest.mark.parametrize(
    ("interval", "progress", "expected"),
    [
        ("1ep", [0, 0, 0, 1, 1, 1, 2, 2], [3, 6]),
        ("1ep", [0.0, 0.4, 0.8, 1.2, 1.6, 2.0], [3, 5]),
        ("2ep", [0, 1, 2, 3, 4, 5], [2, 4]),
        ("0.5ep", [0.0, 0.25, 0.5, 0.75, 1.0], [2, 4]),
        ("1e3tok", [0, 999, 1000, 1001, 3500, 3999, 4000], [2, 4, 6]),
        ("100sp", [64, 128, 192, 256], [1, 3]),
        ("2iter", [0, 1, 2, 3], [2]),
        ("0.1dur", [step / 10 for step in range(11)], list(range(1, 11))),
        ("1dur", [0, 0.5, 0.999, 1.0], [3]),
    ],
)
def test_every_so_much_progress(interval: str, progress: list[float], expected: list[int]) -> None:
    assert _run(interval, progress) == expected
    for restart in range(len(progress)):
        assert _run(interval, progress, restart) == expected


@given(st.lists(st.integers(0, 40), max_size=50), st.integers(1, 60))
def test_every_boundary_of_progress_is_saved_once(gains: list[int], interval: int) -> None:
    tokens = [sum(gains[: index + 1]) for index in range(len(gains))]
    saved = _run(f"{interval}tok", tokens)
    reached = [tokens[step] // interval for step in saved]
    assert reached == sorted(set(reached))
    assert set(reached) == {amount // interval for amount in tokens} - {0}


def test_progress_after_a_rollback_and_without_memory() -> None:
    policy = policies.every("1ep")
    history = [at(10, progress=reached(1)), at(20, progress=reached(2))]
    # Went back to step 10 and on: step 20 belongs to another run of the steps.
    assert not saves(policy, at(15, progress=reached(1.5)), history)
    assert saves(policy, at(18, progress=reached(2)), history)
    assert not saves(policy, at(20, progress=reached(2)), history)
    # A step saved before anyone reported progress.
    assert saves(policy, at(15, progress=reached(1)), [at(10)])
    assert not saves(policy, at(15, progress=reached(0)), [at(10)])


@pytest.mark.parametrize(
    ("interval", "progress", "message"),
    [
        ("1ep", None, "epoch units with step 7; got none. Pass save(progress=fc.Progress(...))"),
        (
            "5tok",
            Progress(batch=3, sample=96),
            "token units with step 7; got batch=3, sample=96. Count them, "
            "progress.next_batch(tokens=...)",
        ),
        (
            "1sp",
            Progress(batch=1, token=5),
            "sample units with step 7; got batch=1, token=5. Count them, "
            "progress.next_batch(samples=...)",
        ),
        (
            "0.1dur",
            Progress(),
            "duration units with step 7; got no count. Say how long it is, "
            "fc.Progress(max_duration=...)",
        ),
    ],
)
def test_missing_progress_raises(interval: str, progress: Progress | None, message: str) -> None:
    message = (
        f"every({interval!r}): expected the training's progress in {message}, "
        "or save at an interval of steps or seconds"
    )
    with pytest.raises(UsageError, match=rf"^{re.escape(message)}\.$") as caught:
        saves(policies.every(interval), at(7, progress=progress))
    assert caught.value.step == 7


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: policies.every(0), "interval in steps: expected an int of at least 1; got 0"),
        (lambda: policies.every("0ep"), "interval: expected more than zero; got 0ep"),
        (lambda: policies.every("0s"), "interval: expected more than zero; got 0sec"),
        (lambda: policies.every("2dur"), "expected at most the entire training, 1dur; got 2dur"),
        (lambda: policies.every("1e30sec"), "expected a time below a million years; got"),
        (lambda: policies.every("often"), "time span: expected a whole number of batches"),
        (lambda: policies.every(-5), "expected a finite number, zero or more; got -5"),
        (lambda: policies.FixedInterval(2.0), "expected an int of at least 1; got 2.0"),
        (lambda: policies.FixedInterval(True), "expected an int of at least 1; got True"),
        (lambda: policies.SpecificSteps([1, -2]), "steps to save: expected ints, zero or more"),
        (lambda: policies.SpecificSteps(range(5, -5, -1)), "zero or more; got -4 among them"),
        (lambda: policies.SpecificSteps("12"), "steps to save: expected ints"),
        (lambda: policies.SpecificSteps(7), "steps to save: expected several ints; got 7"),
        (lambda: policies.When(7), r"When: expected a function of a StepInfo; got 7"),
        (lambda: ElapsedInterval(Timespan(1, "epoch")), "expected a Timespan in second; got"),
        (lambda: ProgressInterval(Timespan(1, "second")), "expected a Timespan in iteration or"),
        (lambda: policies.LatestN(-1), "n of LatestN: expected an int of at least 1"),
        (lambda: policies.LatestN(True), "n of LatestN: expected an int of at least 1"),
        (lambda: policies.LatestDuration("3ep"), "duration: expected a wall-clock time above zero"),
        (lambda: policies.LatestDuration("0s"), "duration: expected a wall-clock time above zero"),
        (lambda: policies.EveryNSteps(0), "interval_steps: expected an int of at least 1; got 0"),
        (lambda: policies.EveryNSteps(5, max_to_keep=0), "max_to_keep of EveryNSteps: expected an"),
        (lambda: policies.EveryNSeconds(0), "expected a number of seconds above zero; got 0"),
        (lambda: policies.EveryNSeconds(math.nan), "number of seconds above zero; got nan"),
        (lambda: policies.EveryNSeconds("60"), "number of seconds above zero; got '60'"),
        (
            lambda: policies.CustomSteps([1.5]),
            "steps to keep: expected ints, zero or more; got 1.5",
        ),
        (lambda: policies.BestN(0, "acc"), "n of BestN: expected an int of at least 1"),
        (lambda: policies.BestN(1, "acc", mode="best"), "mode: expected 'max' or 'min'; got 'be"),
        (lambda: policies.BestN(1, 7), "metric: expected a key or a function of all metrics; got"),
        (lambda: policies.BestN(1, lambda a, b: 0), "expected a function of one argument"),
    ],
)
def test_orbax_policies_that_need_jax_are_refused(build: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()


# Several save policies


def test_a_rule_decides_by_the_step_where_it_can() -> None:
    alone = save_rule(policies.every(3))
    assert alone.step_only
    assert [alone.decide_step(step) for step in range(4)] == [True, False, False, True]
    mixed = save_rule([policies.Preemption(), policies.every(3), policies.SpecificSteps([1])])
    assert not mixed.step_only
    assert [mixed.decide_step(step) for step in range(4)] == [True, True, None, True]


def test_a_list_saves_if_any_does_and_says_which() -> None:
    every, preemption = policies.every(3), policies.Preemption()
    rule = save_rule([every, (preemption, AnySave((policies.InitialSave(),)))])
    assert rule.policies == (every, preemption, policies.InitialSave())
    preempted = SaveContext(reached_preemption=True)
    assert decide_save(rule, at(3), [at(0)], context=preempted) is every
    assert decide_save(rule, at(4), [at(0)], context=preempted) is preemption
    assert decide_save(rule, at(4), [], context=QUIET) == policies.InitialSave()
    assert decide_save(rule, at(4), [at(0)], context=QUIET) is None
    assert AnySave(rule.policies).should_save(at(4), [], context=QUIET)
    assert not AnySave(rule.policies).should_save(at(4), [at(0)], context=QUIET)


def test_no_save_policy_never_saves() -> None:
    rule = save_rule([])
    assert rule.step_only
    assert rule.decide_step(0) is False
    assert decide_save(rule, at(0), [], context=QUIET) is None


class _Mine:
    """A custom policy that does not declare its inputs."""

    def should_save(
        self, step: StepInfo, previous_steps: Sequence[StepInfo], *, context: SaveContext
    ) -> bool:
        return step.step == 5


class _Half(_Mine):
    step_only = True


def test_a_users_own_policy_is_asked_with_everything() -> None:
    rule = save_rule(_Mine())
    assert rule.decide_step(5) is None
    assert decide_save(rule, at(5), [], context=QUIET) is rule.policies[0]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([True], r"^save_policy\[0\]: expected a save policy or a list of them; got True\.$"),
        ([_Mine(), [None]], r"^save_policy\[1\]\[0\]: expected a save policy or a list of them; g"),
        (
            policies.Preemption,
            r"expected a save policy, an instance such as Preemption\(...\); got",
        ),
        (policies.LatestN(3), r"\(this one belongs in keep_policy\); got LatestN\(3\)"),
        (lambda step: True, r"expected a save policy, such as When\(function\); got"),
        (
            _Half(),
            r"expected `fires_at\(step\)` of a policy whose `step_only` is true; .* has none",
        ),
    ],
)
def test_save_rule_refuses_other_objects(policy: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        save_rule(policy)


# Keep policies


def _kept(policy: Any, history: Sequence[StepInfo], context: KeepContext = NOW) -> list[int]:
    """The steps that a policy keeps, without the protection of the newest."""
    answers = policy.should_preserve(history, context=context)
    return [info.step for info, keep in zip(history, answers, strict=True) if keep]


HISTORY = [at(step, seconds=10 * step) for step in (0, 3, 5, 8, 10, 20)]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (policies.LatestN(), [0, 3, 5, 8, 10, 20]),
        (policies.LatestN(1), [20]),
        (policies.LatestN(2), [10, 20]),
        (policies.LatestN(99), [0, 3, 5, 8, 10, 20]),
        (policies.PreserveAll(), [0, 3, 5, 8, 10, 20]),
        (policies.EveryNSteps(5), [0, 5, 10, 20]),
        (policies.EveryNSteps(5, max_to_keep=2), [10, 20]),
        (policies.EveryNSteps(4, exact_interval=False), [0, 5, 10, 20]),
        (policies.EveryNSteps(6, exact_interval=False, max_to_keep=1), [20]),
        (policies.EveryNSeconds(30), [0, 3, 8, 20]),
        (policies.EveryNSeconds(30.5), [0, 5, 10, 20]),
        (policies.CustomSteps([3, 4, 8]), [3, 8]),
        (policies.CustomSteps(range(0, 100, 10)), [0, 10, 20]),
        (policies.CustomSteps([]), []),
    ],
)
def test_keep_policies_keep_the_expected_steps(policy: Any, kept: list[int]) -> None:
    assert _kept(policy, HISTORY) == kept
    assert _kept(policy, []) == []


def test_latest_duration_goes_by_the_clock_it_is_given() -> None:
    for duration in ("100s", datetime.timedelta(seconds=100)):
        policy = policies.LatestDuration(duration)
        for now, kept in [(200, [10, 20]), (180, [8, 10, 20]), (300, [20]), (301, [])]:
            assert _kept(policy, HISTORY, KeepContext(now=at(0, now).time)) == kept


def _measured(*values: Any) -> list[StepInfo]:
    return [
        at(step, metrics=None if value is None else {"acc": value})
        for step, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "policy", "kept"),
    [
        ((0.9, 0.1, 0.5), policies.BestN(1, "acc"), [0]),
        ((0.9, 0.1, 0.5), policies.BestN(2, "acc"), [0, 2]),
        ((0.9, 0.1, 0.5), policies.BestN(1, "acc", mode="min"), [1]),
        ((0.9, math.nan, 0.1), policies.BestN(1, "acc"), [0]),
        ((0.9, math.nan, 0.1), policies.BestN(1, "acc", mode="min"), [2]),
        ((0.9, math.nan, 0.1), policies.BestN(2, "acc"), [0, 2]),
        ((math.nan, math.nan), policies.BestN(1, "acc"), [1]),
        ((None, 0.1, None), policies.BestN(1, "acc"), [1]),
        ((None, 0.1, None), policies.BestN(2, "acc"), [1, 2]),
        ((None, 0.1, None, 0.3), policies.BestN(1, "acc", keep_without_metrics=True), [0, 2, 3]),
        ((math.nan, 0.1, None), policies.BestN(1, "acc", keep_without_metrics=True), [1, 2]),
        ((0.5, 0.5, 0.5), policies.BestN(1, "acc"), [2]),
        ((0.5, 0.5, 0.5), policies.BestN(2, "acc", mode="min"), [1, 2]),
        ((math.inf, 1.0, -math.inf), policies.BestN(1, "acc"), [0]),
        ((math.inf, 1.0, -math.inf), policies.BestN(1, "acc", mode="min"), [2]),
        ((math.nan, math.inf), policies.BestN(1, "acc", mode="min"), [1]),
        (("0.99", 0.1), policies.BestN(1, "acc"), [1]),
        (([1, 2], 0.1, {}, 1j, b"9"), policies.BestN(1, "acc"), [1]),
        ((10**400, 0.1), policies.BestN(1, "acc"), [1]),
        ((True, 0.1), policies.BestN(1, "acc"), [0]),
        ((0.9, 0.1, 0.5), policies.BestN(None, "acc"), [0, 1, 2]),
        ((0.9, 0.1, 0.5), policies.BestN(1, "loss"), [2]),
        ((0.9, 0.1, 0.5), policies.BestN(1, "loss", keep_without_metrics=True), [0, 1, 2]),
        ((0.9, 0.1, 0.5), policies.BestN(1, lambda m: -m["acc"]), [1]),
        ((0.9, 0.1, 0.5), policies.BestN(1, operator.itemgetter("acc")), [0]),
        (
            (0.9, 0.1, 0.5),
            policies.BestN(1, lambda m: m["no"], keep_without_metrics=True),
            [0, 1, 2],
        ),
        ((0.0, 0.1, 0.5), policies.BestN(1, lambda m: 1 / m["acc"]), [1]),
        (({"top1": 0.5}, 3, {"top1": 0.4}), policies.BestN(1, lambda m: m["acc"]["top1"]), [0]),
    ],
)
def test_best_n_keeps_the_best_by_metric(
    values: tuple[Any, ...], policy: policies.BestN, kept: list[int]
) -> None:
    assert _kept(policy, _measured(*values)) == kept
    assert _kept(policy, []) == []


_metric_values = st.one_of(
    st.none(), st.floats(), st.integers(-3, 3), st.text(max_size=2), st.booleans()
)


@given(
    st.lists(_metric_values, max_size=12),
    st.integers(1, 5),
    st.sampled_from(["max", "min"]),
    st.booleans(),
)
def test_the_best_are_kept_whatever_is_measured(
    values: list[Any], n: int, mode: Any, unknown_too: bool
) -> None:
    history = _measured(*values)
    kept = _kept(policies.BestN(n, "acc", mode=mode, keep_without_metrics=unknown_too), history)
    assert len(kept) >= min(n, len(history))
    if not unknown_too:
        assert len(kept) == min(n, len(history))
    ranked = rank_steps(history, "acc", mode=mode)
    assert {info.step for info in ranked[:n]} <= set(kept)
    numbers = [float(values[info.step]) for info in ranked]
    assert numbers == sorted(numbers, reverse=mode == "max")
    assert not any(math.isnan(number) for number in numbers)


def test_rank_steps_skips_steps_without_the_metric() -> None:
    history = _measured(None, 0.5, math.nan, 0.9, 0.5)
    assert [info.step for info in rank_steps(history, "acc")] == [3, 4, 1]
    assert [info.step for info in rank_steps(history, "acc", mode="min")] == [4, 1, 3]
    assert rank_steps([], "acc") == []
    with pytest.raises(UsageError, match="mode: expected 'max' or 'min'; got 'most'"):
        rank_steps(history, "acc", mode="most")  # type: ignore[arg-type]


def test_a_bug_in_the_metric_function_is_not_hidden() -> None:
    def broken(metrics: Mapping[str, Any]) -> float:
        raise NotImplementedError("later")

    with pytest.raises(NotImplementedError, match="later"):
        _kept(policies.BestN(1, broken), _measured(0.1, 0.2))


# Several keep policies


def test_list_of_policies_keeps_steps_that_any_keeps() -> None:
    both = keep_policies([policies.LatestN(2), policies.BestN(1, "acc")])
    history = _measured(0.1, 0.9, 0.2, 0.3, 0.4)
    assert decide_keep(both, history, context=NOW) == (False, True, False, True, True)
    assert steps_to_prune(both, history, context=NOW) == (0, 2)


def test_an_empty_list_keeps_all() -> None:
    assert decide_keep(keep_policies([]), HISTORY, context=NOW) == (True,) * 6
    assert steps_to_prune((), HISTORY, context=NOW) == ()
    assert AnyKeep(()).should_preserve(HISTORY, context=NOW) == [True] * 6
    nested = keep_policies([policies.LatestN(1), []])
    assert steps_to_prune(nested, HISTORY, context=NOW) == ()


def test_the_newest_step_is_never_pruned() -> None:
    none = keep_policies(policies.CustomSteps([]))
    assert steps_to_prune(none, HISTORY, context=NOW) == (0, 3, 5, 8, 10)
    best = keep_policies(policies.BestN(1, "acc"))
    assert steps_to_prune(best, _measured(0.9, 0.2, 0.1), context=NOW) == (1,)
    assert steps_to_prune(best, _measured(0.9), context=NOW) == ()
    assert decide_keep(best, [], context=NOW) == ()


@st.composite
def _histories(draw: st.DrawFn) -> list[StepInfo]:
    steps = sorted(draw(st.sets(st.integers(0, 200), max_size=15)))
    return [
        at(
            step,
            draw(st.integers(0, 1000)),
            draw(st.none() | st.fixed_dictionaries({}, optional={"acc": _metric_values})),
        )
        for step in steps
    ]


_keepers = st.one_of(
    st.builds(policies.LatestN, st.none() | st.integers(1, 5)),
    st.builds(policies.LatestDuration, st.integers(1, 1000).map(lambda n: f"{n}s")),
    st.builds(policies.EveryNSeconds, st.integers(1, 300)),
    st.builds(policies.EveryNSteps, st.integers(1, 50), st.booleans(), st.integers(1, 5)),
    st.builds(policies.CustomSteps, st.sets(st.integers(0, 200), max_size=5)),
    st.builds(policies.BestN, st.integers(1, 4), st.just("acc")),
)


@given(_histories(), st.lists(_keepers, max_size=4), st.integers(0, 2000))
def test_pruning_settles_at_once_and_spares_the_newest(
    history: list[StepInfo], keepers: list[Any], now: int
) -> None:
    context = KeepContext(now=at(0, now).time)
    gone = steps_to_prune(keepers, history, context=context)
    left = [info for info in history if info.step not in gone]
    assert left[-1:] == history[-1:]
    assert list(gone) == sorted(gone)
    # Pruning again prunes nothing: no policy depends on removed steps.
    assert steps_to_prune(keepers, left, context=context) == ()


@pytest.mark.parametrize("answer", [False, True, [True], None, 6])
def test_a_policy_must_answer_for_each_step(answer: Any) -> None:
    class Careless:
        def should_preserve(self, checkpoints: Any, /, *, context: Any) -> Any:
            return answer

    for several in ([Careless()], [policies.LatestN(1), Careless()]):
        with pytest.raises(UsageError, match="expected 6 answers, one for each step; got"):
            steps_to_prune(keep_policies(several), HISTORY, context=NOW)


@pytest.mark.parametrize("short", [500, "500ba", "1h20m", datetime.timedelta(minutes=5)])
def test_a_number_or_a_time_saves_every_of_it(short: Any) -> None:
    assert save_rule(short) == save_rule([short]) == save_rule(policies.every(short))


def test_a_number_keeps_the_latest_of_them() -> None:
    assert keep_policies(3) == keep_policies([3]) == (policies.LatestN(3),)
    with pytest.raises(UsageError, match="n"):
        keep_policies(-1)


@pytest.mark.parametrize("steps", [(2, 1), (1, 1)])
def test_a_history_out_of_order_is_refused(steps: tuple[int, ...]) -> None:
    history = [at(step) for step in steps]
    with pytest.raises(UsageError, match="each step once, in ascending order; got 1 after"):
        steps_to_prune([policies.LatestN(1)], history, context=NOW)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (["acc"], r"^keep_policy\[0\]: expected a keep policy, such as BestN\(1, 'acc'\); got"),
        ([None], r"^keep_policy\[0\]: expected a keep policy or a list of them; got None\.$"),
        (policies.LatestN, r"expected a keep policy, an instance such as LatestN\(...\); got"),
        (policies.every(3), r"\(this one belongs in save_policy\); got every\(3\)"),
    ],
)
def test_keep_rule_refuses_other_objects(policy: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        keep_policies(policy)


# The namespace


def test_the_namespace_is_light_and_complete() -> None:
    names = set(dir(policies))
    assert names == set(policies.__all__)
    code = (
        "import sys, functional_ckpt.policies, functional_ckpt.steps.orbax_adapters\n"
        "heavy = {'torch', 'jax', 'orbax', 'numpy', 'tensorstore'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_interval_of_progress_has_a_length_in_its_units() -> None:
    for interval in (Timespan(0, "epoch"), Timespan(3, "second")):
        with pytest.raises(UsageError, match="interval"):
            ProgressInterval(interval)
