"""SIGTERM at any instant of the loop: a process that leaves it has saved that step."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

import functional_ckpt as fc
from functional_ckpt.storage.local import LocalStorage


def preempt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_just_after_a_refused_save_waits_for_the_next(tmp_path: Path) -> None:
    policies = [fc.policies.every(10), fc.policies.Preemption()]
    with fc.CheckpointManager(tmp_path, save_policy=policies) as manager:
        assert manager.save(4, {"x": 1}) is None
        preempt()
        assert not manager.reached_preemption(4)
        assert manager.save(5, {"x": 1})
        assert manager.reached_preemption(5)
    with fc.CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.all_steps() == [5]


@pytest.mark.parametrize("step", [10, 11], ids=["due-anyway", "due-to-the-signal"])
def test_a_signal_before_the_save_is_answered_at_once(step: int, tmp_path: Path) -> None:
    policies = [fc.policies.every(10), fc.policies.Preemption()]
    with fc.CheckpointManager(tmp_path, save_policy=policies) as manager:
        preempt()
        assert manager.save(step, {"x": 1})
        assert manager.reached_preemption(step)


def test_one_may_ask_before_saving(tmp_path: Path) -> None:
    policies = [fc.policies.every(10), fc.policies.Preemption()]
    with fc.CheckpointManager(tmp_path, save_policy=policies) as manager:
        assert manager.save(3, {"x": 1}) is None
        assert not manager.reached_preemption(3)
        preempt()
        assert manager.reached_preemption(4)


class SlowStorage(LocalStorage):
    """Commits wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def rename(self, source: str, target: str) -> None:
        self.go.wait(60)
        super().rename(source, target)


def test_the_last_save_waits_for_a_commit_under_way(tmp_path: Path) -> None:
    storage = SlowStorage()
    policies = [fc.policies.Preemption(), fc.policies.SpecificSteps([1, 2])]
    manager = fc.CheckpointManager(tmp_path, save_policy=policies, on_busy="skip", storage=storage)
    with manager:
        assert manager.save(1, {"x": 1})
        assert manager.save(2, {"x": 2}) is None, "skipped: the first is on its way"
        preempt()
        threading.Timer(0.2, storage.go.set).start()
        assert manager.save(3, {"x": 3})
        assert manager.reached_preemption(3)
    with fc.CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.all_steps() == [1, 3]
