"""Each rank shares its own files with the last step, without asking another."""

from __future__ import annotations

from pathlib import Path

import pytest
import shared_jobs
from gloo_workers import Workers

import functional_ckpt as fc
from functional_ckpt.verify import verify


@pytest.mark.parametrize("kind", ["replicated", "sharded", "disagreeing"])
def test_ranks_share_the_files_that_stay_the_same(
    workers: Workers, tmp_path: Path, kind: str
) -> None:
    workers.run(2, shared_jobs.save_steps, tmp_path, kind)
    links: dict[str, list[int]] = {}
    for step in range(4):
        assert verify(tmp_path / str(step)) == []
        for file in (tmp_path / f"{step}/model").glob("*.safetensors"):
            if file.stat().st_size > 2**20:
                links.setdefault(file.name, []).append(file.stat().st_nlink)
    model = fc.restore(tmp_path / "3")["model"]
    assert model["1.weight"].shape == (shared_jobs.SIZE, shared_jobs.SIZE)
    if kind == "sharded":  # of each rank one, of both layers
        assert list(links.values()) == [[2, 2, 2, 2]] * 2
    elif kind == "replicated":  # of each rank one of the layers
        assert sorted(links.values()) == [[2, 2, 2, 2], [4, 4, 4, 4]]
    else:  # no file of frozen parameters: the trained layer is in one of them
        assert [1, 1, 1, 1] in links.values()
