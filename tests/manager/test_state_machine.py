"""A manager driven at random against a model: saves, failures, kills, pruning, reopening."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Mapping

import torch
from full import IS_FULL
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import functional_ckpt as fc
from functional_ckpt.testing import CHANGES, Fault, FaultyStorage, ManagerModel

Metrics = Mapping[str, float] | None
STEPS = st.integers(0, 6)
VALUES = st.integers(0, 2**31)
METRICS = st.none() | st.fixed_dictionaries({"score": st.sampled_from([0.25, 0.5, 0.75])})
PLACES = st.integers(0, 25)


def items_of(value: int) -> dict[str, object]:
    tensors = {"w": torch.arange(5) + value, "tied": torch.full((2, 3), float(value))}
    return {"tree": tensors, "config": fc.Json({"value": value})}


def content_of(restored: fc.Restored) -> int:
    """The value that every leaf of a step must have been made from."""
    value = restored["config"]["value"]
    expected = items_of(value)["tree"]
    assert isinstance(expected, dict)
    for name, tensor in expected.items():
        assert torch.equal(restored["tree"][name], tensor), name
    return value


class ManagerMachine(RuleBasedStateMachine):
    """One directory, one writer at a time, a model of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp()
        self.manager: fc.CheckpointManager | None = None
        self.model = ManagerModel()

    @initialize(latest=st.none() | st.integers(1, 3), best=st.integers(0, 2))
    def begin(self, latest: int | None, best: int) -> None:
        self.model = ManagerModel(keep_latest=latest, keep_best=best)
        self.open()

    def open(self) -> fc.CheckpointManager:
        keep: list[object] = []
        if self.model.keep_latest is not None:
            keep.append(fc.policies.LatestN(self.model.keep_latest))
        if self.model.keep_best:
            keep.append(fc.policies.BestN(self.model.keep_best, self.model.metric))
        self.storage = FaultyStorage()
        self.manager = fc.CheckpointManager(
            self.root, keep_policy=keep, overwrite=True, storage=self.storage
        )
        return self.manager

    @property
    def writer(self) -> fc.CheckpointManager:
        assert self.manager is not None
        return self.manager

    # -------------------------------------------------------------------------- rules

    @rule(step=STEPS, value=VALUES, metrics=METRICS)
    def save(self, step: int, value: int, metrics: Metrics) -> None:
        commit = self.writer.save(step, items_of(value), metrics=metrics)
        assert commit is not None
        assert commit.result(60) == step
        self.model = self.model.saved(step, value, metrics)

    @rule(step=STEPS, values=st.lists(VALUES, min_size=2, max_size=3), metrics=METRICS)
    def save_without_waiting(self, step: int, values: list[int], metrics: Metrics) -> None:
        for offset, value in enumerate(values):
            self.writer.save(step + offset, items_of(value), metrics=metrics)
            self.model = self.model.saved(step + offset, value, metrics)
        self.writer.wait_until_finished()

    @rule(step=STEPS, value=VALUES, metrics=METRICS, at=PLACES)
    def save_that_fails(self, step: int, value: int, metrics: Metrics, at: int) -> None:
        self.storage.inject(Fault(at=at, kinds=CHANGES))
        commit = self.writer.save(step, items_of(value), metrics=metrics)
        assert commit is not None
        error = commit.exception(60)
        self.storage.heal()
        if not self.storage.has_failed:
            assert error is None
            self.model = self.model.saved(step, value, metrics)
        elif error is None:  # what failed was only tidying up
            self.settle(self.model.cut_save(step, value, metrics))
        else:
            assert isinstance(error, fc.errors.SaveError)
            assert error.step == step
            self.settle(self.model.cut_save(step, value, metrics))
            self.writer.check_for_errors()  # it was reported already

    @rule(step=STEPS, value=VALUES, metrics=METRICS, at=PLACES)
    def save_and_die(self, step: int, value: int, metrics: Metrics, at: int) -> None:
        self.storage.inject(Fault(at=at, mode="crash", kinds=CHANGES))
        commit = self.writer.save(step, items_of(value), metrics=metrics)
        assert commit is not None
        commit.exception(60)
        has_died = self.storage.has_failed
        del commit
        self.manager = None  # as a killed process: nothing is closed, the kernel lets the lock go
        gc.collect()
        self.open()
        if has_died:
            self.settle(self.model.cut_save(step, value, metrics))
        else:
            self.model = self.model.saved(step, value, metrics)

    @precondition(lambda self: self.model.steps)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.model.steps)))
        self.writer.delete(step)
        self.model = self.model.deleted(step)

    @precondition(lambda self: self.model.steps)
    @rule(data=st.data(), score=st.sampled_from([0.1, 0.6, 0.9]))
    def measure_later(self, data: st.DataObject, score: float) -> None:
        step = data.draw(st.sampled_from(sorted(self.model.steps)))
        self.writer.record_metrics(step, {"score": score})
        self.model = self.model.measured(step, {"score": score})

    @rule()
    def reopen(self) -> None:
        self.writer.close()
        self.open()

    # ------------------------------------------------------------------------------ invariants

    def seen(self) -> dict[int, tuple[int, dict[str, float] | None]]:
        """Every step that another process sees, read completely."""
        with fc.CheckpointManager(self.root, read_only=True) as reader:
            found: dict[int, tuple[int, dict[str, float] | None]] = {}
            for step in reader.all_steps():
                measured = reader.metadata(step).metrics
                found[step] = (
                    content_of(reader.restore(step)),
                    None if measured is None else dict(measured),
                )
            return found

    def settle(self, candidates: object) -> None:
        """Takes the one of several possible models that the disk shows."""
        seen = self.seen()
        models = list(candidates)  # pyright: ignore[reportArgumentType, reportUnknownArgumentType]
        fitting = [model for model in models if expected(model) == seen]
        assert fitting, f"{seen} is none of {[expected(model) for model in models]}"
        self.model = fitting[0]

    @invariant()
    def the_disk_is_the_model(self) -> None:
        if self.manager is None:
            return
        assert self.seen() == expected(self.model)
        assert self.writer.all_steps() == sorted(self.model.steps)
        assert self.writer.latest_step() == self.model.latest
        assert self.writer.best_step("score") == self.model.best

    def teardown(self) -> None:
        if self.manager is not None:
            self.storage.heal()
            self.manager.close()
        shutil.rmtree(self.root)


def expected(model: ManagerModel) -> dict[int, tuple[int, dict[str, float] | None]]:
    return {
        step: (held.content, None if held.metrics is None else dict(held.metrics))
        for step, held in model.steps.items()
    }


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(
    max_examples=25 if IS_FULL else 10, stateful_step_count=12, deadline=None
)
