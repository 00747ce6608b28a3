"""The cost of coordination with a thousand ranks, without a thousand processes.

    python -m benchmarks.planning [--ranks 64 256 1024] [--tensors 2000]

Every step that a save takes beside moving bytes runs as it is, for one rank or for the primary;
the other ranks' messages are simulated. CPU seconds of one run.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from functional_ckpt.core.arrays import chunks
from functional_ckpt.core.arrays import sharding as sharding_lib
from functional_ckpt.core.arrays.sharding import DimShard, Sharding
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.arrays.write_plan import ShardedArray, plan_writes
from functional_ckpt.core.records import records
from functional_ckpt.core.tree import structure
from functional_ckpt.format.write_files import WrittenBox
from functional_ckpt.saving import finalize, lower, write
from functional_ckpt.saving import plan as plan_lib
from functional_ckpt.storage import queries
from functional_ckpt.storage.local import LocalStorage

ITEM = "model"
MESHES: dict[str, Callable[[int], tuple[tuple[int, ...], tuple[DimShard | None, ...]]]] = {
    "FSDP": lambda n: ((n,), (DimShard(0),)),
    "FSDP x TP 8": lambda n: ((n // 8, 8), (DimShard(0, 8), DimShard(0))),
    "HSDP": lambda n: ((n // 32, 32), (None, DimShard(0))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--meshes", nargs="+", default=list(MESHES), choices=list(MESHES))
    args = parser.parse_args()
    for mesh in args.meshes:
        for num_ranks in args.ranks:
            figures = measure(mesh, num_ranks, args.tensors)
            print(json.dumps({"mesh": mesh, "ranks": num_ranks, "tensors": args.tensors} | figures))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    value = call()
    return round(time.process_time() - start, 3), value


def measure(mesh: str, num_ranks: int, num_tensors: int) -> dict[str, Any]:
    mesh_shape, cuts = MESHES[mesh](num_ranks)
    ranks = tuple(range(num_ranks))
    item = lowered(Sharding(mesh_shape, ranks, cuts), num_tensors)
    for cached in (
        sharding_lib._places,
        sharding_lib._intervals,
        sharding_lib._unit,
        chunks.digest_offsets,
    ):
        cached.cache_clear()
    signature_seconds, _ = timed(lambda: plan_lib._signature([item], with_trees=True))
    plan_seconds, plan = timed(lambda: plan_lib._plan([item], num_ranks - 1, ranks, None))
    again_seconds, _ = timed(lambda: plan_lib._plan([item], num_ranks - 1, ranks, None))
    return {
        "signature_seconds": signature_seconds,
        "plan_seconds": plan_seconds,
        "plan_again_seconds": again_seconds,
        "parts": len(plan[ITEM].parts),
    } | primary(item, num_ranks)


def lowered(sharding: Sharding, num_tensors: int) -> lower.LoweredItem:
    """Layers of a model of 8 billion parameters, as one rank of a sharded job holds them."""
    shapes = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (4096,)]
    empty = torch.empty(0)
    sources: list[lower.Source] = []
    for place in range(num_tensors):
        spec = ArraySpec(shapes[place % len(shapes)], "bfloat16")
        node = structure.ArrayNode(kind="tensor", spec=spec, name=f"layers.{place}.weight")
        sources.append(lower.Source(node, empty, sharding))
    root = structure.BranchNode(
        kind="dict",
        keys=tuple(structure.Key(source.node.name) for source in sources),
        children=tuple(source.node for source in sources),
    )
    return lower.LoweredItem(name=ITEM, handler="ModuleHandler", root=root, sources=tuple(sources))


def primary(item: lower.LoweredItem, num_ranks: int) -> dict[str, Any]:
    """Rank 0's work on all reports: read, merge, check, index, write; and a rank that restores."""
    sharding = cast("Sharding", item.sources[0].sharding)
    arrays = [
        ShardedArray(ITEM, source.node.name, source.node.spec, sharding) for source in item.sources
    ]
    with tempfile.TemporaryDirectory() as directory:
        storage = LocalStorage()
        write_seconds = 0.0
        for rank in range(num_ranks):
            report = made_up_report(arrays, rank)
            seconds, _ = timed(
                functools.partial(write.write_report, storage, directory, rank, report)
            )
            write_seconds += seconds
        num_bytes = queries.total_bytes(storage, directory)
        read_seconds, reports = timed(
            lambda: [write.read_report(storage, directory, rank) for rank in range(num_ranks)]
        )
        root = cast("structure.Node", item.root)
        own = [report[ITEM] for report in reports]
        finish_seconds, record = timed(
            lambda: finalize._finalize_item(storage, directory, item, root, own)
        )
        record_seconds, text = timed(record.to_json)
        parse_seconds, _ = timed(lambda: records.parse_item(text, "record"))
        index_bytes = sum(
            file.size_bytes for name, file in record.files.items() if name.endswith(".ocdbt")
        )
    return {
        "digests": sum(len(report.columns.digests) // 8 for report in own),
        "one_report_write_seconds": round(write_seconds / num_ranks, 4),
        "all_reports_bytes": num_bytes,
        "primary_seconds": {
            "read reports": read_seconds,
            "merge, check and index": finish_seconds,
            "write record": record_seconds,
        },
        "max_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "record_bytes": len(text),
        "index_bytes": index_bytes,
        "parse_seconds": parse_seconds,
    }


def made_up_report(arrays: Sequence[ShardedArray], rank: int) -> write.RankReport:
    """The report of one rank, with digests of their true length."""
    boxes: list[WrittenBox] = []
    name = f"shard-{rank:05d}-model.safetensors"
    end = 0
    for array, planned in zip(arrays, plan_writes(arrays, rank), strict=True):
        for piece in planned.of(rank):
            itemsize = array.spec.itemsize_bytes
            indices = planned.grid.indices(piece.box)
            count = sum(planned.grid.num_digests(index, itemsize) for index in indices)
            boxes.append(
                WrittenBox(
                    array.name,
                    planned.grid.chunk_shape,
                    piece.box,
                    name,
                    end,
                    True,
                    "0123456789abcdef" * count,
                )
            )
            end += piece.box.num_elements * itemsize
    files = {name: records.FileRecord(end, "0" * 16)}
    return {ITEM: write.ItemReport(regions=boxes, files=files, root=None)}


if __name__ == "__main__":
    main()
