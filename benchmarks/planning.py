"""The cost of coordination with a thousand ranks, without a thousand processes.

    python -m benchmarks.planning [--ranks 64 256 1024] [--tensors 2000] [--merge-ranks 16 64]

Every step that a save takes beside moving bytes runs as it is, for one rank or for the primary;
the other ranks' messages are simulated. Seconds of one run.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from functional_ckpt.core.arrays import chunks
from functional_ckpt.core.arrays import sharding as sharding_lib
from functional_ckpt.core.arrays.sharding import DimShard, Sharding
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.records import merge_ranks, records
from functional_ckpt.core.records import orbax as orbax_lib
from functional_ckpt.core.tree import structure
from functional_ckpt.format import write_tensorstore
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
    parser.add_argument("--merge-ranks", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--meshes", nargs="+", default=list(MESHES), choices=list(MESHES))
    args = parser.parse_args()
    for mesh in args.meshes:
        for num_ranks in args.ranks:
            figures = measure(mesh, num_ranks, args.tensors)
            print(json.dumps({"mesh": mesh, "ranks": num_ranks, "tensors": args.tensors} | figures))
    for num_ranks in args.merge_ranks:
        seconds = merge(num_ranks, args.tensors)
        print(json.dumps({"merge of": num_ranks, "tensors": args.tensors, "seconds": seconds}))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call()
    return round(time.perf_counter() - start, 3), value


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
    } | primary(item, plan[ITEM], num_ranks)


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


def primary(item: lower.LoweredItem, plan: plan_lib.ItemPlan, num_ranks: int) -> dict[str, Any]:
    """Rank 0's work on all reports: read, merge, check, join, write."""
    grids = {s.node.name: a.grid for s, a in zip(item.sources, plan.arrays, strict=True)}
    with tempfile.TemporaryDirectory() as directory:
        storage = LocalStorage()
        num_bytes = 0
        write_seconds = 0.0
        for rank in range(num_ranks):
            report = made_up_report(item, grids, rank, num_ranks)
            seconds, _ = timed(
                functools.partial(write.write_report, storage, directory, rank, report)
            )
            write_seconds += seconds
        num_bytes = queries.total_bytes(storage, directory)
        read_seconds, reports = timed(
            lambda: [write.read_report(storage, directory, rank) for rank in range(num_ranks)]
        )
    root = cast("structure.Node", item.root)
    unite_seconds, united = timed(
        lambda: merge_ranks.merge_ranks([(rank, root) for rank in range(num_ranks)], item=ITEM)
    )
    nodes = [source.node for source in item.sources]
    check_seconds, _ = timed(lambda: finalize._check_whole(ITEM, nodes, grids, reports))
    join_seconds, joined = timed(
        lambda: write_tensorstore.join_digests([report.digests[ITEM] for report in reports])
    )
    record = records.ItemRecord(
        item=ITEM,
        handler=item.handler,
        root=united,
        arrays={
            name: records.ArrayRecord(g.chunk_shape, joined.get(name, ""))
            for name, g in grids.items()
        },
    )
    record_seconds, text = timed(record.to_json)
    orbax_seconds, orbax = timed(lambda: orbax_lib.tree_metadata(united))
    parse_seconds, _ = timed(lambda: records.parse_item(text, "record"))
    return {
        "shards": sum(grid.num_chunks for grid in grids.values()),
        "one_report_write_seconds": round(write_seconds / num_ranks, 4),
        "all_reports_bytes": num_bytes,
        "primary_seconds": {
            "read reports": read_seconds,
            "unite": unite_seconds,
            "check": check_seconds,
            "join digests": join_seconds,
            "write records": round(record_seconds + orbax_seconds, 3),
        },
        "metadata_bytes": len(text) + len(orbax),
        "parse_seconds": parse_seconds,
    }


def made_up_report(
    item: lower.LoweredItem, grids: dict[str, chunks.ChunkGrid], rank: int, num_ranks: int
) -> write.RankReport:
    """Every chunk is reported once, by one rank, in digests of its true length."""
    digests: dict[str, dict[int, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for source in item.sources:
        grid = grids[source.node.name]
        places = range(rank, grid.num_chunks, num_ranks)
        itemsize = source.node.spec.itemsize_bytes
        first = next(grid.indices())
        num_digests = grid.num_digests(first, itemsize)
        if places:
            digests[source.node.name] = dict.fromkeys(places, "0123456789abcdef" * num_digests)
        if rank == 0:
            shapes[source.node.name] = grid.chunk_shape
    return write.RankReport(
        digests={ITEM: digests},
        chunk_shapes={ITEM: shapes},
        children={ITEM: (f"ocdbt.process_{rank}_0",)},
        roots={},
    )


def merge(num_ranks: int, num_tensors: int) -> float:
    """Real databases, each with a small chunk of every tensor, merged into one."""
    storage = LocalStorage()
    spec = ArraySpec((num_ranks, 600), "int16")
    grid = chunks.ChunkGrid(spec.shape, (1, 600))
    with tempfile.TemporaryDirectory() as directory:
        children = [f"ocdbt.process_{rank}_0" for rank in range(num_ranks)]
        for rank, child in enumerate(children):
            data = np.full((1, 600), rank, np.int16)
            writes = [
                write_tensorstore.ArrayWrite(
                    name=f"layers.{place}.weight",
                    spec=spec,
                    grid=grid,
                    box=Box((rank, 0), (1, 600)),
                    data=data,
                    writes_metadata=rank == 0,
                )
                for place in range(num_tensors)
            ]
            write_tensorstore.write_arrays(storage, directory, [child], writes)
        seconds, _ = timed(
            lambda: write_tensorstore.merge_children(storage, directory, children, {})
        )
    return seconds


if __name__ == "__main__":
    main()
