"""Recovery of a lost node from its partner, against the bytes alone through one gloo connection.

    python -m benchmarks.nodes_recovery [MEBIBYTES] [PAIRS]

Two ranks are two nodes. Rank 1's node is wiped; the partner has its files in the page cache. The
other side of each pair reads the same files there, piece by piece, sends them over one connection,
and receives them into memory that is there already. Neither includes making the manager.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import functional_ckpt as fc
from functional_ckpt.distributed.torch_store import StoreCoordinator

_HOST = "127.0.0.1"
_PIECE_BYTES = 16 * 2**20
_NUM_LEAVES = 16


def _measured(action: Callable[[], object]) -> dict[str, float]:
    """Returns seconds and CPU seconds, once both ranks have arrived."""
    dist.barrier()
    cpu, start = time.process_time(), time.perf_counter()
    action()
    dist.barrier()
    return {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def _leaves(num_bytes: int) -> dict[str, torch.Tensor]:
    rows = num_bytes // _NUM_LEAVES // 4096
    return {f"w{n}": torch.rand(rows, 1024, device="cpu") for n in range(_NUM_LEAVES)}


def _send_files(link: Any, rank: int, paths: Sequence[Path], target: np.ndarray[Any, Any]) -> None:
    """Sends files from rank 0 to rank 1, which has memory for them."""
    buffer = np.empty(_PIECE_BYTES, np.uint8)
    start = 0
    for path in paths:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            for offset in range(0, size, _PIECE_BYTES):
                length = min(_PIECE_BYTES, size - offset)
                if rank == 0:
                    os.preadv(file.fileno(), [memoryview(buffer)[:length]], offset)
                    link.send(1, buffer[:length]).wait()
                else:
                    link.receive(0, target[start : start + length]).wait()
                start += length


def _run(rank: int, port: int, folder: str, num_bytes: int, num_pairs: int) -> list[Any]:
    torch.set_num_threads(1)
    store = dist.TCPStore(_HOST, port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    root = Path(folder)
    node = "ab"[rank]

    def manager() -> fc.CheckpointManager:
        option = fc.NodeLocal(replicas=0, node=node)
        return fc.CheckpointManager(root / node, node_local=option)

    mine = _leaves(num_bytes) if rank else {"small": torch.ones(3, device="cpu")}
    with manager() as made:
        made.save(1, {"tree": mine}).result()
    dist.barrier()
    if rank == 0:
        for path in (root / "b" / "1" / "tree").glob("*.safetensors"):
            shutil.copy(path, root / "a" / "1" / "tree")
        shutil.rmtree(root / "b")
    dist.barrier()
    folder_of = root / "a" / "1" / "tree"
    paths = sorted(path for path in folder_of.glob("*.safetensors") if path.stat().st_size > 2**20)
    coordinator = StoreCoordinator(dist.group.WORLD)
    memory = {name: torch.zeros_like(value) for name, value in mine.items()}
    target = {"tree": {name: fc.handlers.Fill(value) for name, value in memory.items()}}
    raw = np.zeros(sum(path.stat().st_size for path in paths) if rank else 1, np.uint8)
    pairs: list[Any] = []
    with manager() as made:
        for _ in range(num_pairs + 1):
            recovery = _measured(lambda: made.restore(1, target))
            link = coordinator.link()
            alone = _measured(lambda link=link: _send_files(link, rank, paths, raw))
            dist.barrier()
            link.close()
            pairs.append((recovery, alone))
    if not all(torch.equal(memory[name], value) for name, value in mine.items()):
        raise RuntimeError("The restored values are wrong.")
    dist.destroy_process_group()
    return pairs[1:]  # the first one is for warming up


def measure(num_mib: int = 512, num_pairs: int = 5) -> dict[str, float]:
    """Returns seconds per GiB, and the ratios of the pairs."""
    server = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=base) as folder, context.Pool(2) as pool:
        jobs = [(rank, server.port, folder, num_mib * 2**20, num_pairs) for rank in range(2)]
        found = pool.starmap(_run, jobs, chunksize=1)
    gib = num_mib / 1024
    figures: dict[str, float] = {}
    for kind in ("wall", "cpu"):
        sides = [
            [
                max(ranks[side][kind] for ranks in pair)
                if kind == "wall"
                else sum(ranks[side][kind] for ranks in pair)
                for pair in zip(*found, strict=True)
            ]
            for side in (0, 1)
        ]
        figures[f"recovery, {kind} s/GiB"] = statistics.median(sides[0]) / gib
        figures[f"the bytes alone, {kind} s/GiB"] = statistics.median(sides[1]) / gib
        ratios = [recovery / alone for recovery, alone in zip(*sides, strict=True)]
        figures[f"ratio, {kind}"] = statistics.median(ratios)
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=2))
