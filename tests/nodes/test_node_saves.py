"""Saves to a directory on each node; nodes as threads of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from thread_ranks import ThreadCoordinator, results, run_ranks

import functional_ckpt as fc
from functional_ckpt.steps.node_inventory import read_part
from functional_ckpt.storage.local import LocalStorage

_NODES = "aabb"


def _items(value: float, rank: int) -> dict[str, Any]:
    return {
        "tree": {f"of{rank}": torch.full((100,), value + rank)},
        "config": fc.Json({"v": value}),
    }


def manager(root: Path, group: ThreadCoordinator, nodes: str = _NODES, **options: Any) -> Any:
    node = nodes[group.rank]
    option = fc.NodeLocal(replicas=0, node=node)
    return fc.CheckpointManager(root / node, node_local=option, coordinator=group, **options)


def save(root: Path, *steps: int, nodes: str = _NODES, **options: Any) -> list[Any]:
    def job(group: ThreadCoordinator) -> list[int]:
        with manager(root, group, nodes, **options) as made:
            for step in steps:
                made.save(step, _items(float(step), group.rank)).result()
            return made.all_steps()

    return run_ranks(len(nodes), job)


def test_each_node_holds_its_part_and_all_records(tmp_path: Path) -> None:
    assert results(save(tmp_path, 3, 5)) == [[3, 5]] * 4
    parts = {node: tmp_path / node / "5" for node in "ab"}
    records = {node: read_part(LocalStorage(), str(path)) for node, path in parts.items()}
    assert records["a"] == records["b"]
    record = records["a"]
    assert record is not None and record.step == 5 and len(record.nodes) == 2
    for node in record.nodes:
        for name in record.files:
            assert (parts[node.name] / name).exists() == (name in node.files)
    others = [
        {
            str(path.relative_to(part)): path.read_bytes()
            for path in part.rglob("*")
            if path.is_file() and str(path.relative_to(part)) not in record.files
        }
        for part in parts.values()
    ]
    assert others[0] == others[1]
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]
