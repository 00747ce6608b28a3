"""Shared by the programs of the resume matrix: a loop, a result to compare, the interruption.

A program runs as `python program_NAME.py ROOT`, also under torchrun. The environment says how it is
interrupted: `KILL_AT=N` kills the process (of rank `KILL_RANK`) at its N-th write to the disk,
`SIGTERM_AT=STEP` sends it SIGTERM at a step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import functional_ckpt as fc

NUM_STEPS = 12
ROOT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
RANK = int(os.environ.get("RANK", "0"))
NUM_RANKS = int(os.environ.get("WORLD_SIZE", "1"))
POLICIES = [fc.policies.every(3), fc.policies.Preemption()]
ARGUMENTS: dict[str, Any] = {}  # of a Trainer, by a program that runs another one
OPTIONS: Mapping[str, Any] = {"save_policy": POLICIES, "keep_policy": fc.policies.LatestN(2)}

_WRITES = ("pwrite", "pwritev", "fsync", "fdatasync", "rename", "replace", "mkdir")
_lock = threading.Lock()
_num_writes = 0


def _count_writes() -> None:
    """Has every call that changes the disk counted, and the one that was chosen be the last."""
    kill_at = int(os.environ.get("KILL_AT", "0"))
    is_victim = int(os.environ.get("KILL_RANK", "0")) == RANK

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            global _num_writes
            with _lock:
                _num_writes += 1
                if is_victim and _num_writes == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return write

    for name in _WRITES:
        setattr(os, name, counted(getattr(os, name)))


def tick(step: int) -> None:
    """Called after each step."""
    if RANK == 0 and step == int(os.environ.get("SIGTERM_AT", "-1")):
        os.kill(os.getpid(), signal.SIGTERM)


def finish(state: Any) -> None:
    """Writes the result of the run, and the number of its writes."""
    state = {"state": whole(state), "drawn": torch.rand(3)}
    torch.save(state, ROOT / f"result-{RANK}.part")
    os.rename(ROOT / f"result-{RANK}.part", ROOT / f"result-{RANK}")
    (ROOT / f"writes-{RANK}").write_text(str(_num_writes))


def whole(value: Any) -> Any:
    """Plain tensors instead of DTensors and subclasses."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.dequantize() if type(value) is not torch.Tensor else value.clone()
    if isinstance(value, Mapping):
        return {str(key): whole(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(each) for each in value]
    return value


def loop(items: Mapping[str, Any], step: Callable[[int], Any], **options: Any) -> bool:
    """Trains on from the latest step; whether it came to the end."""
    with fc.CheckpointManager(ROOT / "ckpt", **{**OPTIONS, **options}) as manager:
        start = manager.restore_or(items).next_step
        for number in range(start, NUM_STEPS):
            step(number)
            tick(number)
            manager.save(number, items)
            if manager.reached_preemption(number):
                return False
    return True


def batch(*shape: int) -> torch.Tensor:
    """Random numbers, which depend on the generators that are saved."""
    return torch.randn(*shape)


torch.set_num_threads(1)
_count_writes()
