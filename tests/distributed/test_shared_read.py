"""Ranks that read for each other: what happens when one of them cannot."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Failure, Workers

import functional_ckpt as fc
from functional_ckpt.distributed.torch_store import StoreCoordinator
from functional_ckpt.restoring import shared_read

TREE = {f"w{i}": torch.arange(200_000.0) + i for i in range(4)}


def restore(directory: Path, timeout_seconds: float = 60.0) -> bool:
    coordinator = StoreCoordinator(dist.group.WORLD, timeout_seconds=timeout_seconds)
    target = {name: torch.zeros(200_000) for name in TREE}
    with fc.CheckpointManager(directory, read_only=True, coordinator=coordinator) as manager:
        got = manager.restore(0, {"tree": target}, share_reads=True)["tree"]
    return all(torch.equal(got[name], TREE[name]) for name in TREE)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with fc.CheckpointManager(tmp_path / "run") as manager:
        manager.save(0, {"tree": TREE})
    return tmp_path / "run"


def test_share_reads_reads_replicas_once(saved: Path, workers: Workers) -> None:
    assert workers.run(3, restore, saved) == [True] * 3


def restore_after_a_failure(directory: Path) -> tuple[str, bool]:
    """One rank cannot read a chunk that it reads for all; afterwards all is as before."""
    chunk_tasks = shared_read._chunk_tasks

    def fail(*args: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError("the disk is gone")
        return chunk_tasks(*args)

    shared_read._chunk_tasks = fail
    try:
        restore(directory)
    except (OSError, fc.CheckpointError) as error:
        failure = str(error)
    else:
        raise AssertionError("the failure was lost")
    finally:
        shared_read._chunk_tasks = chunk_tasks
    return failure, restore(directory)


def test_a_rank_that_cannot_read_fails_all(saved: Path, workers: Workers) -> None:
    found = workers.run(3, restore_after_a_failure, saved)
    assert all("the disk is gone" in failure for failure, _ in found)
    assert all("ank 1" in failure for rank, (failure, _) in enumerate(found) if rank != 1)
    assert all(restored for _, restored in found)


def test_damaged_bytes_fail_all(saved: Path, workers: Workers) -> None:
    for path in saved.glob("0/tree/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    outcomes = workers.outcomes(2, restore, saved)
    assert all(isinstance(outcome, Failure) for outcome in outcomes)
    assert all("digest" in outcome.text for outcome in outcomes)


def die_while_trading(directory: Path) -> None:
    def die(*_: Any) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    shared_read._deliver, deliver = die, shared_read._deliver
    shared_read.ROUND_BYTES, size_bytes = 1_000, shared_read.ROUND_BYTES
    try:
        restore(directory, timeout_seconds=5.0)
    finally:
        shared_read._deliver, shared_read.ROUND_BYTES = deliver, size_bytes


def test_a_rank_that_dies_is_an_error_on_the_others(saved: Path) -> None:
    workers = Workers()
    begun = time.monotonic()
    try:
        with pytest.raises(EOFError):  # of the rank that died
            workers.run(3, die_while_trading, saved)
    finally:
        workers.close()
    assert time.monotonic() - begun < 100
