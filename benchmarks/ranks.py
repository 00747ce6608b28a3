"""`big` as FSDP2 shards on two gloo ranks: the time of the slower rank."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import files, meters, peers, workloads
from benchmarks.async_peers import SkipMeasure

__all__ = ["RANK_PEERS", "measure"]

_NUM_RANKS = 2


class RankPeer:
    """A system that saves the shards of a module together with other ranks."""

    is_durable = False

    def start(self, module: torch.nn.Module) -> None:
        self.module = module

    def save(self, path: str) -> None:
        raise NotImplementedError

    def restore(self, path: str) -> None:
        raise NotImplementedError


class RankDcp(RankPeer):
    """DCP, four threads a rank."""

    def save(self, path: str) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(path, thread_count=4, sync_files=False)
        dcp.save(self.module.state_dict(), storage_writer=writer)

    def restore(self, path: str) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(self.module.state_dict(), storage_reader=dcp.FileSystemReader(path))


class RankTorchCheckpointing(RankPeer):
    """torch_checkpointing, synchronous, onto the same ranks: to reshard, 0.1.1 needs CUDA."""

    def start(self, module: torch.nn.Module) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import SyncCheckpointSaverConfig

        super().start(module)
        self._manager = CheckpointManager(
            CheckpointManager.Config(
                save=SyncCheckpointSaverConfig(),
                storage_config=peers.buffered_files(),
            )
        )

    def save(self, path: str) -> None:
        self._manager.save(path, {"state": self.module.state_dict()})

    def restore(self, path: str) -> None:
        self._manager.load(path, into={"state": self.module.state_dict()})


class RankOurs(RankPeer):
    """functional_ckpt's manager, synchronous."""

    is_durable = True

    def save(self, path: str) -> None:
        import functional_ckpt as fc

        with fc.CheckpointManager(path, staging=fc.Blocking()) as manager:
            manager.save(0, {"state": self.module})

    def restore(self, path: str) -> None:
        import functional_ckpt as fc

        with fc.CheckpointManager(path, read_only=True) as manager:
            manager.restore(0, {"state": self.module})


RANK_PEERS: Mapping[str, Callable[[], RankPeer]] = {
    "dcp": RankDcp,
    "torch_checkpointing": RankTorchCheckpointing,
    "functional_ckpt": RankOurs,
}


def measure(peer_name: str, workload: str, divisor: int, root: str) -> dict[str, Any]:
    """The figures of a synchronous save and restores, the slower rank's where ranks differ."""
    if peer_name not in RANK_PEERS:
        raise SkipMeasure("has no way to save shards of several torch ranks together")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        ranks = [
            context.Process(target=_rank, args=(rank, peer_name, workload, divisor, root, scratch))
            for rank in range(_NUM_RANKS)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError(f"ranks ended with {[p.exitcode for p in ranks]}")
        found: list[dict[str, Any]] = []
        for rank in range(_NUM_RANKS):
            with open(os.path.join(scratch, f"{rank}.json")) as file:
                found.append(json.load(file))
    summed = {"size_bytes", "save_cpu_seconds", "save_peak_bytes"}
    path = os.path.join(root, "step")
    return {
        key: (sum if key in summed else max)(each[key] for each in found if key in each)
        for key in found[0]
        if key != "digest"
    } | {
        "digest": "+".join(each["digest"] for each in found),
        "disk_bytes": sum(files.inodes(path).values()),
        "num_files": len(list(files.walk_files(path))),
    }


def _rank(rank: int, peer_name: str, workload: str, divisor: int, root: str, scratch: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(scratch, "store"), _NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=_NUM_RANKS)
    mesh = init_device_mesh("cpu", (_NUM_RANKS,))

    def started(state: workloads.State) -> RankPeer:
        module = peers.Holder(state)
        fully_shard(module, mesh=mesh)
        peer = RANK_PEERS[peer_name]()
        peer.start(module)
        return peer

    # Imports and one-time setup are not compared.
    small, warm_path = started({"w": torch.rand(1000)}), os.path.join(root, "warm")
    small.save(warm_path)
    dist.barrier()
    small.restore(warm_path)
    peer = started(workloads.make(workload, divisor))
    figures = _measure_rank(peer, os.path.join(root, "step"), rank)
    with open(os.path.join(scratch, f"{rank}.json"), "w") as file:
        json.dump(figures, file)
    dist.barrier()
    dist.destroy_process_group()


def _measure_rank(peer: RankPeer, path: str, rank: int) -> dict[str, Any]:
    module = peer.module
    local = {name: p.to_local() for name, p in module.state_dict().items()}
    expected = workloads.digest(local)

    def timed(action: Callable[[], object]) -> float:
        dist.barrier()
        return meters.seconds(action)

    def save() -> None:
        peer.save(path)
        dist.barrier()
        if rank == 0 and not peer.is_durable:
            files.sync_tree(path)
        dist.barrier()

    cpu = meters.cpu_seconds()
    with meters.PeakMemory() as memory:
        durable = timed(save)
    figures: dict[str, Any] = {
        "size_bytes": sum(tensor.nbytes for tensor in local.values()),
        "save_durable_seconds": durable,
        "save_cpu_seconds": meters.cpu_seconds() - cpu,
        "save_peak_bytes": memory.peak,
        "digest": expected,
    }
    for temperature in ("warm", "cold"):
        with torch.no_grad():
            for tensor in local.values():
                tensor.zero_()
        dist.barrier()
        if rank == 0:
            prepare = files.drop_cache if temperature == "cold" else files.fill_cache
            figures[f"{temperature}_resident"] = prepare(path)
        figures[f"restore_{temperature}_seconds"] = timed(lambda: peer.restore(path))
        found = {name: p.to_local() for name, p in module.state_dict().items()}
        if workloads.digest(found) != expected:
            raise RuntimeError("the bytes restored are not those that were saved")
    return figures
