"""Helpers of the manager's tests: a gate in the file system, states that identify their step."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

import functional_ckpt as fc
from functional_ckpt import testing


class Gate(testing.FaultyStorage):
    """While shut, operations of some kinds wait; the commit is under way for as long."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self._kinds = kinds
        self._go = threading.Event()
        self._go.set()

    def shut(self) -> None:
        self._go.clear()

    def open(self) -> None:
        self._go.set()

    def open_soon(self) -> None:
        threading.Timer(0.15, self._go.set).start()

    def operation(self, kind: str, path: str) -> None:
        if kind in self._kinds:
            self._go.wait(60)
        super().operation(kind, path)


class Counter:
    """Counts how often its state was taken."""

    def __init__(self) -> None:
        self.num_captures = 0

    def state_dict(self) -> dict[str, Any]:
        self.num_captures += 1
        return {"num_captures": self.num_captures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_captures = state["num_captures"]


def state(step: int) -> dict[str, Any]:
    return {"state": {"weight": torch.full((3,), float(step)), "step": step}}


def saved(manager: fc.CheckpointManager, step: int, **options: Any) -> None:
    handle = manager.save(step, state(step), **options)
    assert handle is not None
    assert handle.result(60) == step


def looked_into(directory: Path) -> fc.CheckpointManager:
    return fc.CheckpointManager(directory, read_only=True)
