"""`fc.save` by several ranks, which a process group names."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from gloo_workers import Workers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import functional_ckpt as fc


def sharded() -> DTensor:
    return distribute_tensor(torch.arange(5.0), init_device_mesh("cpu", (2,)), [Shard(0)])


def save_together(directory: Path) -> list[float]:
    items = {"state": {"bias": sharded(), "rank": dist.get_rank()}}
    fc.save(directory / "one", items, metrics={"loss": 0.5}, process_group=dist.group.WORLD)
    into = {"state": {"bias": sharded(), "rank": 0}}
    state = fc.restore(directory / "one", into=into, strict=False)["state"]
    return state["bias"].full_tensor().tolist()


def save_many(directory: Path) -> None:
    def count() -> int:
        gc.collect()
        return sum(each.name == "store-calls" for each in threading.enumerate())

    before = count()
    for number in range(3):
        fc.save(directory / f"{number}", {"state": sharded()}, process_group=dist.group.WORLD)
    deadline = time.monotonic() + 20
    while count() > before + 1:  # the first call may start the thread of the process group
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.05)


def test_the_threads_of_a_save_end_with_it(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, save_many, tmp_path)


def save_again(directory: Path) -> None:
    fc.save(directory / "one", {"state": sharded()}, process_group=dist.group.WORLD)


def test_ranks_save_one_checkpoint(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(2, save_together, tmp_path) == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert fc.metadata(tmp_path / "one").metrics == {"loss": 0.5}
    assert torch.equal(fc.restore(tmp_path / "one")["state"]["bias"], torch.arange(5.0))


def test_an_error_of_the_primary_is_raised_on_all_ranks(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for failure in workers.failures(2, save_again, tmp_path):
        assert "StepExistsError" in failure.kinds
    assert list((tmp_path / "one").iterdir()) == []


def save_steps(directory: Path) -> None:
    with fc.CheckpointManager(directory) as manager:
        for step in range(2):
            tensor = DTensor.from_local(
                torch.arange(300.0) + 1000 * step + 500 * dist.get_rank(),
                init_device_mesh("cpu", (2,)),
                [Shard(0)],
            )
            manager.save(step, {"state": {"bias": tensor}})


def resume(directory: Path) -> int | None:
    target = distribute_tensor(torch.zeros(600), init_device_mesh("cpu", (2,)), [Shard(0)])
    with fc.CheckpointManager(directory) as manager:
        restored = manager.restore_or({"state": {"bias": target}}, on_corrupt="older")
        assert restored["state"]["bias"].to_local()[0] == 500 * dist.get_rank()
        return restored.step


def test_ranks_agree_on_the_older_step(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, save_steps, tmp_path)
    pattern = (torch.arange(300.0) + 1500).numpy().tobytes()  # read by rank 1 alone
    (path,) = [
        path
        for path in (tmp_path / "1").rglob("*")
        if path.is_file() and pattern in path.read_bytes()
    ]
    data = bytearray(path.read_bytes())
    data[data.index(pattern) + 5] ^= 1
    path.write_bytes(data)
    assert workers.run(2, resume, tmp_path) == [0, 0]
