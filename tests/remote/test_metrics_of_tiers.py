"""Metrics and steps that only a second tier has."""

from __future__ import annotations

from pathlib import Path

import functional_ckpt as fc
from functional_ckpt import testing


def save(manager: fc.CheckpointManager, step: int) -> None:
    manager.save(step, {"tree": {"x": step}}).result()  # type: ignore[union-attr]
    manager.wait_until_finished()


def test_a_metric_that_an_evaluator_records_in_a_tier_keeps_the_step(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    with fc.CheckpointManager(near, tiers=[far]) as manager:
        for step in (1, 2):
            save(manager, step)
    with fc.CheckpointManager(far, read_only=True) as evaluator:
        evaluator.record_metrics(1, {"bleu": 9.0})
    policies = [fc.policies.BestN(1, "bleu"), fc.policies.LatestN(1)]
    with fc.CheckpointManager(near, tiers=[far], keep_policy=policies) as manager:
        for step in (3, 4):
            save(manager, step)
    with fc.CheckpointManager(near, read_only=True) as reader:
        assert reader.all_steps() == [1, 4]


def test_reload_opens_a_tier_that_can_be_reached_again(tmp_path: Path) -> None:
    for folder, steps in (("near", (3,)), ("far", (1, 2, 3))):
        with fc.CheckpointManager(tmp_path / folder) as manager:
            for step in steps:
                save(manager, step)
    store = testing.FaultyStorage()
    store.inject(testing.Fault(mode="lasting", kinds=("list", "read")))
    tier = fc.Tier(path=tmp_path / "far", storage=store)
    with fc.CheckpointManager(tmp_path / "near", tiers=[tier], read_only=True) as manager:
        assert manager.all_steps() == [3]
        store.heal()
        manager.reload()
        assert manager.all_steps() == [1, 2, 3]


def test_a_step_is_looked_for_in_a_tier_that_can_be_reached_again(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    with fc.CheckpointManager(near, tiers=[far], keep_policy=fc.policies.LatestN(1)) as manager:
        for step in (1, 3):
            save(manager, step)
    store = testing.FaultyStorage()
    store.inject(testing.Fault(mode="lasting", kinds=("list", "read")))
    with fc.CheckpointManager(near, tiers=[fc.Tier(path=far, storage=store)]) as manager:
        assert manager.all_steps() == [3]
        store.heal()
        assert manager.metadata(1).step == 1
