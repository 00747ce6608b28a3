"""State that each rank has for itself, restored by another number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Workers

import functional_ckpt as fc


class Queue:
    """Files that a rank has still to read."""

    def __init__(self, files: list[str]) -> None:
        self.files = files


@dataclasses.dataclass(frozen=True, slots=True)
class QueueHandler(fc.handlers.Handler):
    """Files are redistributed when the number of ranks has changed."""

    per_rank: bool = True

    def lower(self, value: Any) -> Any:
        return {"files": list(value.files), "count": torch.tensor(len(value.files))}

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        return fc.handlers.AS_SAVED

    def resize(self, trees: Sequence[Any], rank: int, num_ranks: int) -> Any:
        files = sorted(file for tree in trees for file in tree["files"])
        assert len(files) == sum(tree["count"].item() for tree in trees)
        own = files[rank::num_ranks]
        return {"files": own, "count": torch.tensor(len(own))}

    def lift(self, value: Any, tree: Any) -> Any:
        assert tree["count"].item() == len(tree["files"])
        value.files = tree["files"]
        return value


def items(queue: Queue) -> dict[str, Any]:
    return {"queue": fc.CheckpointItem(queue, QueueHandler()), "rng": fc.Rng()}


def save(directory: Path) -> None:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    queue = Queue([f"{rank}.{index}" for index in range(rank + 1)])
    with fc.CheckpointManager(directory) as manager:
        manager.save(0, {**items(queue), "note": {"rank": rank}})


def restore_queue(directory: Path) -> list[str]:
    queue = Queue(["not yet"])
    with fc.CheckpointManager(directory, read_only=True) as manager:
        restored = manager.restore(0, {"queue": items(queue)["queue"]})
    assert restored["queue"] is queue
    return queue.files


def restore_rng(directory: Path) -> float:
    torch.manual_seed(1000)
    queue = Queue(["not yet"])
    before = torch.get_rng_state()
    with fc.CheckpointManager(directory, read_only=True) as manager:
        try:
            manager.restore(0, items(queue))
        except fc.CheckpointError:
            assert queue.files == ["not yet"]
            assert torch.equal(torch.get_rng_state(), before)
            raise
    return torch.rand(()).item()


def derive_rng(directory: Path) -> float:
    torch.manual_seed(1000)
    with fc.CheckpointManager(directory, read_only=True) as manager:
        manager.restore(0, {"rng": fc.Rng(other_ranks="derive")})
    return torch.rand(()).item()


def restore_without_target(directory: Path) -> Any:
    with fc.CheckpointManager(directory, read_only=True) as manager:
        restored = manager.restore(0, {"queue": None, "note": None})
    return restored["queue"], restored["note"]


@pytest.mark.parametrize("num_saved", [1, 2, 3])
def test_state_of_each_rank(num_saved: int, workers: Workers, tmp_path: Path) -> None:
    workers.run(num_saved, save, tmp_path)
    everything = sorted(f"{rank}.{index}" for rank in range(num_saved) for index in range(rank + 1))
    for num_ranks in (1, 2, 3):
        queues = workers.run(num_ranks, restore_queue, tmp_path)
        if num_ranks == num_saved:
            expected = [[f"{rank}.{i}" for i in range(rank + 1)] for rank in range(num_ranks)]
            drawn = [torch.rand((), generator=_seeded(rank)).item() for rank in range(num_ranks)]
            assert workers.run(num_ranks, restore_rng, tmp_path) == drawn
        else:
            expected = [everything[rank::num_ranks] for rank in range(num_ranks)]
            for failure in workers.failures(num_ranks, restore_rng, tmp_path):
                assert "MismatchError" in failure.kinds or "CoordinationError" in failure.kinds
                assert f"saved by {num_saved} ranks" in failure.text
                assert f"restoring on {num_ranks}" in failure.text
        assert queues == expected


def test_without_a_target_everything_comes_back(workers: Workers, tmp_path: Path) -> None:
    workers.run(3, save, tmp_path)
    for queue, note in workers.run(2, restore_without_target, tmp_path):
        assert {name: tree["files"] for name, tree in queue.items()} == {
            "rank_0": ["0.0"],
            "rank_1": ["1.0", "1.1"],
            "rank_2": ["2.0", "2.1", "2.2"],
        }
        assert note == {"rank": 0}  # a plain value in an item that all share: rank 0's
    outcomes = workers.run(3, restore_without_target, tmp_path)
    assert [note for _, note in outcomes] == [{"rank": rank} for rank in range(3)]
    assert [len(queue["files"]) for queue, _ in outcomes] == [1, 2, 3]


def test_derived_streams_differ_between_ranks_and_repeat(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, save, tmp_path)
    drawn = workers.run(3, derive_rng, tmp_path)
    assert len(set(drawn)) == 3
    assert workers.run(3, derive_rng, tmp_path) == drawn
    # The same number of ranks: each resumes with its own.
    expected = [torch.rand((), generator=_seeded(rank)).item() for rank in range(2)]
    assert workers.run(2, derive_rng, tmp_path) == expected
    workers.run(1, derive_rng, tmp_path)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_metadata_shows_the_state_of_each_rank(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, save, tmp_path)
    found = fc.metadata(tmp_path / "0").items
    assert found["queue"].keys() == found["rng"].keys() == {"rank_0", "rank_1"}
    assert found["note"] == {"rank": {"rank_0": 0, "rank_1": 1}}


def test_state_that_cannot_be_resized_is_left_alone_where_that_is_allowed(
    workers: Workers, tmp_path: Path
) -> None:
    workers.run(2, save, tmp_path)
    before = torch.get_rng_state()
    restored = fc.restore(tmp_path / "0", {"rng": fc.Rng(), "note": None}, strict=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert any("rng" in each for each in restored.report.mismatched)
    with pytest.raises(fc.errors.MismatchError):
        fc.restore(tmp_path / "0", {"rng": fc.Rng()})
