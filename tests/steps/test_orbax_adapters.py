"""Our policies against Orbax's, decision by decision; Orbax's own objects, used as they are."""

from __future__ import annotations

import datetime
import math
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import functional_ckpt as fc
from functional_ckpt import policies
from functional_ckpt.errors import UsageError
from functional_ckpt.policies.base import KeepContext, SaveContext, StepInfo, StepPolicy
from functional_ckpt.policies.keep_rules import AnyKeep, decide_keep, keep_policies, steps_to_prune
from functional_ckpt.policies.save_rules import decide_save, save_rule
from functional_ckpt.steps.names import CompositeStepName, StepName, as_name_format
from functional_ckpt.steps.orbax_adapters import (
    adapt_keep_policy,
    adapt_name_format,
    adapt_save_policy,
    is_orbax_object,
)

theirs = ocp.checkpoint_managers
step_lib = ocp.path.step

START = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
NOW = KeepContext(now=START)


def at(step: int, seconds: float = 0, metrics: Mapping[str, Any] | None = None) -> StepInfo:
    time = START + datetime.timedelta(seconds=seconds)
    return StepInfo(step=step, time=time, metrics=metrics)


def orbax_context(context: SaveContext) -> Any:
    return theirs.DecisionContext(
        is_saving_in_progress=context.is_saving_in_progress,
        reached_preemption=context.reached_preemption,
        multiprocessing_options=ocp.options.MultiprocessingOptions(),
    )


_numbers = st.floats(-5, 5) | st.sampled_from([0.0, 1.0, math.inf, -math.inf])


@st.composite
def _histories(draw: st.DrawFn, metrics: Any = None, min_size: int = 0) -> list[StepInfo]:
    steps = sorted(draw(st.sets(st.integers(0, 300), min_size=min_size, max_size=20)))
    # Times need not follow the numbers: a step may have been overwritten.
    times = st.integers(0, 5000).map(lambda half_seconds: half_seconds / 2)
    return [at(step, draw(times), None if metrics is None else draw(metrics)) for step in steps]


_measured = _histories(st.fixed_dictionaries({"acc": _numbers}))
_partly_measured = _histories(st.none() | st.fixed_dictionaries({"acc": _numbers}))
_contexts = st.builds(
    SaveContext, is_saving_in_progress=st.booleans(), reached_preemption=st.booleans()
)


# Save policies


@given(
    st.one_of(
        st.integers(1, 50).map(lambda n: (policies.every(n), theirs.FixedIntervalPolicy(n))),
        st.integers(1, 50).map(lambda n: (policies.every(f"{n}ba"), theirs.FixedIntervalPolicy(n))),
        st.sets(st.integers(0, 300)).map(
            lambda steps: (policies.SpecificSteps(steps), theirs.SpecificStepsPolicy(steps))
        ),
        st.just((policies.InitialSave(), theirs.InitialSavePolicy())),
        st.just((policies.Preemption(), theirs.PreemptionCheckpointingPolicy())),
    ),
    _histories(),
    st.integers(0, 300),
    _contexts,
)
def test_saving_decides_as_orbax(
    pair: tuple[Any, Any], history: list[StepInfo], step: int, context: SaveContext
) -> None:
    ours, orbax = pair
    info = at(step, 9999)
    expected = orbax.should_save(info, history, context=orbax_context(context))
    assert ours.should_save(info, history, context=context) is expected
    adapted = adapt_save_policy(orbax)
    assert adapted.should_save(info, history, context=context) is expected
    if isinstance(ours, StepPolicy):
        assert isinstance(adapted, StepPolicy)
        assert ours.fires_at(step) is adapted.fires_at(step) is expected
    # Native policies work inside Orbax's, and Orbax's in lists of native ones.
    mixed = theirs.AnySavePolicy([ours, orbax])
    assert mixed.should_save(info, history, context=orbax_context(context)) is expected
    rule = save_rule([orbax, mixed], adapt=adapt_save_policy)
    assert len(rule.policies) == 3
    assert (decide_save(rule, info, history, context=context) is not None) is expected


def test_orbax_step_policies_are_decided_locally() -> None:
    rule = save_rule(
        theirs.AnySavePolicy([theirs.FixedIntervalPolicy(4), theirs.SpecificStepsPolicy({3})]),
        adapt=adapt_save_policy,
    )
    assert rule.step_only
    assert [rule.decide_step(step) for step in range(5)] == [True, False, False, True, True]
    asked = save_rule([theirs.InitialSavePolicy()], adapt=adapt_save_policy)
    assert not asked.step_only


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: [p], lambda p: theirs.AnySavePolicy([p])])
def test_continuous_checkpointing_is_refused(wrap: Any) -> None:
    class Mine(theirs.ContinuousCheckpointingPolicy):
        pass

    for policy in (theirs.ContinuousCheckpointingPolicy(), Mine(minimum_interval_secs=5)):
        with pytest.raises(UsageError, match="expected a policy that needs no JAX; got Orbax's"):
            save_rule(wrap(policy), adapt=adapt_save_policy)


# Keep policies


def _pairs() -> st.SearchStrategy[tuple[Any, Any]]:
    count = st.integers(1, 6)
    return st.one_of(
        st.just((policies.PreserveAll(), theirs.preservation_policy.PreserveAll())),
        st.just((policies.LatestN(), theirs.LatestN())),
        count.map(lambda n: (policies.LatestN(n), theirs.LatestN(n))),
        st.integers(1, 900).map(lambda n: (policies.EveryNSeconds(n), theirs.EveryNSeconds(n))),
        st.tuples(st.integers(1, 60), st.booleans(), st.none() | count).map(
            lambda args: (policies.EveryNSteps(*args), theirs.EveryNSteps(*args))
        ),
        st.lists(st.integers(0, 300)).map(
            lambda steps: (policies.CustomSteps(steps), theirs.CustomSteps(steps))
        ),
    )


@given(_pairs(), _histories(min_size=0))
def test_keeping_decides_as_orbax(pair: tuple[Any, Any], history: list[StepInfo]) -> None:
    ours, orbax = pair
    expected = orbax.should_preserve(history, context=theirs.PreservationContext())
    assert ours.should_preserve(history, context=NOW) == expected
    assert adapt_keep_policy(orbax).should_preserve(history, context=NOW) == expected


@given(
    st.integers(1, 6) | st.none(),
    st.booleans(),
    st.booleans(),
    _measured,
)
def test_the_best_are_orbaxs_where_all_is_measured(
    n: int | None, reverse: bool, unknown_too: bool, history: list[StepInfo]
) -> None:
    orbax = theirs.BestN(
        get_metric_fn=lambda metrics: metrics["acc"],
        reverse=reverse,
        n=n,
        keep_checkpoints_without_metrics=unknown_too,
    )
    expected = orbax.should_preserve(history, context=theirs.PreservationContext())
    for metric in ("acc", lambda metrics: metrics["acc"]):
        ours = policies.BestN(
            metric=metric,
            mode="min" if reverse else "max",
            n=n,
            keep_without_metrics=unknown_too,
        )
        assert ours.should_preserve(history, context=NOW) == expected


@given(st.integers(1, 6), st.booleans(), _partly_measured)
def test_the_best_and_the_unmeasured_are_orbaxs(
    n: int, reverse: bool, history: list[StepInfo]
) -> None:
    orbax = theirs.BestN(get_metric_fn=lambda metrics: metrics["acc"], reverse=reverse, n=n)
    ours = policies.BestN(n, "acc", mode="min" if reverse else "max", keep_without_metrics=True)
    expected = orbax.should_preserve(history, context=theirs.PreservationContext())
    assert ours.should_preserve(history, context=NOW) == expected


@given(_histories(), st.integers(1, 3000), st.integers(0, 4000))
def test_the_latest_by_time_are_orbaxs_at_its_own_clock(
    history: list[StepInfo], seconds: int, age: int
) -> None:
    # Orbax reads the clock itself, so the history is moved to end `age` seconds before now; the
    # half second keeps the border away from the time that passes between the two readings.
    now = datetime.datetime.now(datetime.UTC)
    shift = now - START - datetime.timedelta(seconds=5000 + age + 0.25)
    history = [StepInfo(step=info.step, time=info.time + shift) for info in history]
    orbax = theirs.LatestDuration(datetime.timedelta(seconds=seconds))
    expected = orbax.should_preserve(history, context=theirs.PreservationContext())
    ours = policies.LatestDuration(f"{seconds}s")
    assert ours.should_preserve(history, context=KeepContext(now=now)) == expected
    assert adapt_keep_policy(orbax).should_preserve(history, context=NOW) == expected


@given(st.lists(_pairs(), min_size=1, max_size=4), _histories(min_size=1))
def test_several_keep_what_orbaxs_keep(
    pairs: list[tuple[Any, Any]], history: list[StepInfo]
) -> None:
    together = theirs.AnyPreservationPolicy([orbax for _, orbax in pairs])
    expected = list(together.should_preserve(history, context=theirs.PreservationContext()))
    expected[-1] = True  # a difference by intent: the newest step is never pruned
    for several in ([ours for ours, _ in pairs], [orbax for _, orbax in pairs], together):
        ready = keep_policies(several, adapt=adapt_keep_policy)
        assert list(decide_keep(ready, history, context=NOW)) == expected


# Where we differ on purpose: each trap is shown in Orbax, and its absence here.


def _orbax_keeps(policy: Any, history: Sequence[StepInfo]) -> Any:
    return policy.should_preserve(history, context=theirs.PreservationContext())


def _accuracies(*values: float | None) -> list[StepInfo]:
    return [at(i, metrics=None if v is None else {"acc": v}) for i, v in enumerate(values)]


def _orbax_best(n: int | None, **options: Any) -> Any:
    return theirs.BestN(get_metric_fn=lambda metrics: metrics["acc"], n=n, **options)


def test_difference_nan_breaks_no_ranking() -> None:
    history = _accuracies(0.9, math.nan, 0.1)
    assert _orbax_keeps(_orbax_best(1), history) == [False, False, True]
    assert policies.BestN(1, "acc").should_preserve(history, context=NOW) == [True, False, False]


def test_difference_a_missing_key_raises_nothing() -> None:
    history = [at(0, metrics={"loss": 1.0}), at(1, metrics={"acc": 0.5})]
    with pytest.raises(KeyError):
        _orbax_keeps(_orbax_best(1), history)
    assert policies.BestN(1, "acc").should_preserve(history, context=NOW) == [False, True]


def test_difference_unmeasured_steps_rank_worst_unless_asked_for() -> None:
    history = _accuracies(None, 0.5, None, 0.4)
    assert _orbax_keeps(_orbax_best(1), history) == [True, True, True, False]
    ours = policies.BestN(1, "acc")
    assert ours.should_preserve(history, context=NOW) == [False, True, False, False]
    # Without them Orbax leaves slots empty; here a step without a metric fills the slot.
    orbax = _orbax_best(3, keep_checkpoints_without_metrics=False)
    assert _orbax_keeps(orbax, history) == [False, True, False, True]
    ours = policies.BestN(3, "acc")
    assert ours.should_preserve(history, context=NOW) == [False, True, True, True]


def test_difference_keeping_none_is_an_error() -> None:
    assert _orbax_keeps(theirs.LatestN(0), _accuracies(1, 2)) == [False, False]
    assert _orbax_keeps(_orbax_best(0), _accuracies(1, 2)) == [False, False]
    # With a maximum of none, Orbax keeps all.
    assert _orbax_keeps(theirs.EveryNSteps(1, max_to_keep=0), _accuracies(1, 2)) == [True, True]
    for build in (
        lambda: policies.BestN(0, "acc"),
        lambda: policies.EveryNSteps(1, max_to_keep=0),
    ):
        with pytest.raises(UsageError, match="expected an int of at least 1"):
            build()


def test_difference_no_orbax_policy_prunes_the_newest() -> None:
    for orbax in (theirs.LatestN(0), _orbax_best(1), theirs.CustomSteps([])):
        history = _accuracies(0.9, 0.1)
        assert _orbax_keeps(orbax, history)[-1] is False
        ready = keep_policies(orbax, adapt=adapt_keep_policy)
        assert 1 not in steps_to_prune(ready, history, context=NOW)


def test_difference_an_empty_any_keeps_all() -> None:
    history = _accuracies(0.9, 0.1)
    empty = theirs.AnyPreservationPolicy([])
    assert _orbax_keeps(empty, history) is False
    assert adapt_keep_policy(empty) == AnyKeep(())
    for policy in (empty, theirs.AnyPreservationPolicy([theirs.LatestN(1), empty])):
        ready = keep_policies(policy, adapt=adapt_keep_policy)
        assert steps_to_prune(ready, history, context=NOW) == ()


def test_other_preservation_policies_of_orbax() -> None:
    history = [at(step) for step in (0, 9, 11, 19, 24, 30)]
    ready = keep_policies(theirs.EveryNStepsClosest(10), adapt=adapt_keep_policy)
    assert steps_to_prune(ready, history, context=NOW) == (9, 24)


# Orbax's own


class _Mine:
    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return False


class _Derived(theirs.SaveDecisionPolicy):
    """A user's policy on Orbax's base: it may look at all of Orbax's context."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return context.multiprocessing_options.primary_host == 0 and context.reached_preemption


def test_adapters_recognise_orbax_objects() -> None:
    for value in (theirs.LatestN(1), step_lib.standard_name_format(), _Derived()):
        assert is_orbax_object(value)
    for value in (_Mine(), policies.LatestN(1), [theirs.LatestN(1)], None, theirs.LatestN):
        assert not is_orbax_object(value)
        for adapt in (adapt_save_policy, adapt_keep_policy, adapt_name_format):
            assert adapt(value) is value


def test_a_policy_that_derives_from_orbaxs_gets_orbaxs_context() -> None:
    rule = save_rule(_Derived(), adapt=adapt_save_policy)
    for preempted in (False, True):
        context = SaveContext(reached_preemption=preempted)
        assert (decide_save(rule, at(1), [], context=context) is not None) is preempted


# Step names


@given(
    st.none() | st.from_regex(r"[A-Za-z0-9_ -]{1,8}", fullmatch=True),
    st.none() | st.integers(0, 12),
    st.integers(0, 10**14),
)
def test_adapted_names_equal_orbaxs(prefix: str | None, width: int | None, step: int) -> None:
    orbax = step_lib.standard_name_format(step_prefix=prefix, step_format_fixed_length=width)
    ours = adapt_name_format(orbax)
    assert ours == StepName(prefix=prefix, zero_pad=width or None)
    assert ours.build_name(step) == orbax.build_name(step)


_NAMES = [
    *("0", "7", "007", "0007", "00007", "12345", "012345", "0000", "00000", "-1", "+1", "1_0"),
    *(
        "step_7",
        "step_07",
        "step_0007",
        "step_12345",
        "step_",
        "step",
        "step7",
        "xstep_7",
        "step_x",
    ),
    *("7.orbax-checkpoint-tmp", "step_7.orbax-checkpoint-tmp-12", "0007.orbax-checkpoint-tmp-1"),
    *(".7", "metadata", "latest", "7.0", " 7", "7 ", "²"),
]


@pytest.mark.parametrize("prefix", [None, "step", "my_step"])
@pytest.mark.parametrize("width", [None, 1, 4, 6])
def test_directories_are_read_as_orbax_reads_them(
    tmp_path: Path, prefix: str | None, width: int | None
) -> None:
    for name in [*_NAMES, *(f"my_{name}" for name in _NAMES)]:
        (tmp_path / name).mkdir()
    orbax = step_lib.standard_name_format(step_prefix=prefix, step_format_fixed_length=width)
    expected = {found.path.name: found.step for found in orbax.find_all(tmp_path)}
    ours = adapt_name_format(orbax)
    parsed = {path.name: ours.parse(path.name) for path in tmp_path.iterdir()}
    assert {name: step for name, step in parsed.items() if step is not None} == expected


def test_difference_look_alike_numbers_are_no_steps(tmp_path: Path) -> None:
    names = ("1٧", "7\n")
    for name in names:
        (tmp_path / name).mkdir()
    orbax = step_lib.standard_name_format()
    assert sorted(found.step for found in orbax.find_all(tmp_path)) == [7, 17]
    assert [adapt_name_format(orbax).parse(name) for name in names] == [None, None]


def test_composite_names_read_every_format() -> None:
    old, new = (
        step_lib.standard_name_format(),
        step_lib.standard_name_format(step_prefix="step", step_format_fixed_length=4),
    )
    ours = adapt_name_format(step_lib.composite_name_format(new, [new, old]))
    assert ours == CompositeStepName(
        write=StepName(prefix="step", zero_pad=4),
        read=(StepName(prefix="step", zero_pad=4), StepName()),
    )


class _Epochs(step_lib.NameFormat):  # type: ignore[misc]
    """A user's format on Orbax's protocol."""

    def build_name(self, step: int) -> str:
        return f"run2-{step:05d}-done"

    def find_all(self, base_path: Any) -> Any:
        raise NotImplementedError

    def find_step(self, base_path: Any, step: int) -> Any:
        raise NotImplementedError


class _Ducks:
    def build_name(self, step: int) -> str:
        return f"{step}-ducks"


class _Nameless(_Epochs):
    def build_name(self, step: int) -> str:
        return "abcdefghij"[step % 10]


def test_a_users_name_format_on_orbaxs_protocol() -> None:
    ours = as_name_format(_Epochs(), adapt=adapt_name_format)
    assert ours.build_name(12) == "run2-00012-done"
    assert ours.names(12) == ("run2-00012-done",)
    assert [ours.parse(name) for name in ("run2-00012-done", "run2-00002-done")] == [12, 2]
    for name in (
        "run2-12-done",
        "run2-00012",
        "2",
        "run2-00012-done.orbax-checkpoint-tmp",
        "9" * 5000,
    ):
        assert ours.parse(name) is None
    assert as_name_format(_Ducks(), adapt=adapt_name_format).parse("3-ducks") == 3  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expected names that hold the number of their step"):
        adapt_name_format(_Nameless())


# JAX

_NO_BACKEND = """
import datetime, sys
import functional_ckpt as fc
from functional_ckpt import policies
from functional_ckpt.policies.keep_rules import keep_policies, steps_to_prune
from functional_ckpt.steps.names import as_name_format
from functional_ckpt.policies.base import KeepContext, SaveContext, StepInfo
from functional_ckpt.policies.save_rules import decide_save, save_rule
from functional_ckpt.steps.orbax_adapters import *

now = datetime.datetime.now(datetime.timezone.utc)
history = [StepInfo(step=s, time=now, metrics={"acc": 0.5}) for s in range(5)]
save_rule([policies.every(5), policies.Preemption()], adapt=adapt_save_policy).decide_step(3)
keep_policies([policies.LatestN(3)], adapt=adapt_keep_policy)
as_name_format(None, adapt=adapt_name_format)
assert not {"jax", "orbax"} & set(sys.modules)

import orbax.checkpoint as ocp
cm = ocp.checkpoint_managers
rule = save_rule(
    [cm.FixedIntervalPolicy(7), cm.SpecificStepsPolicy([1]), cm.InitialSavePolicy(),
     cm.AnySavePolicy([cm.PreemptionCheckpointingPolicy()])], adapt=adapt_save_policy)
rule.decide_step(3)
decide_save(rule, StepInfo(step=5, time=now), history, context=SaveContext())
keep = keep_policies(
    cm.AnyPreservationPolicy([cm.LatestN(1), cm.EveryNSeconds(5), cm.EveryNSteps(2),
        cm.EveryNStepsClosest(2), cm.CustomSteps([1]),
        cm.BestN(get_metric_fn=lambda m: m["acc"], n=1),
        cm.LatestDuration(datetime.timedelta(1))]), adapt=adapt_keep_policy)
steps_to_prune(keep, history, context=KeepContext(now=now))
names = as_name_format(ocp.path.step.standard_name_format(step_prefix="a"), adapt=adapt_name_format)
assert names.parse(names.build_name(3)) == 3

from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
import jax
jax.devices()
assert xla_bridge.backends_are_initialized()  # the question means something
print("no backend")
"""


def test_no_jax_backend_is_initialised() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _NO_BACKEND], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "no backend"), done.stderr


def test_orbax_preemption_policy_waits_for_the_signal(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with fc.CheckpointManager(tmp_path, save_policy=theirs.PreemptionCheckpointingPolicy()) as own:
        assert signal.getsignal(signal.SIGTERM) is not before
        assert own.waits_for_signal and own.save(1, {"x": 1}) is None
        signal.raise_signal(signal.SIGTERM)
        assert own.save(2, {"x": 1}) and own.reached_preemption(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_orbax_policies_that_ignore_the_step_need_no_round_at_each() -> None:
    ignoring = [theirs.PreemptionCheckpointingPolicy(), theirs.InitialSavePolicy()]
    assert save_rule([policies.every("90m"), *ignoring], adapt=adapt_save_policy).ignores_step
    two = save_rule([policies.every("90m"), policies.every("2m")], adapt=adapt_save_policy)
    assert two.shortest_seconds == 120
    assert not save_rule([policies.When(bool)], adapt=adapt_save_policy).ignores_step
    assert not save_rule([policies.every(5)], adapt=adapt_save_policy).ignores_step
