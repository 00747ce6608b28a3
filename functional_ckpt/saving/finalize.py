"""The primary's part of a save: merges the chunks of all ranks, then writes the records."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.records import merge_ranks, orbax, records
from functional_ckpt.core.tree import structure
from functional_ckpt.format import backends, write_tensorstore
from functional_ckpt.format.step_files import JSON_FILE, METRICS_FILE, PROGRESS_ITEM
from functional_ckpt.policies import lines
from functional_ckpt.policies.progress import Progress
from functional_ckpt.runtime import threads
from functional_ckpt.saving import lower
from functional_ckpt.saving.lower import LoweredItem
from functional_ckpt.saving.write import ItemReport, RankReport
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.base import Storage


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """Checkpoint-level metadata.

    Attributes:
        step: The step, or None.
        init_time_ns: The start of the save, nanoseconds since the epoch.
        metrics: Metrics, JSON.
        progress: The training progress.
        custom_metadata: The user's own metadata, JSON.
        line: The line of training that the step belongs to.
    """

    step: int | None
    init_time_ns: int
    metrics: Mapping[str, Any] | None = None
    progress: Progress | None = None
    custom_metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    line: lines.Line = dataclasses.field(default_factory=lines.Line)


def finalize(
    storage: Storage,
    directory: str,
    items: Sequence[LoweredItem],
    reports: Sequence[RankReport],
    info: CheckpointInfo,
    commit_time_ns: int,
) -> None:
    """Merges, writes every record, and makes `directory` durable.

    The directory holds the chunks of all ranks; their reports are in order of rank.
    """
    names: dict[str, str] = {}
    files: dict[str, records.FileRecord] = {}
    of_items: list[str] = []
    for item in items:
        names[item.name] = "json" if item.root is None else "tree"
        if item.text is not None:
            files |= _write_item(storage, directory, f"{item.name}/{JSON_FILE}", item.text)
        elif item.root is not None:
            with threads.gc_paused():
                own = [report[item.name] for report in reports]
                path = os.path.join(directory, item.name)
                record = _finalize_item(storage, path, item, item.root, own)
                text = record.to_json()
            of_items += [f"{item.name}/{name}" for name in record.files]
            file = f"{item.name}/{records.EXTENSION_FILE}"
            files[file] = _write(storage, directory, file, text)
    if info.metrics is not None:
        text = lower.to_json(info.metrics, "metrics")
        files |= _write_item(storage, directory, METRICS_FILE, text)
    if info.progress is not None:
        text = lower.to_json(info.progress.to_json(), PROGRESS_ITEM)
        files |= _write_item(storage, directory, f"{PROGRESS_ITEM}/{JSON_FILE}", text)
    text = orbax.checkpoint_metadata(
        names if info.progress is None else {**names, PROGRESS_ITEM: "json"},
        init_time_ns=info.init_time_ns,
        commit_time_ns=commit_time_ns,
        custom_metadata=info.custom_metadata,
        metrics=info.metrics,
    )
    name = orbax.CHECKPOINT_METADATA_FILE
    files[name] = _write(storage, directory, name, text)
    step = records.StepRecord(
        step=info.step,
        items=names,
        files=files,
        generation=info.line.generation,
        ancestors=info.line.ancestors,
    )
    _write(storage, directory, records.EXTENSION_FILE, step.to_json())
    # By the records, not by a listing: a file that is lost by now must end the save.
    commit.sync_tree(storage, directory, [*of_items, *files, records.EXTENSION_FILE])


def is_same(storage: Storage, new: str, old: str) -> bool:
    """Returns whether a checkpoint holds the same items as an older one.

    Metrics, progress and custom metadata count where the new one has any.
    """
    if not queries.exists(storage, os.path.join(old, records.EXTENSION_FILE)):
        return False
    mine, other = (_step_record(storage, path) for path in (new, old))
    if mine.items != other.items:
        return False
    same_files = [f"{name}/{JSON_FILE}" for name, kind in mine.items.items() if kind == "json"]
    same_files += [
        file for file in (METRICS_FILE, f"{PROGRESS_ITEM}/{JSON_FILE}") if file in mine.files
    ]
    if any(mine.files[file] != other.files.get(file) for file in same_files):
        return False
    trees = [name for name, kind in mine.items.items() if kind == "tree"]
    if any(_content(storage, new, name) != _content(storage, old, name) for name in trees):
        return False
    custom, known = (_custom_metadata(storage, path) for path in (new, old))
    return not custom or custom == known


def _step_record(storage: Storage, path: str) -> records.StepRecord:
    path = os.path.join(path, records.EXTENSION_FILE)
    return records.parse_step(storage.read(path), path)


def _content(storage: Storage, path: str, item: str) -> tuple[Any, Any]:
    """Returns the structure and the digests of a tree item from its record."""
    path = os.path.join(path, item, records.EXTENSION_FILE)
    record = records.verify_checksum(storage.read(path), path)
    return record["structure"], record["arrays"]


def _custom_metadata(storage: Storage, path: str) -> Any:
    text = storage.read(os.path.join(path, orbax.CHECKPOINT_METADATA_FILE))
    return json.loads(text).get("custom_metadata")


def _write_item(
    storage: Storage, path: str, name: str, data: bytes
) -> dict[str, records.FileRecord]:
    """Writes the only file of an item, and its directory; returns the file's record by name."""
    storage.make_directory(os.path.dirname(os.path.join(path, name)), parents=False)
    return {name: _write(storage, path, name, data)}


def _write(storage: Storage, path: str, name: str, data: bytes) -> records.FileRecord:
    storage.write(os.path.join(path, name), data)
    return records.FileRecord.of(data)


def _finalize_item(
    storage: Storage,
    path: str,
    item: LoweredItem,
    root: structure.Node,
    reports: Sequence[ItemReport],
) -> records.ItemRecord:
    """Completes one tree item but for its record, which is returned."""
    parts = [(rank, report.root or root) for rank, report in enumerate(reports)]
    merged = merge_ranks.merge_ranks(parts, item=item.name)
    if item.per_rank and isinstance(merged, structure.BranchNode):
        merged = dataclasses.replace(merged, kind="per_rank")
    digests = write_tensorstore.join_digests([report.digests for report in reports])
    nodes = [
        leaf for _, leaf in structure.iter_leaves(merged) if isinstance(leaf, structure.ArrayNode)
    ]
    shapes = {name: shape for report in reports for name, shape in report.chunk_shapes.items()}
    grids = {
        node.name: _grid(node.spec.shape, shapes[node.name])
        for node in nodes
        if node.tied_to is None and node.name in shapes
    }
    _check_complete(item.name, nodes, grids, reports)
    tied = {
        node.name: (node.tied_to, grids[node.tied_to]) for node in nodes if node.tied_to is not None
    }
    children = [child for report in reports for child in report.children]
    children += _write_own_scalars(storage, path, parts, merged)
    known = {name: file for report in reports for name, file in report.files.items()}
    if children:  # else a single rank has written into the item's own database
        known |= backends.Arrays(storage).merge(path, children, tied)
    name = orbax.TREE_METADATA_FILE
    known[name] = _write(storage, path, name, orbax.tree_metadata(merged))
    if texts := orbax.strings(merged):
        name = orbax.STRINGS_FILE
        known[name] = _write(storage, path, name, json.dumps(texts).encode())
    return records.ItemRecord(
        item=item.name,
        handler=item.handler,
        root=merged,
        arrays={
            name: records.ArrayRecord(grid.chunk_shape, digests.get(name, ""))
            for name, grid in grids.items()
        },
        files=_describe(storage, path, known),
    )


def _check_complete(
    item: str,
    nodes: Sequence[structure.ArrayNode],
    grids: Mapping[str, ChunkGrid],
    reports: Sequence[ItemReport],
) -> None:
    """Raises unless one rank wrote the metadata of every array, and one rank each chunk."""
    written: collections.Counter[str] = collections.Counter()
    for report in reports:
        for name, chunks in report.digests.items():
            written[name] += len(chunks)
    for node in nodes:
        grid = grids.get(node.name)
        if node.tied_to is not None or (grid and written[node.name] == _num_chunks(grid)):
            continue
        ranks = [rank for rank, report in enumerate(reports) if report.digests.get(node.name)]
        expected = "" if grid is None else f" of {grid.num_chunks}"
        raise errors.CoordinationError(
            f"{item}: array {node.name!r} is incomplete or duplicated: ranks {ranks} wrote "
            f"{written[node.name]} chunks{expected}. Every rank of a DTensor's mesh must save it.",
            ranks=ranks,
            key_path=node.name,
        )


_grid = functools.lru_cache(maxsize=4096)(ChunkGrid)


@functools.lru_cache(maxsize=4096)
def _num_chunks(grid: ChunkGrid) -> int:
    return grid.num_chunks


def _write_own_scalars(
    storage: Storage, path: str, parts: Sequence[tuple[int, structure.Node]], merged: structure.Node
) -> list[str]:
    """Writes plain numbers that differ between ranks, which Orbax reads as arrays.

    That they differ is known only after the structures of all ranks were gathered.
    """
    roots = {id(root): root for _, root in parts}.values()
    if len(roots) == 1:
        return []
    written = {name for root in roots for name, _, _ in orbax.scalar_leaves(root)}
    own = [scalar for scalar in orbax.scalar_leaves(merged) if scalar[0] not in written]
    if not own:
        return []
    children = write_tensorstore.child_names(len(parts), 1)
    backends.Arrays(storage).write(path, children[0], (), own)
    return children


def _describe(
    storage: Storage, path: str, known: Mapping[str, records.FileRecord]
) -> dict[str, records.FileRecord]:
    """Returns the records of an item's files; unknown files are read.

    A reported file counts even if a listing lacks it: then syncing it fails.
    """
    return {
        name: known.get(name) or storage.checksum(os.path.join(path, name))
        for name in sorted({*known, *storage.walk(path)})
    }
