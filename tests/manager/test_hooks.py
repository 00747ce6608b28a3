"""Hooks of custom loops: which items they save, and which they do not access."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from managing import Counter

import functional_ckpt as fc
from functional_ckpt import errors, policies


def test_a_hook_saves_when_the_policies_say_so(tmp_path: Path) -> None:
    counter = Counter()
    with fc.CheckpointManager(tmp_path, save_policy=policies.every(3)) as manager:
        save = fc.hooks.SaveHook(manager, {"counter": counter})
        for step in range(7):
            save(step, metrics={"loss": step})
            assert not save.should_stop
        assert save(8) is None
        assert save(8, force=True) is not None
        manager.wait_until_finished()
        assert manager.all_steps() == [0, 3, 6, 8]
        assert manager.metadata(6).metrics == {"loss": 6}
    assert counter.num_captures == 4


def test_state_and_metrics_are_made_only_for_a_save(tmp_path: Path) -> None:
    made: list[int] = []
    state = 0

    def items() -> dict[str, Any]:
        made.append(state)
        return {"state": {"x": state}}

    def measure() -> dict[str, float]:
        made.append(-state)
        return {"loss": float(state)}

    with fc.CheckpointManager(tmp_path, save_policy=policies.every("4ba")) as manager:
        save = fc.hooks.SaveHook(manager, items)
        progress = fc.Progress()
        for state in range(1, 10):  # noqa: B007 (read by the functions above)
            progress = progress.next_batch()
            save(progress, metrics=measure)
            save(progress, metrics=measure)  # the same batch
        assert sorted(made) == [-8, -4, 4, 8]
        manager.wait_until_finished()
        restored = manager.restore()
    assert (restored.step, restored["state"], restored.metrics) == (8, {"x": 8}, {"loss": 8.0})
    assert restored.progress == fc.Progress(batch=8, batch_in_epoch=8)


def test_loop_leaves_once_its_progress_is_saved(tmp_path: Path) -> None:
    rules = [policies.every(100), policies.Preemption()]
    with fc.CheckpointManager(tmp_path, save_policy=rules) as manager:
        save = fc.hooks.SaveHook(manager, lambda: {"state": {"step": step}})
        for step in range(1, 50):
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            save(step)
            if save.should_stop:
                break
        assert step == 5
        manager.wait_until_finished()
        assert manager.restore()["state"] == {"step": 5}


def test_items_that_are_not_a_mapping_are_refused(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        with pytest.raises(errors.UsageError, match="items must be a mapping, or a function"):
            fc.hooks.SaveHook(manager, [1])  # type: ignore[arg-type]
        with pytest.raises(errors.UsageError, match="items must be a non-empty mapping"):
            fc.hooks.SaveHook(manager, dict)(1)
