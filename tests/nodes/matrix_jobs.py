"""Jobs of the matrix: saves in which ranks are killed, and restores; run by `gloo_workers.Workers`.

Every save has a seed of its own, from which all its values are made: a restored state with values
of two seeds would be a mix of two commits.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import node_jobs
import torch
import torch.distributed as dist

import functional_ckpt as fc

_ROWS, _COLUMNS = 96, 4096
WAIT_SECONDS = 60.0


def values(seed: int) -> dict[str, torch.Tensor]:
    """The values of one save."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sharded": torch.randn(_ROWS, _COLUMNS, generator=generator),
        "everywhere": torch.randn(1000, generator=generator),
        "seed": torch.tensor([seed]),
    }


def _items(seed: int) -> dict[str, Any]:
    made = values(seed)
    return {"tree": {**made, "sharded": node_jobs.sharded(made["sharded"])}}


def manager(
    root: str, nodes: str, replicas: int, *, seconds: float, tier: str | None = None
) -> fc.CheckpointManager:
    """A manager of this rank, whose node has the letter of its rank."""
    node = nodes[dist.get_rank()]
    return fc.CheckpointManager(
        Path(root) / node,
        node_local=fc.NodeLocal(replicas=min(replicas, len(set(nodes)) - 1), node=node),
        timeout_seconds=seconds,
        tiers=[] if tier is None else [fc.Tier(path=tier)],
    )


def _watch(is_time: Callable[[], bool]) -> None:
    """Kills this process once something is seen."""

    def look() -> None:
        while not is_time():
            time.sleep(0.0005)
        node_jobs._die()

    threading.Thread(target=look, daemon=True).start()


def _arm(phase: str, root: str, tier: str | None) -> None:
    if phase == "replicating":
        _watch(lambda: any(Path(root).glob("*/.functional_ckpt/incoming/*/*")))
    elif phase == "uploading":
        _watch(lambda: tier is not None and any(Path(tier).glob("*3*")))
    elif phase not in ("staging", "idle"):
        node_jobs.PHASES[phase]()


def save_and_die(
    root: str,
    nodes: str,
    replicas: int,
    phase: str,
    dying: tuple[int, ...],
    tier: str | None,
    is_absent: bool,
) -> str:
    """Saves steps 1 and 2, and step 3, in which some ranks are killed; the error of the others.

    Each rank notes the steps that were reported as committed, as a trainer would believe them.
    """
    rank = dist.get_rank()
    with contextlib.ExitStack() as life:
        made = life.enter_context(manager(root, nodes, replicas, seconds=10.0, tier=tier))
        for step in (1, 2):
            made.save(step, _items(100 + step)).result()
            _note(root, rank, step, 100 + step)
            _wait_for_copies(root, nodes, replicas, step)
            dist.barrier()
            if step == 1 and nodes.index(nodes[rank]) == rank:
                shutil.copytree(
                    Path(root) / nodes[rank],
                    Path(root) / "past" / nodes[rank],
                    ignore=shutil.ignore_patterns("*.tmp"),  # of notes that are being replaced
                )
            dist.barrier()
        if is_absent and tier is not None and rank == 0:
            with contextlib.suppress(fc.CheckpointError):  # of the upload
                made.wait_until_finished()
            shutil.rmtree(tier)
            Path(tier).write_text("the mount is gone")
        dist.barrier()
        if rank in dying:
            _arm(phase, root, tier)
        try:
            if phase == "staging" and rank in dying:
                node_jobs._die()
            made.save(3, _items(103)).result()
            _note(root, rank, 3, 103)
            if phase == "idle":
                _wait_for_copies(root, nodes, replicas, 3)
                dist.barrier()
            if phase in ("replicating", "uploading"):
                time.sleep(1.0)
            if rank in dying:
                node_jobs._die()
            made.wait_until_finished()
        except (fc.CheckpointError, RuntimeError) as error:
            if rank in dying:  # the save was refused before its phase; the process is used again
                node_jobs._die()
            return str(error) or "failed"
        finally:
            with contextlib.suppress(fc.CheckpointError):
                life.close()
    return ""


def _note(root: str, rank: int, step: int, seed: int) -> None:
    with open(Path(root) / f"committed.{rank}", "a", encoding="utf-8") as file:
        file.write(f"{step} {seed}\n")
        file.flush()
        os.fsync(file.fileno())


def _wait_for_copies(root: str, nodes: str, replicas: int, step: int) -> None:
    """Waits until every file of a step is on `1 + replicas` nodes, if it will be."""
    folders = [Path(root) / node / str(step) for node in sorted(set(nodes))]
    deadline = time.monotonic() + (WAIT_SECONDS if replicas else 0)
    while time.monotonic() < deadline:
        names = [path.name for folder in folders for path in folder.glob("*/*.safetensors")]
        if names and all(names.count(name) > replicas for name in names):
            return
        time.sleep(0.02)


def resume(root: str, nodes: str, replicas: int) -> tuple[int, int, bool, str]:
    """Restores the latest step and saves another; the step, its seed, whether all is of it."""
    with manager(root, nodes, replicas, seconds=60.0) as made:
        target = {
            "tree": {
                "sharded": node_jobs.sharded(torch.zeros(_ROWS, _COLUMNS)),
                "everywhere": torch.zeros(1000),
                "seed": torch.zeros(1, dtype=torch.int64),
            }
        }
        restored = made.restore_or(target)
        step = -1 if restored.step is None else restored.step
        tree = restored["tree"]
        seed = int(tree["seed"][0])
        wrong = ""
        if step >= 0:
            expected = values(seed)
            local = node_jobs.sharded(expected["sharded"]).to_local()
            if not torch.equal(tree["sharded"].to_local(), local):
                wrong = "sharded"
            if not torch.equal(tree["everywhere"], expected["everywhere"]):
                wrong = "everywhere"
        made.save(step + 10, _items(900)).result()
        again = made.restore(step + 10, target)
        is_saved = int(again["tree"]["seed"][0]) == 900
    return step, seed, is_saved, wrong
