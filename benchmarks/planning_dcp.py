"""The same steps of PyTorch's distributed checkpoint (DCP): rows of arrays on many ranks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

_PROPERTIES = TensorProperties(dtype=torch.bfloat16)


def measure(num_ranks: int, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """CPU seconds of the coordinator, and of a rank that reads."""
    plans = [plan_of(shapes, rank, num_ranks) for rank in range(num_ranks)]
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, None, is_coordinator=True)
    plan_seconds, (plans, metadata) = _timed(lambda: planner.create_global_plan(plans))
    with tempfile.TemporaryDirectory() as path:
        writer = FileSystemWriter(path, sync_files=False)
        results = [
            [result_of(item, f"__{rank}_0.distcp") for item in plan.items]
            for rank, plan in enumerate(plans)
        ]
        write_seconds, _ = _timed(lambda: writer.finish(metadata, results))
        read_seconds, found = _timed(FileSystemReader(path).read_metadata)
    rank = num_ranks // 8

    def locate() -> None:
        for number, shape in enumerate(shapes):
            name = f"layers.{number}.weight"
            tensor = found.state_dict_metadata[name]
            chunk = rows_of(shape, rank, num_ranks)
            for item in create_read_items_for_chunk_list(name, tensor, [chunk] if chunk else []):
                found.storage_data[item.storage_index]

    locate_seconds, _ = _timed(locate)
    return {
        "coordinator": {"global plan": plan_seconds, "write metadata": write_seconds},
        "restoring rank": {"read metadata": read_seconds, "find its parts": locate_seconds},
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    value = call()
    return round(time.process_time() - start, 3), value


def rows_of(shape: tuple[int, ...], rank: int, num_ranks: int) -> ChunkStorageMetadata | None:
    """Returns a rank's rows, as torch.chunk deals them; None if it has none."""
    step = -(-shape[0] // num_ranks)
    start, end = min(rank * step, shape[0]), min((rank + 1) * step, shape[0])
    if start == end:
        return None
    offsets = torch.Size([start, *(0 for _ in shape[1:])])
    return ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([end - start, *shape[1:]]))


def plan_of(shapes: Sequence[tuple[int, ...]], rank: int, num_ranks: int) -> SavePlan:
    """Returns the plan that a rank sends to the coordinator."""
    items: list[WriteItem] = []
    for number, shape in enumerate(shapes):
        chunk = rows_of(shape, rank, num_ranks)
        if chunk is not None:
            data = TensorWriteData(chunk=chunk, properties=_PROPERTIES, size=torch.Size(shape))
            name = MetadataIndex(f"layers.{number}.weight", chunk.offsets)
            items.append(WriteItem(index=name, type=WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items, planner_data={})


def result_of(item: WriteItem, file: str) -> WriteResult:
    """Returns the report of a shard."""
    size = item.tensor_storage_size() or 0
    return WriteResult(
        index=item.index, size_in_bytes=size, storage_data=_StorageInfo(file, 0, size)
    )
