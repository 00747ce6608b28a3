"""DTensors that cannot be saved as they are, each refused by name before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import odd_tensors
import pytest
import torch
import torch.distributed as dist
from gloo_workers import Workers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import functional_ckpt as fc


def sharded() -> DTensor:
    return distribute_tensor(torch.arange(5.0), init_device_mesh("cpu", (2,)), [Shard(0)])


def save_alone(directory: Path) -> None:
    fc.save(directory / f"rank_{dist.get_rank()}", {"state": {"bias": sharded()}})


def save_partial(directory: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with fc.CheckpointManager(directory) as manager:
        tree: dict[str, Any] = {"whole": torch.ones(2), "sum": partial}
        manager.save(0, {"state": tree})


def test_fc_save_refuses_shards_of_other_ranks(workers: Workers, tmp_path: Path) -> None:
    for failure in workers.failures(2, save_alone, tmp_path):
        assert "UnsupportedLeafError" in failure.kinds
        assert failure.text.startswith("state.bias: the DTensor's mesh has rank 1, ")
        assert "give a process_group that contains the mesh" in failure.text
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_sum_is_named(workers: Workers, tmp_path: Path) -> None:
    for failure in workers.failures(2, save_partial, tmp_path):
        assert "UnsupportedLeafError" in failure.kinds
        assert "state['sum']: the DTensor has placement Partial" in failure.text
    with fc.CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.all_steps() == []


def save_in_replicas(directory: Path) -> list[float]:
    from functional_ckpt.distributed.torch_store import default_coordinator

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    replica = mesh.get_local_rank("replica")
    full = torch.arange(5.0) + 10 * replica
    tensor = distribute_tensor(full, mesh["shard"], [Shard(0)])
    coordinator = default_coordinator(mesh["shard"].get_group(), timeout_seconds=20)
    with fc.CheckpointManager(directory / str(replica), coordinator=coordinator) as manager:
        manager.save(0, {"state": {"bias": tensor}})
        manager.wait_until_finished()
        empty = torch.zeros_like(tensor)
        restored = manager.restore(0, {"state": {"bias": fc.handlers.Fill(empty)}})["state"]["bias"]
    assert restored is empty
    return restored.full_tensor().tolist()


def test_replicas_that_checkpoint_alone(workers: Workers, tmp_path: Path) -> None:
    found = workers.run(4, save_in_replicas, tmp_path)
    for replica in (0, 1):
        expected = [float(10 * replica + index) for index in range(5)]
        assert found[2 * replica] == found[2 * replica + 1] == expected
        alone = fc.restore(tmp_path / str(replica) / "0")
        assert alone["state"]["bias"].tolist() == expected


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_mesh_of_all_ranks_is_saved(num_ranks: int, workers: Workers, tmp_path: Path) -> None:
    workers.run(num_ranks, save_whole, tmp_path)
    assert fc.restore(tmp_path / "0")["state"]["bias"].tolist() == [0.0, 1.0, 2.0]


def save_whole(directory: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = distribute_tensor(torch.arange(3.0), mesh, [Shard(0)])
    with fc.CheckpointManager(directory) as manager:
        manager.save(0, {"state": {"bias": tensor}})


@pytest.mark.parametrize("rows", [(3, 1), (1, 3), (4, 0), (0, 4), (1, 1, 4)], ids=str)
def test_a_local_tensor_of_another_shape_is_refused_by_name(
    rows: tuple[int, ...], workers: Workers, tmp_path: Path
) -> None:
    for options in ({}, {"staging": fc.Overlapped()}):
        failures = workers.failures(len(rows), odd_tensors.save_ragged, tmp_path, rows, options)
        for rank, failure in enumerate(failures):
            assert "UnsupportedLeafError" in failure.kinds
            if rows[rank] != sum(rows) // len(rows):
                assert f"s.t: rank {rank}: the local tensor of this DTensor" in failure.text
                assert f"has the shape [{rows[rank]}, 2]; expected [2, 2]" in failure.text
    assert [path.name for path in tmp_path.iterdir()] == [".functional_ckpt"]


ODD = {
    "replica": "has the shape [3]; expected [4]",
    "over shards": "LocalShardsWrapper, a subclass without memory of its own",
    "sharded tensor": "ShardedTensor is a tensor subclass without memory of its own",
    "fake": "FakeTensor has no values; create it outside of FakeTensorMode",
    "closed": "odd_tensors.Closed is a tensor subclass without memory of its own",
}


@pytest.mark.matrix(2)
@pytest.mark.parametrize("in_module", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_without_memory_of_its_own_is_refused_by_name(
    kind: str, in_module: bool, workers: Workers, tmp_path: Path
) -> None:
    for failure in workers.failures(2, odd_tensors.save_odd, tmp_path, kind, in_module):
        assert "UnsupportedLeafError" in failure.kinds, failure.traceback
        assert ODD[kind] in failure.text
        assert "s['t']" in failure.text or "s.t" in failure.text
    assert [path.name for path in tmp_path.iterdir()] == [".functional_ckpt"]


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("rows", [(3, 1), (4, 0), (2, 1, 1)], ids=str)
def test_a_target_whose_local_tensor_has_another_shape_is_a_mismatch(
    rows: tuple[int, ...], fill: bool, workers: Workers, tmp_path: Path
) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(0, {"s": {"t": torch.arange(8.0).reshape(4, 2), "w": torch.ones(3)}})
    for failure in workers.failures(len(rows), odd_tensors.restore_odd, tmp_path, rows, fill):
        assert "MismatchError" in failure.kinds
        assert "s['t']: cannot be restored into: the local tensor of this DTensor" in failure.text


@pytest.mark.parametrize("kind", ["over shards", "fake", "closed"])
def test_a_target_without_memory_of_its_own_is_a_mismatch(
    kind: str, workers: Workers, tmp_path: Path
) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(0, {"s": {"t": torch.ones(8, 2), "w": torch.ones(3)}})
    for failure in workers.failures(2, odd_tensors.restore_into_kind, tmp_path, kind):
        assert "MismatchError" in failure.kinds
        assert "s['t']: cannot be restored into: " in failure.text
        assert ODD[kind] in failure.text


def test_a_redistribution_under_way_is_waited_for(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, odd_tensors.save_redistributed, tmp_path)
    assert fc.restore(tmp_path / "0")["s"]["t"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
