"""The random generators of a step that a trainer's callback saved."""

from __future__ import annotations

from functional_ckpt.handlers import Rng
from functional_ckpt.manager import CheckpointManager


def is_of_this_many(manager: CheckpointManager, step: int) -> bool:
    """Returns whether as many processes as now saved a step."""
    states = manager.metadata(step).items["rng"]  # of several processes: those of each
    return manager.num_ranks == (1 if "torch" in states else len(states))


def set_generators(manager: CheckpointManager, step: int) -> None:
    """Sets the random generators as a step has them; for other processes, to derived states."""
    manager.restore(step, {"rng": Rng(other_ranks="derive")})
