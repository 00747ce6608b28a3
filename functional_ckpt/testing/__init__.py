"""For tests: failing storage, a disk that loses unsynced data, comparison, a model.

`functional_ckpt.testing.strategies` has Hypothesis strategies for the values of a checkpoint; only
it needs the `hypothesis` package.
"""

from __future__ import annotations

from functional_ckpt.testing.equality import differences
from functional_ckpt.testing.faults import CHANGES, Crash, Fault, FaultyStorage, Operation
from functional_ckpt.testing.model import ManagerModel, SavedStep
from functional_ckpt.testing.power_cut import Disk, Image, Moment

__all__ = [
    "CHANGES",
    "Crash",
    "Disk",
    "Fault",
    "FaultyStorage",
    "Image",
    "ManagerModel",
    "Moment",
    "Operation",
    "SavedStep",
    "differences",
]
