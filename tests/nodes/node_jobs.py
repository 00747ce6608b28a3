"""Jobs of ranks on several nodes; run by `gloo_workers.Workers`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import functional_ckpt as fc
from functional_ckpt.saving import node_publishing, write
from functional_ckpt.saving.node_publishing import NodePublishing
from functional_ckpt.steps import node_copy, node_receive
from functional_ckpt.storage.local import LocalStorage

SECONDS = 10.0
"""How long ranks wait for one that was killed."""


def values(step: int) -> torch.Tensor:
    """The saved tensor of a step."""
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(step))


def sharded(full: torch.Tensor) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(full, mesh, [Shard(0)])


def manager(
    root: str, nodes: str, replicas: int = 0, *, seconds: float = 60.0, **options: Any
) -> fc.CheckpointManager:
    """A manager of this rank, whose node has the letter of its rank."""
    node = nodes[dist.get_rank()]
    return fc.CheckpointManager(
        Path(root) / node,
        node_local=fc.NodeLocal(replicas=replicas, node=node),
        timeout_seconds=seconds,
        **options,
    )


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _patched(owner: Any, name: str, *, before: Any = None, after: Any = None) -> Callable[[], None]:
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        found = function(*args, **kwargs)
        if after is not None:
            after(*args)
        return found

    setattr(owner, name, wrapper)
    return lambda: setattr(owner, name, function)


def _is_commit(*args: Any) -> None:
    if args[-1] == b"commit":
        _die()


PHASES: dict[str, Callable[[], Callable[[], None]]] = {
    "writing": lambda: _patched(write, "write_part", after=lambda *_: _die()),
    "finalizing": lambda: _patched(node_publishing.large, "broadcast", before=lambda *_: _die()),
    "before voting": lambda: _patched(NodePublishing, "_make_durable", before=lambda *_: _die()),
    "voted": lambda: _patched(NodePublishing, "_make_durable", after=lambda *_: _die()),
    "deciding": lambda: _patched(NodePublishing, "_decide", before=_is_commit),
    "decided": lambda: _patched(NodePublishing, "_decide", after=_is_commit),
    "renaming": lambda: _patched(NodePublishing, "_rename", before=lambda *_: _die()),
    "renamed": lambda: _patched(NodePublishing, "_rename", after=lambda *_: _die()),
}


def save_and_die(root: str, nodes: str, phase: str, dying: tuple[int, ...]) -> str:
    """Saves step 1, then step 2, in which some ranks are killed; the error of the others."""
    with manager(root, nodes, seconds=SECONDS) as made:
        made.save(1, {"tree": {"w": sharded(values(1))}}).result()
        if dist.get_rank() in dying:
            PHASES[phase]()
        try:
            made.save(2, {"tree": {"w": sharded(values(2))}}).result()
        except fc.CheckpointError as error:
            failure = str(error)
        else:
            failure = ""
    return failure


COPYING: dict[str, Callable[[], Callable[[], None]]] = {
    "sending": lambda: _patched(node_copy, "_send_file", before=lambda *_: _die()),
    "receiving": lambda: _patched(node_receive._Arriving, "take", after=lambda *_: _die()),
    "verified": lambda: _patched(node_receive._Receiver, "_put", before=lambda *_: _die()),
}


def copy_and_die(root: str, nodes: str, phase: str, dying: int) -> str:
    """Saves step 1, then step 2, while which is copied a rank is killed; the state of step 1."""
    made = manager(root, nodes, 1, seconds=SECONDS)
    made.save(1, {"tree": {"w": sharded(values(1))}})
    made.wait_until_finished()
    dist.barrier()
    state = made.metadata(1).state
    if dist.get_rank() == dying:
        COPYING[phase]()
    with contextlib.suppress(fc.CheckpointError):  # a later step of the save may notice the loss
        made.save(2, {"tree": {"w": sharded(values(2))}})
        made.close()
    return state


def save_copied(root: str, nodes: str) -> str:
    """Saves step 1, and returns its state once it is copied."""
    with manager(root, nodes, 1) as made:
        made.save(1, {"tree": {"w": sharded(values(1))}})
        made.wait_until_finished()
        dist.barrier()
        return made.metadata(1).state


def upload_and_die(root: str, nodes: str, far: str, dying: int) -> bool:
    """Uploads step 1, during which a rank is killed; whether the others have closed."""
    if dist.get_rank() == dying:
        _patched(LocalStorage, "put_file", before=lambda *_: _die())
    made = manager(root, nodes, 1, seconds=SECONDS, tiers=[fc.Tier(path=far)])
    with contextlib.suppress(fc.CheckpointError):  # of the lost rank
        made.wait_until_finished()
        made.close()
    return True


def resume_and_copy(root: str, nodes: str) -> tuple[list[int], int | None, bool, str]:
    """The steps, the latest one, whether it is restored bit for bit, and its state once copied."""
    with manager(root, nodes, 1) as made:
        steps, latest = made.all_steps(), made.latest_step()
        restored = made.restore_or({"tree": {"w": sharded(torch.zeros(64, 128))}})
        found = restored["tree"]["w"].to_local()
        is_same = torch.equal(found, sharded(values(latest or 0)).to_local())
        made.wait_until_finished()
        dist.barrier()
        return steps, latest, is_same, made.metadata(latest or 0).state


def resume(root: str, nodes: str) -> tuple[list[int], int | None, bool]:
    """The steps, the latest one, and whether it is restored bit for bit; saves the next one."""
    with manager(root, nodes) as made:
        steps, latest = made.all_steps(), made.latest_step()
        target = {"tree": {"w": sharded(torch.zeros(64, 128))}}
        restored = made.restore_or(target)
        found = restored["tree"]["w"].to_local()
        is_same = torch.equal(found, sharded(values(latest or 0)).to_local())
        made.save((latest or 0) + 10, {"tree": {"w": sharded(values(0))}}).result()
        assert made.latest_step() == (latest or 0) + 10
    return steps, latest, is_same


def save_copy_for_signal(root: str, nodes: str) -> tuple[bool, list[int]]:
    """SIGTERM to one rank: whether the copy of step 3 is saved by all without another call."""
    policies = [1000, fc.policies.Preemption(snapshot_every=1, grace_seconds=0.1)]
    with manager(root, nodes, save_policy=policies) as made:
        for step in (1, 2, 3):
            made.save(step, {"tree": {"w": sharded(values(step))}})
        dist.barrier()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 60
        path = Path(made.directory) / "3"
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        is_saved = path.exists()
        for step in range(4, 100):
            made.save(step, {"tree": {"w": sharded(values(step))}})
            if made.reached_preemption(step):
                break
        made.wait_until_finished()
        return is_saved, made.all_steps()
