"""Ranks whose trees differ: pipeline stages, per-rank values, replicas; and refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Workers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

import functional_ckpt as fc
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.verify.checkpoint import verify_checkpoint

MIB = 2**20


def save(directory: Path, items: dict[str, Any], step: int = 0) -> None:
    with fc.CheckpointManager(directory) as opened:
        handle = opened.save(step, items)
        assert handle is not None
        handle.result(60)


def restore(directory: Path, items: dict[str, Any] | None = None, **options: Any) -> fc.Restored:
    with fc.CheckpointManager(directory, read_only=True) as opened:
        return opened.restore(None, items, **options)


# ------------------------------------------------------------------------------------ values


def save_own_values(directory: Path) -> None:
    rank = dist.get_rank()
    random.seed(rank)
    torch.manual_seed(rank)
    tree = {"rank": rank, "same": "s", "odd": 1 if rank != 2 else None, "w": torch.ones(3)}
    # Rank 0 and the last agree on a value that the others do not have.
    if rank in (0, dist.get_world_size() - 1):
        tree["ends"] = 7 + rank
    save(directory, {"tree": tree, "rng": fc.Rng()})


def restore_own_values(directory: Path) -> tuple[Any, float]:
    rank = dist.get_rank()
    tree = {"rank": 0, "same": "", "odd": 0, "w": torch.zeros(3)}
    if rank in (0, dist.get_world_size() - 1):
        tree["ends"] = 0
    restored = restore(directory, {"tree": tree, "rng": fc.Rng()})["tree"]
    restored["w"] = restored["w"].tolist()
    return restored, random.random() + torch.rand(()).item()


def test_every_rank_gets_its_own_values_back(workers: Workers, tmp_path: Path) -> None:
    workers.run(4, save_own_values, tmp_path)
    found = workers.run(4, restore_own_values, tmp_path)
    for rank, (tree, drawn) in enumerate(found):
        expected: dict[str, Any] = {"rank": rank, "same": "s", "odd": 1, "w": [1.0] * 3}
        if rank == 2:
            expected["odd"] = None
        if rank in (0, 3):
            expected["ends"] = 7 + rank
        assert tree == expected
        random.seed(rank)
        torch.manual_seed(rank)
        assert drawn == random.random() + torch.rand(()).item()
    assert verify_checkpoint(LocalStorage(), str(tmp_path / "0")) == []


def test_generators_of_another_number_of_ranks_are_refused_on_all(
    workers: Workers, tmp_path: Path
) -> None:
    workers.run(4, save_own_values, tmp_path)
    for failure in workers.failures(2, restore_own_values, tmp_path):
        assert "MismatchError" in failure.kinds
        assert "saved by 4 ranks, restoring on 2" in failure.text


def restore_plain_values(directory: Path) -> Any:
    return restore(directory, {"tree": {"rank": 0, "same": ""}}, strict=False)["tree"]["rank"]


def test_plain_values_of_another_number_of_ranks_are_those_of_the_first(
    workers: Workers, tmp_path: Path
) -> None:
    workers.run(4, save_own_values, tmp_path)
    assert workers.run(2, restore_plain_values, tmp_path) == [0, 0]
    alone = fc.restore(tmp_path / "0")
    assert alone["tree"]["rank"] == 0
    assert sorted(alone["rng"]) == [f"rank_{rank}" for rank in range(4)]


# ------------------------------------------------------------------------------------ stages


class Stage(torch.nn.Module):
    """Two layers of four; the others are other ranks'. The norm at the end is everyone's."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        super().__init__()
        for layer in range(4):
            if layer * num_ranks // 4 == rank:
                torch.manual_seed(layer)
                self.add_module(f"layer{layer}", torch.nn.Linear(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def stage_items(rank: int, num_ranks: int, *, trained: bool) -> dict[str, Any]:
    model = Stage(rank, num_ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if trained:
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    return {"model": model, "optimizer": fc.Optimizer(optimizer, model)}


def facts(items: dict[str, Any]) -> dict[str, Any]:
    named = dict(items["model"].named_parameters())
    state = items["optimizer"].value.state
    weights = {name: parameter.tolist() for name, parameter in named.items()}
    moments = {name: state[p]["exp_avg"].tolist() for name, p in named.items() if p in state}
    return {"weights": weights, "moments": moments}


def save_stage(directory: Path) -> dict[str, Any]:
    items = stage_items(dist.get_rank(), dist.get_world_size(), trained=True)
    save(directory, items)
    return facts(items)


def restore_stage(directory: Path) -> dict[str, Any]:
    items = stage_items(dist.get_rank(), dist.get_world_size(), trained=False)
    report = restore(directory, items).report
    assert not report, report
    return facts(items)


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {kind: {k: v for each in found for k, v in each[kind].items()} for kind in found[0]}


@pytest.mark.matrix(2)
@pytest.mark.parametrize("num_restored", [1, 2, 4])
@pytest.mark.parametrize("num_saved", [1, 2, 4])
def test_pipeline_stages_are_one_model(
    num_saved: int, num_restored: int, workers: Workers, tmp_path: Path
) -> None:
    saved = joined(workers.run(num_saved, save_stage, tmp_path))
    assert len(saved["weights"]) == len(saved["moments"]) == 8
    assert joined(workers.run(num_restored, restore_stage, tmp_path)) == saved
    tree = fc.restore(tmp_path / "0")
    names = [f"layer{layer}.{kind}" for layer in range(4) for kind in ("weight", "bias")]
    assert tree["optimizer"]["param_groups"][0]["params"] == names
    assert sorted(tree["model"]) == sorted(names)


def restore_two_of_four(directory: Path) -> None:
    rank = dist.get_rank()
    model = Stage(rank, 4)  # of two ranks: no rank has the layers of stages 2 and 3
    restore(directory, {"model": model})


def test_leaf_that_no_rank_expects_is_unexpected_on_all(workers: Workers, tmp_path: Path) -> None:
    workers.run(4, save_stage, tmp_path)
    for failure in workers.failures(2, restore_two_of_four, tmp_path):
        assert "MismatchError" in failure.kinds
        for name in ("layer2.weight", "layer2.bias", "layer3.weight", "layer3.bias"):
            assert f"not expected by the target: model['{name}']" in failure.text
        assert "layer0" not in failure.text and "layer1" not in failure.text


def save_conflict(directory: Path) -> None:
    rank = dist.get_rank()
    save(directory, {"tree": {f"own{rank}": 1, "x": torch.zeros(2 if rank < 2 else 3)}})


def test_a_leaf_that_two_stages_disagree_on_names_both(workers: Workers, tmp_path: Path) -> None:
    for failure in workers.failures(3, save_conflict, tmp_path):
        assert "tree.x: rank 0 holds tensor float32[2], rank 2 holds tensor float32[3]" in (
            failure.text
        )
    with fc.CheckpointManager(tmp_path) as opened:
        assert opened.all_steps() == []


def mismatch_on_one_rank(directory: Path) -> None:
    size = 3 if dist.get_rank() == 1 else 2
    target = torch.full((size,), 5.0)
    try:
        restore(directory, {"tree": {"x": fc.handlers.Fill(target)}})
    finally:
        assert target.tolist() == [5.0] * size


def save_one(directory: Path) -> None:
    save(directory, {"tree": {"x": torch.zeros(2)}})


def test_a_mismatch_on_one_rank_is_an_error_on_all(workers: Workers, tmp_path: Path) -> None:
    workers.run(3, save_one, tmp_path)
    failures = workers.failures(3, mismatch_on_one_rank, tmp_path)
    assert "MismatchError" in failures[1].kinds
    for rank in (0, 2):
        assert "CoordinationError" in failures[rank].kinds
        assert "ank 1 failed" in failures[rank].text
        assert failures[rank].ranks == (1,)


# ------------------------------------------------------------------------------------ refusals


def save_partial(directory: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placement = Partial("sum") if dist.get_rank() == 1 else Shard(0)
    local = torch.ones(2)
    tensor = DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=torch.Size([4]), stride=(1,)
    )
    save(directory, {"tree": {"deep": [tensor]}})


def test_partial_sums_are_refused_by_name_on_every_rank(workers: Workers, tmp_path: Path) -> None:
    first, second = workers.failures(2, save_partial, tmp_path)
    assert "UnsupportedLeafError" in second.kinds
    for failure in (first, second):
        assert "tree['deep'][0]" in failure.text
        assert "Partial(sum)" in failure.text
    assert first.ranks == (1,)


class OfEachRank:
    """A state of each rank's own that holds a part of something global."""

    def state_dict(self) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return {"x": DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_sharded_state_of_each_rank(directory: Path) -> None:
    save(directory, {"own": fc.Stateful(OfEachRank(), per_rank=True)})


def test_a_dtensor_in_a_state_of_each_rank_is_refused(workers: Workers, tmp_path: Path) -> None:
    for failure in workers.failures(2, save_sharded_state_of_each_rank, tmp_path):
        assert "is a DTensor" in failure.text


def save_different_steps(directory: Path) -> None:
    with fc.CheckpointManager(directory) as opened:
        opened.save(5 + dist.get_rank(), {"tree": {"x": 1}})


def save_different_items(directory: Path) -> None:
    save(directory, {f"item{dist.get_rank()}": {"x": 1}})


@pytest.mark.parametrize("job", [save_different_steps, save_different_items])
def test_ranks_with_different_calls_raise(job: Any, workers: Workers, tmp_path: Path) -> None:
    for failure in workers.failures(2, job, tmp_path):
        assert "CoordinationError" in failure.kinds
        assert "must make the same calls" in failure.text


# ------------------------------------------------------------------------------------ replicas


def save_replicated(directory: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tree = {f"w{i}": torch.rand(MIB // 4, generator=generator) for i in range(12)}
    save(directory, {"tree": tree})


def size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_replicated_tensors_are_written_once_by_all(workers: Workers, tmp_path: Path) -> None:
    workers.run(4, save_replicated, tmp_path / "four")
    workers.run(1, save_replicated, tmp_path / "one")
    four, one = size_bytes(tmp_path / "four"), size_bytes(tmp_path / "one")
    assert abs(four - one) < 100_000
    assert 12 * MIB <= one < 12.1 * MIB
    shares = [path.stat().st_size for path in (tmp_path / "four/0/tree").glob("*.safetensors")]
    assert len(shares) == 4
    assert max(shares) <= 1.1 * sum(shares) / 4
    left, right = (fc.restore(tmp_path / name / "0")["tree"] for name in ("four", "one"))
    assert all(torch.equal(left[name], right[name]) for name in right)


# ------------------------------------------------------------------------------------ sub-groups


def replicas_alone(directory: Path) -> list[int]:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))["shard"]
    # Only the second replica checkpoints; the first does something else in the meantime.
    if rank < 2:
        return []
    spread = [Shard(0)]
    tensor = DTensor.from_local(torch.full((2,), float(rank)), mesh, spread, run_check=False)
    target = DTensor.from_local(torch.zeros(2), mesh, spread, run_check=False)
    with fc.CheckpointManager(directory, process_group=mesh.get_group()) as opened:
        handle = opened.save(1, {"tree": {"x": tensor, "rank": rank}})
        assert handle is not None
        handle.result(60)
        got = opened.restore(1, {"tree": {"x": target, "rank": 0}})["tree"]
    return [*got["x"].to_local().tolist(), got["rank"]]


def test_a_replica_checkpoints_alone(workers: Workers, tmp_path: Path) -> None:
    found = workers.run(4, replicas_alone, tmp_path)
    assert found == [[], [], [2.0, 2.0, 2], [3.0, 3.0, 3]]
    alone = fc.restore(tmp_path / "1")["tree"]
    assert alone["x"].tolist() == [2.0, 2.0, 3.0, 3.0]


def one_rank_alone(directory: Path) -> list[float]:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))["shard"]
    tensor = DTensor.from_local(torch.full((2,), float(rank)), mesh, [Shard(0)], run_check=False)
    with fc.CheckpointManager(directory / str(rank), process_group=mesh.get_group()) as opened:
        handle = opened.save(1, {"tree": {"x": tensor}})
        assert handle is not None
        handle.result(60)
    return fc.restore(directory / str(rank) / "1")["tree"]["x"].tolist()


def test_a_replica_may_be_one_rank(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(2, one_rank_alone, tmp_path) == [[0.0, 0.0], [1.0, 1.0]]


def save_part_of_a_mesh(directory: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    tensor = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
    fc.save(directory / str(dist.get_rank()), {"tree": {"x": tensor}})


def test_a_mesh_that_reaches_out_of_the_group_is_refused(workers: Workers, tmp_path: Path) -> None:
    for failure in workers.failures(2, save_part_of_a_mesh, tmp_path):
        assert "UnsupportedLeafError" in failure.kinds
        assert "outside the saving process group (1 ranks)" in failure.text


def save_on_some_of_the_mesh(directory: Path) -> None:
    mesh = init_device_mesh("cpu", (3,))
    tensor = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
    save(directory, {"tree": {"x": tensor} if dist.get_rank() else {}})


def test_missing_shard_fails_the_save(workers: Workers, tmp_path: Path) -> None:
    for failure in workers.failures(3, save_on_some_of_the_mesh, tmp_path):
        assert "Every rank of a DTensor's mesh must save it" in failure.text


def outside_the_group(directory: Path) -> None:
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        fc.CheckpointManager(directory, process_group=group)
    else:
        raise RuntimeError("rank 1 is not in the process_group")


def test_rank_outside_the_group_raises(workers: Workers, tmp_path: Path) -> None:
    failures = workers.failures(2, outside_the_group, tmp_path)
    assert "UsageError" in failures[1].kinds
    assert "Rank 1 is not in the process_group" in failures[1].text


# ------------------------------------------------------------------------------------ Orbax


def test_files_for_orbax_are_complete(workers: Workers, tmp_path: Path) -> None:
    """Whatever Orbax's metadata calls an array or a number is one, the values of each rank too."""
    workers.run(4, save_own_values, tmp_path)
    import tensorstore as ts

    record = json.loads((tmp_path / "0/tree/_METADATA").read_text())["tree_metadata"]
    store = ts.KvStore.open(f"file://{tmp_path}/0/tree/|ocdbt:").result()
    keys = {key.decode() for key in store.list().result()}
    leaves = {
        ".".join(key["key"] for key in entry["key_metadata"]): entry["value_metadata"]["value_type"]
        for entry in record.values()
    }
    assert leaves["rank.rank_3"] == leaves["ends.rank_0"] == "scalar"
    for name, kind in leaves.items():
        if kind in ("scalar", "np.ndarray"):
            assert f"{name}/zarr.json" in keys, name
            assert any(key.startswith(f"{name}/c") for key in keys), name
