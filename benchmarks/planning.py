"""The cost of coordination with ten thousand ranks, without ten thousand processes.

    python -m benchmarks.planning [--ranks 64 256 1024 10240] [--tensors 2000]

Every step that a save or a restore takes beside moving bytes runs as it is, for one rank or for the
primary; the other ranks' messages are simulated, and data files are holes. CPU seconds of one run,
memory of a process of its own. PyTorch's distributed checkpoint (DCP) plans, records and reads the
same shards, of a tenth of the tensors, and of up to 1,024 ranks: its plan takes 16 times as long
for four times as many.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, cast
from unittest import mock

import numpy as np
import torch

from benchmarks import planning_dcp
from functional_ckpt.core.arrays import chunks
from functional_ckpt.core.arrays import sharding as sharding_lib
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.sharding import DimShard, Sharding
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.arrays.write_plan import PlannedArray, ShardedArray, plan_writes
from functional_ckpt.core.records import records
from functional_ckpt.core.tree import structure
from functional_ckpt.format import digest_table, index
from functional_ckpt.format.checkpoint_dir import OpenItem
from functional_ckpt.format.regions import Head, Regions
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
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (4096,))
"""Of a model of 8 billion parameters."""
_MAX_DCP_RANKS = 1024
_EMPTY = torch.empty(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 10240])
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--meshes", nargs="+", default=list(MESHES), choices=list(MESHES))
    args = parser.parse_args()
    if args.tensors % (10 * len(SHAPES)):
        parser.error(f"--tensors: expected a multiple of {10 * len(SHAPES)}.")
    for mesh in args.meshes:
        for num_ranks in args.ranks:
            row = {"mesh": mesh, "ranks": num_ranks, "tensors": args.tensors}
            print(json.dumps(row | measure(mesh, num_ranks, args.tensors)), flush=True)


def measure(mesh: str, num_ranks: int, num_tensors: int) -> dict[str, Any]:
    """Runs every part in a process of its own."""
    case = (mesh, num_ranks, num_tensors)
    with tempfile.TemporaryDirectory() as directory:
        found = alone(rank_plan, *case)
        found |= alone(write_reports, directory, *case)
        found["primary"] = alone(primary, directory, *case)
        found["restoring rank"] = alone(restoring_rank, directory, *case)
    if mesh == "FSDP" and num_ranks <= _MAX_DCP_RANKS:
        tenth = num_tensors // 10
        shapes = [spec.shape for spec in specs(tenth)]
        found["DCP"] = {"tensors": tenth} | alone(planning_dcp.measure, num_ranks, shapes)
    return found


def alone(call: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Returns figures of a new process, and the memory that it added."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_alone, (call, args))


def _alone(call: Callable[..., dict[str, Any]], args: Sequence[Any]) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = call(*args)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return figures | ({} if call in (rank_plan, write_reports) else {"added_MB": added // 1024})


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    value = call()
    return round(time.process_time() - start, 3), value


# ------------------------------------------------------------------------------------ the model


def specs(num_tensors: int) -> list[ArraySpec]:
    return [ArraySpec(SHAPES[number % len(SHAPES)], "bfloat16") for number in range(num_tensors)]


def name_of(number: int) -> str:
    return f"layers.{number}.weight"


def lowered(mesh: str, num_ranks: int, num_tensors: int) -> lower.LoweredItem:
    """The model as one rank of a sharded job holds it."""
    mesh_shape, cuts = MESHES[mesh](num_ranks)
    sharding = Sharding(mesh_shape, tuple(range(num_ranks)), cuts)
    sources = [
        lower.Source(
            structure.ArrayNode(kind="tensor", spec=spec, name=name_of(number)),
            _EMPTY,
            sharding,
        )
        for number, spec in enumerate(specs(num_tensors))
    ]
    root = structure.BranchNode(
        kind="dict",
        keys=tuple(structure.Key(source.node.name) for source in sources),
        children=tuple(source.node for source in sources),
    )
    return lower.LoweredItem(name=ITEM, handler="ModuleHandler", root=root, sources=tuple(sources))


def arrays_of(item: lower.LoweredItem) -> list[ShardedArray]:
    sharding = cast("Sharding", item.sources[0].sharding)
    return [ShardedArray(ITEM, each.node.name, each.node.spec, sharding) for each in item.sources]


# ------------------------------------------------------------------------------------ the parts


def rank_plan(mesh: str, num_ranks: int, num_tensors: int) -> dict[str, Any]:
    """The part of each rank: its own plan."""
    item = lowered(mesh, num_ranks, num_tensors)
    ranks = tuple(range(num_ranks))
    for cached in (
        sharding_lib._positions,
        sharding_lib._intervals,
        sharding_lib._unit,
        chunks.digest_offsets,
    ):
        cached.cache_clear()
    signature_seconds, _ = timed(lambda: plan_lib._signature([item], with_trees=True))
    rank = num_ranks // 8  # writes a part of every array
    plan_seconds, plan = timed(lambda: plan_lib._plan([item], rank, ranks, None))
    return {
        "signature_seconds": signature_seconds,
        "plan_seconds": plan_seconds,
        "parts": len(plan[ITEM].parts),
    }


def write_reports(directory: str, *case: Any) -> dict[str, Any]:
    """The files of all ranks: reports as they are, data as holes."""
    arrays = arrays_of(lowered(*case))
    storage = LocalStorage()
    path = os.path.join(directory, ITEM)
    storage.make_directory(path)
    seconds = 0.0
    num_ranks = len(arrays[0].sharding.ranks)
    for rank in range(num_ranks):
        report = made_up_report(arrays, rank)
        used, _ = timed(
            functools.partial(write.write_report, storage, attempt(directory), rank, report)
        )
        seconds += used
        for name, file in report[ITEM].files.items():
            with open(os.path.join(path, name), "wb") as data:
                data.truncate(file.size_bytes)
    num_bytes = queries.total_bytes(storage, os.path.join(directory, write.REPORTS))
    return {
        "one_report_write_seconds": round(seconds / num_ranks, 4),
        "all_reports_bytes": num_bytes,
    }


def primary(directory: str, *case: Any) -> dict[str, Any]:
    """Rank 0's work on all reports: read, merge, check, index, write."""
    item = lowered(*case)
    root = cast("structure.Node", item.root)
    storage = LocalStorage()
    path = os.path.join(directory, ITEM)
    own = write.read_report(storage, attempt(directory), 0)
    read_seconds, reports = timed(
        lambda: write.every_report(storage, attempt(directory), own, case[1])
    )
    of_item = [report[ITEM] for report in reports]
    finish_seconds, record = timed(
        lambda: finalize._finalize_item(storage, path, item, root, of_item, "")
    )
    record_seconds, text = timed(record.to_json)
    storage.write(os.path.join(path, records.EXTENSION_FILE), text)
    return {
        "seconds": {
            "read reports": read_seconds,
            "merge, check and index": finish_seconds,
            "write record": record_seconds,
            "all": round(read_seconds + finish_seconds + record_seconds, 3),
        },
        "record_bytes": len(text),
        "index_bytes": record.files["index.ocdbt"].size_bytes,
    }


def restoring_rank(directory: str, *case: Any) -> dict[str, Any]:
    """A rank that reads its part of every array: all that it does before it reads data."""
    sharding = arrays_of(lowered(*case))[0].sharding
    path = os.path.join(directory, ITEM)
    open_seconds, opened = timed(lambda: OpenItem(LocalStorage(), path, ITEM))

    def locate() -> int:
        requests = [
            opened.request(node, piece.box)
            for node in opened.array_nodes()
            for piece in sharding.pieces(node.spec.shape, case[1] // 8)
        ]
        found = index.open_index(LocalStorage(), path, opened.record.files)
        found.plan(requests)
        for request in requests:
            for part in request.parts:
                request.digests.of(part.chunk)
        return len(found.locations)

    read_bytes = {"nodes": 0, "digests": 0}
    with (
        counted(index, "_read_span", read_bytes, "nodes"),
        counted(digest_table._Pages, "_read_page", read_bytes, "digests"),
    ):
        locate_seconds, num_located = timed(locate)
    record_bytes = os.path.getsize(os.path.join(path, records.EXTENSION_FILE))
    return {
        "parse the record, seconds": open_seconds,
        "find its parts, seconds": locate_seconds,
        "record_bytes": record_bytes,
        "read_bytes": read_bytes,
        "locations": num_located,
    }


def counted(owner: Any, name: str, counts: dict[str, int], key: str) -> Any:
    """Counts the bytes that a function returns."""
    original = getattr(owner, name)

    def call(*args: Any) -> Any:
        found = original(*args)
        counts[key] += len(found)
        return found

    return mock.patch.object(owner, name, call)


# ------------------------------------------------------------------------------------ reports


def attempt(directory: str) -> write.Begun:
    return write.Begun(directory, {}, "simulated", "")


def made_up_report(arrays: Sequence[ShardedArray], rank: int) -> write.RankReport:
    """The report of one rank, with digests of their true length."""
    sharding = arrays[0].sharding
    name = f"shard-{rank:05d}-model.safetensors"
    replicas = sharding.replicas(rank)
    if len(replicas) > 1:  # they deal out all arrays together
        if replicas not in _DEALT:
            _DEALT[replicas] = plan_writes(arrays, rank)
        boxes, end = boxes_of(arrays, _DEALT[replicas], rank, name)
        regions = Regions.of(boxes, [name])
    else:
        layer = arrays[: len(SHAPES)]
        boxes, layer_bytes = boxes_of(layer, plan_writes(layer, rank), rank, name)
        count = len(arrays) // len(layer)
        regions, end = repeated(Regions.of(boxes, [name]), count, layer_bytes), count * layer_bytes
    files = {name: records.FileRecord(end, "0" * 16)} if boxes else {}
    return {ITEM: write.ItemReport(regions=regions, files=files, root=None)}


_DEALT: dict[tuple[int, ...], tuple[PlannedArray, ...]] = {}


def boxes_of(
    arrays: Sequence[ShardedArray], plans: Sequence[PlannedArray], rank: int, file: str
) -> tuple[list[WrittenBox], int]:
    """Returns the boxes that a rank writes, and their bytes."""
    boxes: list[WrittenBox] = []
    end = 0
    for array, planned in zip(arrays, plans, strict=True):
        for piece in planned.of(rank):
            count = num_digests(planned.grid, piece.box, array.spec.itemsize_bytes)
            digests = "0123456789abcdef" * count
            shape = planned.grid.chunk_shape
            boxes.append(WrittenBox(array.name, shape, piece.box, file, end, True, digests))
            end += piece.box.num_elements * array.spec.itemsize_bytes
    return boxes, end


def repeated(layer: Regions, count: int, layer_bytes: int) -> Regions:
    """Returns the regions of many layers that are like the first."""
    starts = np.arange(count) * layer_bytes
    return Regions(
        head=repeated_head(layer.head, count),
        files=layer.files if layer.head.names else (),
        starts=np.tile(layer.starts, count),
        shapes=np.tile(layer.shapes, count),
        file=np.tile(layer.file, count),
        offsets=(starts[:, None] + layer.offsets).reshape(-1),
        counts=np.tile(layer.counts, count),
        digests=layer.digests * count,
    )


@functools.lru_cache
def repeated_head(head: Head, count: int) -> Head:
    numbers = [int(name.split(".")[1]) for name in head.names]
    names = [name_of(layer * len(SHAPES) + n) for layer in range(count) for n in numbers]
    return Head(tuple(names), head.chunk_shapes * count)


@functools.lru_cache(maxsize=65536)
def num_digests(grid: ChunkGrid, box: Box, itemsize_bytes: int) -> int:
    return sum(grid.num_digests(index, itemsize_bytes) for index in grid.indices(box))


if __name__ == "__main__":
    main()
