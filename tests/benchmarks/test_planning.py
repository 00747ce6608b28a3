"""The simulation of many ranks does the work that it measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import planning, planning_dcp
from functional_ckpt.core.arrays.write_plan import plan_writes
from functional_ckpt.format import ocdbt_tree


def test_a_restoring_rank_reads_few_locations_of_other_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocdbt_tree, "RUN_KEYS", 16)
    case = ("FSDP", 96, 50)
    assert planning.rank_plan(*case)["parts"] == 50
    planning.write_reports(str(tmp_path), *case)
    figures = planning.primary(str(tmp_path), *case)
    found = planning.restoring_rank(str(tmp_path), *case)
    assert found["record_bytes"] == figures["record_bytes"] < 20_000
    assert 50 <= found["locations"] <= 50 * 17
    assert 0 < found["read_bytes"]["nodes"] < figures["index_bytes"]


@pytest.mark.parametrize("mesh", planning.MESHES)
def test_reports_are_those_of_the_plan(mesh: str) -> None:
    arrays = planning.arrays_of(planning.lowered(mesh, 64, 50))
    for rank in (0, 13):
        regions = planning.made_up_report(arrays, rank)[planning.ITEM].columns
        boxes, _ = planning.boxes_of(arrays, plan_writes(arrays, rank), rank, "f")
        assert regions.head.names == tuple(box.name for box in boxes)
        assert regions.starts.tolist() == [start for box in boxes for start in box.box.offset]
        assert regions.shapes.tolist() == [size for box in boxes for size in box.box.shape]
        assert regions.offsets.tolist() == [box.offset for box in boxes]
        assert len(regions.digests) == sum(len(box.digests) for box in boxes) // 2


def test_dcp_plans_the_same_shards() -> None:
    figures = planning_dcp.measure(8, [(16, 4), (3,)])
    assert set(figures) == {"coordinator", "restoring rank"}
