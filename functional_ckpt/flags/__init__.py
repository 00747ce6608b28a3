"""absl flags for launch scripts; defined when `define` is called, never at import.

A launch script needs four lines:

    CKPT = fc.flags.define()
    ...
    with fc.flags.manager(CKPT) as manager:
        restored = fc.flags.restore(CKPT, manager, items)
        for step in range(restored.next_step, num_steps):
            ...
"""

from __future__ import annotations

from functional_ckpt.flags.define import Defaults as Defaults
from functional_ckpt.flags.define import define
from functional_ckpt.flags.launch import manager, restore
from functional_ckpt.flags.values import CheckpointFlags

__all__ = ["CheckpointFlags", "define", "manager", "restore"]
