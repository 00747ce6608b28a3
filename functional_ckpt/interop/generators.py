"""The random generators of a step that a trainer's callback saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from functional_ckpt.handlers import Rng
from functional_ckpt.manager import CheckpointManager


def is_of_this_many(states: Mapping[str, Any]) -> bool:
    """Returns whether as many processes as now saved an item `rng`, restored without a target."""
    return "torch" in states  # else the states of each of them


def set_generators(manager: CheckpointManager, step: int) -> None:
    """Sets the random generators as a step has them; for other processes, to derived states."""
    manager.restore(step, {"rng": Rng(other_ranks="derive")})
