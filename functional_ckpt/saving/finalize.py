"""The primary's part of a save: writes the index of all ranks' files, and the records."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import ChunkGrid, digest_offsets
from functional_ckpt.core.files.file_plan import is_shard, stored_chunks
from functional_ckpt.core.files.hub_configs import RUNTIME
from functional_ckpt.core.records import merge_ranks, orbax, records
from functional_ckpt.core.tree import structure
from functional_ckpt.format.gathered import Gathered
from functional_ckpt.format.regions import Regions, is_tensors
from functional_ckpt.format.step_files import JSON_FILE, METRICS_FILE, PROGRESS_ITEM
from functional_ckpt.format.write_files import WrittenBox
from functional_ckpt.format.write_index import IndexedArray, write_index
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


@dataclasses.dataclass(frozen=True, slots=True)
class Finalized:
    """A checkpoint whose indexes and records were written.

    Attributes:
        size_bytes: Its size.
        files: All its files, relative to its directory.
    """

    size_bytes: int
    files: tuple[str, ...]


def finalize(
    storage: Storage,
    directory: str,
    items: Sequence[LoweredItem],
    reports: Sequence[RankReport],
    info: CheckpointInfo,
    commit_time_ns: int,
    token: str = "",
) -> int:
    """Writes indexes and records, and makes `directory` durable; returns its size in bytes.

    The directory holds the data files of all ranks; `reports` are in order of rank. A token becomes
    part of the names of indexes.
    """
    written = write_records(storage, directory, items, reports, info, commit_time_ns, token)
    # From the records, not from a listing: if a file has disappeared, the save must fail.
    commit.sync_tree(storage, directory, written.files)
    return written.size_bytes


def write_records(
    storage: Storage,
    directory: str,
    items: Sequence[LoweredItem],
    reports: Sequence[RankReport],
    info: CheckpointInfo,
    commit_time_ns: int,
    token: str = "",
) -> Finalized:
    """As `finalize`, but nothing is durable yet, and no data file need be in `directory`."""
    size_bytes = 0
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
                record = _finalize_item(storage, path, item, item.root, own, token)
                text = record.to_json()
            of_items += [f"{item.name}/{name}" for name in record.files]
            size_bytes += sum(file.size_bytes for file in record.files.values())
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
    name = records.EXTENSION_FILE
    files[name] = _write(storage, directory, name, step.to_json())
    size_bytes += sum(file.size_bytes for file in files.values())
    return Finalized(size_bytes, (*of_items, *files))


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


def _content(storage: Storage, path: str, item: str) -> tuple[Any, ...]:
    """Returns the structure and the digests of a tree item from its record."""
    path = os.path.join(path, item, records.EXTENSION_FILE)
    record = records.verify_checksum(storage.read(path), path)
    return record["structure"], record["arrays"], record.get("digests", [None])[-1]


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
    token: str,
) -> records.ItemRecord:
    """Writes the index and metadata of one tree item; returns its record, still to be written."""
    parts = [(rank, report.root or root) for rank, report in enumerate(reports)]
    merged = merge_ranks.merge_ranks(parts, item=item.name)
    if item.per_rank and isinstance(merged, structure.BranchNode):
        merged = dataclasses.replace(merged, kind="per_rank")
    known = {name: file for report in reports for name, file in report.files.items()}
    data_files = list(known)
    nodes = list(structure.iter_arrays(merged))
    arrays = _arrays_of(reports, nodes)
    _check_complete(item.name, arrays, data_files)
    own = [array for array, node in zip(arrays, nodes, strict=True) if node.tied_to is None]
    digests = {array.name: joined_digests(array) for array in own}
    in_table = sum(map(len, digests.values())) > records.DIGEST_BYTES * records.MAX_DIGESTS
    files, table = write_index(
        storage,
        path,
        data_files,
        arrays,
        tuple(orbax.scalar_leaves(merged)),
        b"".join(digests.values()) if in_table else b"",
        token,
    )
    known |= files
    texts = {orbax.TREE_METADATA_FILE: orbax.tree_metadata(merged)}
    if strings := orbax.strings(merged):
        texts[orbax.STRINGS_FILE] = json.dumps(strings).encode()
    texts |= _hub_files(item, own, data_files)
    known |= {name: _write(storage, path, name, text) for name, text in texts.items()}
    return records.ItemRecord(
        item=item.name,
        handler=item.handler,
        root=merged,
        arrays={
            array.name: records.ArrayRecord(
                array.grid.chunk_shape, "" if in_table else digests[array.name].hex()
            )
            for array in own
        },
        files=dict(sorted(known.items())),
        table=table,
    )


def _arrays_of(
    reports: Sequence[ItemReport], nodes: Sequence[structure.ArrayNode]
) -> list[IndexedArray]:
    """Returns every array, under each name, with the locations of its chunks."""
    arrays: list[IndexedArray] = []
    if len(reports) == 1 and not isinstance(reports[0].regions, Regions):
        boxes: dict[str, list[WrittenBox]] = {}
        for box in reports[0].regions:
            boxes.setdefault(box.name, []).append(box)
        for node in nodes:
            held = boxes.get(node.stored_name, [])
            shape = held[0].chunk_shape if held else node.spec.shape
            grid = _grid(node.spec.shape, shape)
            arrays.append(IndexedArray(node.name, node.spec, grid, held))
        return arrays
    gathered = Gathered([report.columns for report in reports])
    for node in nodes:
        name, spec = node.stored_name, node.spec
        grid = _grid(spec.shape, gathered.chunk_shape(name) or spec.shape)
        columns = gathered.columns(name, spec, grid)
        held = gathered.boxes(name) if columns is None else []
        arrays.append(IndexedArray(node.name, spec, grid, held, columns))
    return arrays


def _check_complete(item: str, arrays: Sequence[IndexedArray], files: Sequence[str]) -> None:
    """Raises unless each chunk of every array was written once."""
    for name, spec, grid, boxes, columns in arrays:
        if columns is not None or (len(boxes) == 1 and boxes[0].box.shape == spec.shape):
            continue
        written = sum(
            len(stored_chunks(grid, box.box, spec.itemsize_bytes, is_tensor=box.is_tensor))
            for box in boxes
        )
        if boxes and written == _num_chunks(grid):
            continue
        held = sorted({box.file for box in boxes})
        raise errors.CoordinationError(
            f"{item}: array {name!r} is incomplete or duplicated: {written} chunks of "
            f"{grid.num_chunks} were written, to {', '.join(held) or 'no file'}. Every rank of a "
            "DTensor's mesh must save it.",
            key_path=name,
        )


_grid = functools.lru_cache(maxsize=4096)(ChunkGrid)


@functools.lru_cache(maxsize=4096)
def _num_chunks(grid: ChunkGrid) -> int:
    return grid.num_chunks


def joined_digests(array: IndexedArray) -> bytes:
    """Returns the digests of an array, chunks in C order, from those of its regions."""
    _, spec, grid, boxes, columns = array
    if columns is not None:
        return columns.digests
    if len(boxes) == 1:
        return bytes.fromhex(boxes[0].digests)
    chunks: dict[int, str] = {}
    offsets = digest_offsets(grid, spec.itemsize_bytes)
    for box in boxes:
        pairs = zip(box.box.offset, grid.chunk_shape, strict=True)
        first = grid.position(tuple(start // size for start, size in pairs))
        if box.box.shape[1:] == spec.shape[1:]:  # rows: its chunks are consecutive
            chunks[first] = box.digests
            continue
        end = 0
        for index in grid.indices(box.box):
            position = grid.position(index)
            start, end = end, end + 16 * (offsets[position + 1] - offsets[position])
            chunks[position] = box.digests[start:end]
    return bytes.fromhex("".join([chunks[position] for position in sorted(chunks)]))


def _hub_files(
    item: LoweredItem, arrays: Sequence[IndexedArray], data_files: Sequence[str]
) -> dict[str, bytes]:
    """Returns the files that make the directory of a model one of the Hugging Face hub.

    If ranks wrote parts of tensors, or the hub has other tensors, there can be no such directory.
    Then the configuration has other names, for exports.
    """
    boxes = [array.boxes[0] for array in arrays if array.boxes]
    is_complete = len(boxes) == len(arrays) and all(
        box.box.shape == array.spec.shape for box, array in zip(boxes, arrays, strict=True)
    )
    # Files of shards have the names of leaves: ranks with different leaves wrote complete ones.
    is_complete &= not (item.stored_names and any(map(is_shard, data_files)))
    texts = {name: text.encode() for name, text in item.texts.items()}
    if not is_complete:
        return {f"{RUNTIME}{name.removeprefix(RUNTIME)}": text for name, text in texts.items()}
    if item.file_stem != "model":
        return texts
    files = set(filter(is_tensors, data_files))
    if files and files != {f"{item.file_stem}.safetensors"}:
        own = [box for box in boxes if box.is_tensor]
        index = {
            "metadata": {"total_size": sum(a.spec.size_bytes for a in arrays)},
            "weight_map": dict(
                sorted((item.stored_names.get(box.name, box.name), box.file) for box in own)
            ),
        }
        texts["model.safetensors.index.json"] = (json.dumps(index, indent=2) + "\n").encode()
    return texts
