"""Rounds between ranks and requests to storage of a save and a restore."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import torch.distributed as dist
from doubles import Counting
from gloo_workers import Workers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import functional_ckpt as fc
from functional_ckpt.distributed.torch_store import default_coordinator
from functional_ckpt.format import index, read_plan
from functional_ckpt.saving import lower
from functional_ckpt.saving import plan as plan_lib

Shapes: TypeAlias = dict[str, tuple[int, ...]]
# A transformer of 64 MiB: embeddings, and six blocks of attention, feed-forward and norms.
SHAPES: Shapes = {
    "embedding": (8192, 512),
    **{
        f"{layer}.{name}": shape
        for layer in range(6)
        for name, shape in {
            "qkv": (1536, 512),
            "out": (512, 512),
            "up": (1024, 512),
            "down": (512, 1024),
            "norm": (512,),
        }.items()
    },
}
# Edges between ranks are few to the bytes between them: 48 MiB in three arrays.
LARGE: Shapes = dict.fromkeys("abc", (4096, 1024))


def sharded(
    layout: tuple[int, ...], spread: Sequence[Any], shapes: Shapes, *, filled: bool
) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", layout)
    tree: dict[str, Any] = {}
    for name, shape in shapes.items():
        local = torch.Size(shape)
        cuts = [Shard(min(p.dim, len(shape) - 1)) if p.is_shard() else p for p in spread]
        template = torch.zeros(local)
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        for mesh_dim, cut in enumerate(cuts):
            if cut.is_shard():
                parts, _ = cut._split_tensor(template, mesh.size(mesh_dim), with_padding=False)
                template = parts[coordinate[mesh_dim]]
        part = template.clone().contiguous()
        if filled:
            part.copy_(torch.rand(part.shape))
        tree[name] = DTensor.from_local(
            part, mesh, cuts, run_check=False, shape=local, stride=torch.zeros(shape).stride()
        )
    return tree


def save_sharded(
    directory: Path, shapes: Shapes, layout: tuple[int, ...], spread: Sequence[Any]
) -> None:
    with fc.CheckpointManager(directory) as manager:
        assert manager.save(0, {"tree": sharded(layout, spread, shapes, filled=True)})


def restore_counted(
    directory: Path,
    shapes: Shapes,
    share_reads: bool,
    layout: tuple[int, ...],
    spread: Sequence[Any],
) -> tuple[int, int]:
    """Bytes that this rank asked of storage, and bytes of its shards."""
    asked: list[int] = []
    plan_reads = read_plan.plan_reads

    def spy(*args: Any, **options: Any) -> list[read_plan.Batch]:
        batches = plan_reads(*args, **options)
        asked.extend(read.num_bytes for batch in batches for read in batch)
        return batches

    tree = sharded(layout, spread, shapes, filled=False)
    index.plan_reads = spy
    try:
        with fc.CheckpointManager(directory, read_only=True) as manager:
            target = {"tree": {name: fc.handlers.Fill(t) for name, t in tree.items()}}
            manager.restore(0, target, share_reads=share_reads)
    finally:
        index.plan_reads = plan_reads
    return sum(asked), sum(4 * tensor.to_local().numel() for tensor in tree.values())


ROWS, COLUMNS = (Shard(0),), (Shard(1),)


def overhead(
    workers: Workers,
    directory: Path,
    saved: tuple[tuple[int, ...], Sequence[Any]],
    restored: tuple[tuple[int, ...], Sequence[Any]],
    shapes: Shapes = SHAPES,
    *,
    share_reads: bool = False,
) -> float:
    """Bytes asked of storage by all ranks, per byte of their shards."""
    sizes = [torch.Size(layout).numel() for layout, _ in (saved, restored)]
    workers.run(sizes[0], save_sharded, directory, shapes, *saved)
    found = workers.run(sizes[1], restore_counted, directory, shapes, share_reads, *restored)
    asked, wanted = (sum(column) for column in zip(*found, strict=True))
    assert wanted >= 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    return asked / wanted


@pytest.mark.parametrize(("num_saved", "num_restored"), [(4, 4), (4, 2), (2, 4), (4, 1), (1, 4)])
def test_rows_are_read_once(
    num_saved: int, num_restored: int, workers: Workers, tmp_path: Path
) -> None:
    saved, restored = ((num_saved,), ROWS), ((num_restored,), ROWS)
    assert overhead(workers, tmp_path, saved, restored) <= 1.05


@pytest.mark.matrix(2)
@pytest.mark.parametrize(("num_saved", "num_restored"), [(4, 3), (3, 4), (6, 4)])
@pytest.mark.parametrize(
    ("shapes", "bound"), [(LARGE, 1.04), (SHAPES, 1.1)], ids=["large", "small"]
)
def test_where_edges_differ_two_ranks_read_one_digest_block(
    shapes: Shapes,
    bound: float,
    num_saved: int,
    num_restored: int,
    workers: Workers,
    tmp_path: Path,
) -> None:
    """Bytes are verified by the block: where two ranks meet inside of one, both ask for it."""
    saved, restored = ((num_saved,), ROWS), ((num_restored,), ROWS)
    assert 1 < overhead(workers, tmp_path, saved, restored, shapes) <= bound


def test_columns_out_of_rows_read_whole_chunks(workers: Workers, tmp_path: Path) -> None:
    saved, restored = ((2,), ROWS), ((4,), COLUMNS)
    assert 3.99 < overhead(workers, tmp_path, saved, restored) <= 4.01


def test_rows_out_of_columns_read_what_they_need(workers: Workers, tmp_path: Path) -> None:
    # A row's part is contiguous in each column chunk.
    saved, restored = ((4,), COLUMNS), ((2,), ROWS)
    assert overhead(workers, tmp_path, saved, restored) <= 1.05


def test_replicas_each_read_the_whole(workers: Workers, tmp_path: Path) -> None:
    saved, restored = ((2,), ROWS), ((2,), (Replicate(),))
    assert overhead(workers, tmp_path, saved, restored) <= 1.05


@pytest.mark.parametrize(
    ("saved", "restored", "bound"),
    [
        (((2,), ROWS), ((4,), COLUMNS), 1.0),
        (((4,), COLUMNS), ((3,), ROWS), 1.0),
        (((4,), ROWS), ((3,), ROWS), 1.0),
        (((2,), ROWS), ((3,), (Replicate(),)), 1 / 3),
        (((4,), ROWS), ((2, 2), (Replicate(), Shard(0))), 1 / 2),
    ],
    ids=["columns", "rows", "edges", "replicas", "hsdp"],
)
def test_ranks_that_read_for_each_other_ask_for_nothing_twice(
    saved: Any, restored: Any, bound: float, workers: Workers, tmp_path: Path
) -> None:
    factor = overhead(workers, tmp_path, saved, restored, share_reads=True)
    assert factor == pytest.approx(bound, abs=1e-3)


# ------------------------------------------------------------------------------------ rounds


def rounds_of(directory: Path, num_leaves: int, alike: bool) -> list[list[tuple[str, int]]]:
    """The rounds of a first save, of a second, and of a restore."""
    rounds: list[tuple[str, int]] = []
    rank = dist.get_rank()
    tree: dict[str, Any] = {f"leaf{i}": torch.full((2,), float(i)) for i in range(num_leaves)}
    if not alike:
        tree[f"of_rank_{rank}"] = torch.ones(1)
    found: list[list[tuple[str, int]]] = []
    coordinator = Counting(default_coordinator(), rounds)
    with fc.CheckpointManager(directory, coordinator=coordinator) as manager:
        for step in range(2):
            rounds.clear()
            handle = manager.save(step, {"tree": tree})
            assert handle is not None
            handle.result(100)
            found.append(list(rounds))
        rounds.clear()
        manager.restore(0, {"tree": tree})
        found.append(list(rounds))
    return found


@pytest.mark.parametrize("alike", [True, False])
def test_rounds_do_not_grow_with_the_leaves(alike: bool, workers: Workers, tmp_path: Path) -> None:
    few = workers.run(2, rounds_of, tmp_path / "few", 10, alike)
    many = workers.run(2, rounds_of, tmp_path / "many", 10_000, alike)
    for rank in range(2):
        subjects = [[what for what, _ in part] for part in few[rank]]
        assert subjects == [[what for what, _ in part] for part in many[rank]]
        first, second, restored = subjects
        plans = [["the plan of step 0"], ["the plan of step 1"]]
        if not alike:
            plans[0].append("the leaves of step 0")
        assert first == [*plans[0], "starting step 0", "writing step 0"]
        assert second == [*plans[1], "starting step 1", "writing step 1"]
        assert len(restored) == 3 if alike else 4
        # A second save sends digests and a sample position, however many leaves there are.
        sizes = [sum(size for _, size in part[1]) for part in (few[rank], many[rank])]
        assert abs(sizes[0] - sizes[1]) < 16
        assert max(sizes) < 1_000


def plan_thrice() -> list[bool]:
    planner = plan_lib.SavePlanner(default_coordinator())
    ranks = tuple(range(dist.get_world_size()))
    rank = dist.get_rank()
    registry = fc.handlers.default_registry()
    plans: list[Any] = []
    for step, extra in enumerate((0, 0, 1, 1)):
        tree = {f"leaf{i}": torch.ones(2) for i in range(5 + extra * rank)}
        items = lower.lower({"tree": tree}, registry, rank=rank, ranks=ranks)
        with planner.planning(step) as planning:
            planning.items = items
        plans.append(planning.plan["tree"])
    return [plans[0] is plans[1], plans[1] is plans[2], plans[2] is plans[3]]


def test_a_plan_is_made_once_for_a_structure(workers: Workers) -> None:
    # When the structure of one rank changes, every rank plans again.
    assert workers.run(2, plan_thrice) == [[True, False, True]] * 2


def plan_after_a_failure() -> list[int]:
    """Rank 1 fails during planning: no rank uses a stale plan afterwards."""
    rank = dist.get_rank()
    rounds: list[tuple[str, int]] = []
    planner = plan_lib.SavePlanner(Counting(default_coordinator(), rounds))
    registry = fc.handlers.default_registry()

    def lowered(num_leaves: int) -> Any:
        tree = {f"leaf{i}": torch.ones(2) for i in range(num_leaves)}
        return lower.lower({"tree": tree}, registry, rank=rank, ranks=(0, 1))

    def plan(step: int, num_leaves: int) -> Any:
        with planner.planning(step) as planning:
            if not num_leaves:
                raise ValueError("boom")
            planning.items = lowered(num_leaves)
        return planning.plan["tree"]

    plan(0, 3)
    try:
        plan(1, 0 if rank else 3)
    except (ValueError, fc.CheckpointError):
        pass
    else:
        raise AssertionError("the error was lost")
    counts: list[int] = []
    for step in (2, 3):
        rounds.clear()
        assert len(plan(step, 3).parts) in (1, 2)
        counts.append(len(rounds))
    return counts


def test_a_failed_round_leaves_no_stale_plan(workers: Workers) -> None:
    assert workers.run(2, plan_after_a_failure) == [[1, 1]] * 2
