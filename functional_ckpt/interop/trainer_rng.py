"""The random generators of a step that a trainer's callback saved."""

from __future__ import annotations

from typing import Any

from functional_ckpt.handlers import Rng


def is_of_this_many(manager: Any, step: int) -> bool:
    """Returns whether as many processes as now saved a step."""
    states = manager.metadata(step).items["rng"]  # of several processes: those of each
    return bool(manager.num_ranks == (1 if "torch" in states else len(states)))


def set_generators(manager: Any, step: int) -> None:
    """Sets the random generators as a step has them; for other processes, to derived states."""
    manager.restore(step, {"rng": Rng(other_ranks="derive")})
