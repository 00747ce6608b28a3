"""Progress, names and beginnings where ranks see them differently: the primary's count for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Workers

import functional_ckpt as fc

NAMES = fc.step_names.StepTemplate(template="ep{epoch}-ba{batch}-after{total_wct}s")


def train(directory: Path, until: int) -> dict[str, Any]:
    """Each rank counts its own seconds: only rank 0 says how a step is called."""
    saved: list[int] = []
    with fc.CheckpointManager(
        directory,
        save_policy=[fc.policies.every("1ep"), fc.policies.every("5ba")],
        step_name=NAMES,
        latest_link="latest",
    ) as manager:
        begun = manager.restore_or({"state": {"x": torch.zeros(2)}})
        progress = begun.progress or fc.Progress(batches_per_epoch=4)
        manager.check_start(begun.next_step)
        while progress.batch < until:
            if progress.batch_in_epoch == 4:
                progress = progress.next_epoch()
            progress = progress.next_batch(seconds=1.0 + 10 * dist.get_rank())
            for _ in range(2):
                items = {"state": {"x": torch.full((2,), float(progress.batch))}}
                if manager.save(progress.batch, items, progress=progress) is not None:
                    saved.append(progress.batch)
        manager.wait_until_finished()
        steps = manager.all_steps()
    return {"begun": begun.step, "x": begun["state"]["x"].tolist(), "saved": saved, "steps": steps}


@pytest.mark.parametrize("num_ranks", [2])
def test_ranks_save_the_same_boundaries_under_one_name(
    workers: Workers, tmp_path: Path, num_ranks: int
) -> None:
    for found in workers.run(num_ranks, train, tmp_path, 8):
        assert found == {"begun": None, "x": [0, 0], "saved": [4, 5, 8], "steps": [4, 5, 8]}
    for found in workers.run(num_ranks, train, tmp_path, 13):
        assert found["begun"] == 8
        assert found["x"] == [8, 8]
        assert found["saved"] == [10, 12]
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    # Both ranks continued with the seconds of the primary.
    assert {"ep0-ba4-after4s", "ep1-ba8-after8s", "ep2-ba12-after12s", "latest"} <= names
    assert len(names) == 6
    assert fc.restore(tmp_path / "latest")["state"]["x"].tolist() == [12, 12]
