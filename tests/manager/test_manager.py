"""The manager's guarantees for saving, keeping, overwriting and metrics, by its public calls."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from managing import Counter, Gate, looked_into, saved, state

import functional_ckpt as fc
from functional_ckpt import errors, testing

# ------------------------------------------------------------------------------ when it saves


def test_a_refused_save_captures_nothing(tmp_path: Path) -> None:
    counter = Counter()
    with fc.CheckpointManager(tmp_path, save_policy=fc.policies.every(10)) as manager:
        assert not manager.should_save(3)
        assert manager.save(3, {"counter": counter, "bad": object()}) is None
        assert counter.num_captures == 0
        assert manager.should_save(20)
        assert manager.save(20, {"counter": counter})
        assert counter.num_captures == 1
        manager.wait_until_finished()
        assert manager.all_steps() == [20]


def test_any_policy_of_a_list_saves_and_force_saves_whatever_they_say(tmp_path: Path) -> None:
    policies = [fc.policies.every(10), fc.policies.SpecificSteps([3])]
    with fc.CheckpointManager(tmp_path, save_policy=policies) as manager:
        for step in (3, 4, 10):
            manager.save(step, state(step))
        assert manager.save(7, state(7), force=True)
    assert looked_into(tmp_path).all_steps() == [3, 7, 10]


def test_a_policy_in_time_counts_from_the_last_save(tmp_path: Path) -> None:
    interval = datetime.timedelta(seconds=60)
    with fc.CheckpointManager(tmp_path, save_policy=fc.policies.every(interval)) as manager:
        assert manager.save(1, state(1)) is None, "the run has only started"
        manager._saver.decider._start_time -= interval  # pyright: ignore[reportPrivateUsage]
        assert manager.save(2, state(2))
        assert manager.save(3, state(3)) is None, "the one under way counts"
        manager.wait_until_finished()
        assert manager.save(4, state(4)) is None


class Recorder:
    """A save policy of a user's own that notes the history it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any]] = []

    def should_save(
        self,
        step: fc.policies.StepInfo,
        previous_steps: Sequence[fc.policies.StepInfo],
        *,
        context: fc.policies.SaveContext,
    ) -> bool:
        self.seen = [(each.step, each.metrics) for each in previous_steps]
        assert all(each.time <= step.time for each in previous_steps)
        return True


def test_reopening_keeps_the_history_that_policies_see(tmp_path: Path) -> None:
    keep = [fc.policies.LatestN(2), fc.policies.BestN(1, "accuracy")]
    with fc.CheckpointManager(tmp_path, keep_policy=keep) as manager:
        for step, accuracy in ((1, 0.9), (2, 0.1), (3, 0.2)):
            saved(manager, step, metrics={"accuracy": accuracy})
        assert manager.all_steps() == [1, 2, 3]
    recorder = Recorder()
    with fc.CheckpointManager(tmp_path, save_policy=recorder, keep_policy=keep) as manager:
        assert manager.best_step() == 1
        saved(manager, 4, metrics={"accuracy": 0.3})
        known = {1: {"accuracy": 0.9}, 2: {"accuracy": 0.1}, 3: {"accuracy": 0.2}}
        assert recorder.seen == list(known.items())
        assert manager.all_steps() == [1, 3, 4], "the best and the latest two, across the reopening"
    with fc.CheckpointManager(tmp_path, save_policy=fc.policies.InitialSave()) as manager:
        assert manager.save(5, state(5)) is None


def test_a_step_below_the_latest_can_be_saved(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path, keep_policy=fc.policies.LatestN(2)) as manager:
        for step in (10, 5):
            saved(manager, step)
        assert manager.all_steps() == [5, 10]
        assert manager.latest_step() == 10
        assert manager.restore()["state"]["step"] == 10
        saved(manager, 20)
        assert manager.all_steps() == [10, 20]


def test_steps_are_any_ints_but_no_others(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(np.int64(3), state(3))  # pyright: ignore[reportArgumentType]
        manager.save(torch.tensor(4), state(4))  # pyright: ignore[reportArgumentType]
        manager.save(0, state(0))
        manager.wait_until_finished()
        assert manager.all_steps() == [0, 3, 4]
        bad: Any
        for bad in (-1, True, 1.5, "3"):
            calls: list[Callable[[], object]] = [
                lambda bad=bad: manager.save(bad, state(1)),
                lambda bad=bad: manager.should_save(bad),
                lambda bad=bad: manager.restore(bad),
                lambda bad=bad: manager.delete(bad),
                lambda bad=bad: manager.metadata(bad),
                lambda bad=bad: manager.record_metrics(bad, {"x": 1}),
            ]
            for call in calls:
                with pytest.raises(errors.UsageError, match=f"int >= 0; got {bad!r}"):
                    call()
        assert manager.all_steps() == [0, 3, 4]


@pytest.mark.parametrize("name", ["metrics", "metadata", "a/b", "_x", ".x", "", "\0", 3])
def test_save_refuses_reserved_item_names(name: Any, tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        with pytest.raises(errors.UsageError, match=r"(?i)item"):
            manager.save(1, {name: 1})
        assert manager.all_steps() == []
        saved(manager, 1)


def test_save_stores_values_at_the_moment_of_the_call(tmp_path: Path) -> None:
    gate = Gate("make_directory", "write", "write_data")
    tensor, array, words = torch.ones(4), np.ones(4), ["a"]
    module = torch.nn.Linear(2, 2)
    weight = module.weight.detach().clone()
    items = {"tree": {"tensor": tensor, "array": array, "words": words}, "module": module}
    with fc.CheckpointManager(tmp_path, storage=gate) as manager:
        gate.shut()
        manager.save(1, items)
        tensor.zero_()
        array.fill(0)
        words.append("b")
        torch.nn.init.zeros_(module.weight)
        items.clear()
        gate.open()
        manager.wait_until_finished()
        restored = manager.restore()
    expected = {"tensor": torch.ones(4), "array": np.ones(4), "words": ["a"]}
    assert testing.differences(restored["tree"], expected) == []
    assert torch.equal(restored["module"]["weight"], weight)


# ------------------------------------------------------------------------------ overwriting


def test_existing_step_is_refused_without_overwrite(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        saved(manager, 1)
        for force in (False, True):
            with pytest.raises(errors.StepExistsError, match="Step 1 exists") as caught:
                manager.save(1, state(2), force=force)
            assert caught.value.step == 1
            assert isinstance(caught.value, FileExistsError)
        assert manager.restore(1)["state"]["step"] == 1


def test_overwriting_replaces_state_metrics_and_metadata(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path, overwrite=True) as manager:
        saved(manager, 1, metrics={"a": 1, "b": 1}, custom_metadata={"try": 1})
        manager.record_metrics(1, {"late": 1})
        manager.save(1, {"other": 5}, metrics={"a": 2})
        manager.wait_until_finished()
        assert manager.all_steps() == [1]
        restored = manager.restore(1)
        assert dict(restored) == {"other": 5}
        assert manager.metadata(1).metrics == {"a": 2}, "metrics of the old step are gone"
        assert manager.metadata(1).custom_metadata == {}


# ------------------------------------------------------------------------------ measuring


def test_metrics_and_custom_metadata(tmp_path: Path) -> None:
    custom = {"commit": "abc", "nested": {"list": [1, None, 2.5]}}
    before = datetime.datetime.now(datetime.UTC)
    with fc.CheckpointManager(tmp_path) as manager:
        saved(manager, 1, metrics={"loss": 0.5}, custom_metadata=custom)
        saved(manager, 2)
        assert manager.metadata(1).metrics == {"loss": 0.5}
        assert manager.metadata().metrics is None
        found = manager.metadata(1)
        assert (found.step, found.custom_metadata) == (1, custom)
        assert before <= found.time <= datetime.datetime.now(datetime.UTC)
        assert found.items["state"]["weight"] == fc.handlers.ArraySpec(shape=(3,), dtype="float32")
        restored = manager.restore(1)
        assert (restored.metrics, restored.custom_metadata) == ({"loss": 0.5}, custom)


@pytest.mark.parametrize("bad", [{"loss": torch.ones(2)}, {1: 2}, 0.5, {"loss": {1, 2}}])
@pytest.mark.parametrize("where", ["metrics", "custom_metadata"])
def test_json_item_refuses_other_values(bad: Any, where: str, tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        with pytest.raises(errors.UsageError, match=where):
            manager.save(1, state(1), **{where: bad})
        assert manager.all_steps() == []


def test_best_step_ranks_by_metric(tmp_path: Path) -> None:
    keep = fc.policies.BestN(5, "loss", mode="min")
    with fc.CheckpointManager(tmp_path, keep_policy=keep) as manager:
        assert manager.best_step() is None
        for step, loss in ((1, math.nan), (2, 0.5), (3, 0.2), (4, 0.2)):
            saved(manager, step, metrics={"loss": loss, "step": step})
        saved(manager, 5)
        assert manager.best_step() == 4, "of equals the newer; nan and none never"
        assert manager.best_step("loss") == 2
        assert manager.best_step("step", mode="min") == 1
        assert manager.best_step("absent") is None
        with pytest.raises(errors.UsageError, match="mode"):
            manager.best_step("loss", mode="lowest")  # pyright: ignore[reportArgumentType]
    with looked_into(tmp_path) as manager, pytest.raises(errors.UsageError, match="BestN"):
        manager.best_step()


def test_late_metrics_of_an_evaluator_beside_the_writer(tmp_path: Path) -> None:
    keep = [fc.policies.LatestN(1), fc.policies.BestN(1, "accuracy")]
    with fc.CheckpointManager(tmp_path, keep_policy=keep) as manager, looked_into(tmp_path) as eye:
        saved(manager, 1, metrics={"loss": 3})
        eye.record_metrics(1, {"accuracy": 0.9})
        eye.record_metrics(1, {"f1": 0.8})
        assert eye.metadata(1).metrics == {"loss": 3, "accuracy": 0.9, "f1": 0.8}
        for step in (2, 3):
            saved(manager, step)
        assert manager.all_steps() == [1, 3], "pruning uses the evaluator's metrics"
        manager.reload()
        assert (manager.best_step(), eye.best_step("accuracy")) == (1, 1)
        manager.record_metrics(3, {"accuracy": 0.95})
        assert (manager.best_step(), eye.best_step("accuracy")) == (3, 3)
        saved(manager, 4)
        assert manager.all_steps() == eye.all_steps() == [3, 4]
        with pytest.raises(errors.StepNotFoundError, match="no step 1; the latest are: 3, 4"):
            eye.record_metrics(1, {"accuracy": 1})
        with pytest.raises(errors.UsageError, match="metrics"):
            eye.record_metrics(3, {"accuracy": object()})
    with fc.CheckpointManager(tmp_path, keep_policy=keep) as manager:
        assert manager.metadata(3).metrics == {"accuracy": 0.95}
        assert manager.best_step() == 3


def test_short_forms_mean_what_they_say(tmp_path: Path) -> None:
    with fc.CheckpointManager(
        tmp_path / "run",
        save_policy="2ba",
        keep_policy=2,
        step_name="ep{epoch}-ba{batch}",
        tiers=[tmp_path / "tier"],
    ) as manager:
        for batch in range(1, 6):
            manager.save(
                batch,
                {"x": {"w": torch.zeros(2)}},
                progress=fc.Progress(epoch=0, batch=batch),
                metrics={"loss": torch.tensor(0.5), "acc": np.float32(0.25), "n": np.int64(3)},
            )
        manager.wait_until_finished()
        assert manager.metadata(4).metrics == {"loss": 0.5, "acc": 0.25, "n": 3}
    assert [p.name for p in sorted((tmp_path / "run").glob("ep*"))] == ["ep0-ba2", "ep0-ba4"]
    assert [p.name for p in sorted((tmp_path / "tier").glob("ep*"))] == ["ep0-ba2", "ep0-ba4"]


def test_a_metric_of_several_elements_is_refused(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager, pytest.raises(fc.errors.UsageError):
        manager.save(1, {"x": {"w": torch.zeros(2)}}, metrics={"loss": torch.zeros(2)})


def test_tiers_are_a_list(tmp_path: Path) -> None:
    with pytest.raises(fc.errors.UsageError, match="tiers must be a list"):
        fc.CheckpointManager(tmp_path, tiers="s3://bucket/run")
