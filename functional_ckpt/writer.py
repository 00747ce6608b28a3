"""Writing one checkpoint directory: lower, stage, write, complete. The manager and `fc.save` share it.

    lower     values -> structures and sources             on the caller's thread, copies nothing
    stage     sources -> host arrays                       on the caller's thread, the only copy
    write     host arrays -> chunks in this rank's databases    in the background, every rank
    complete  merge, metadata, digests, sync               in the background, the primary
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from functional_ckpt import errors
from functional_ckpt.core import chunks, leaves, manifest, orbax_format, structure, tree
from functional_ckpt.core.spec import Box, numpy_dtype
from functional_ckpt.handlers.base import CheckpointItem, Registry
from functional_ckpt.storage import arrays, commit, staging
from functional_ckpt.storage.paths import LocalStorage

__all__ = [
    "CheckpointInfo",
    "LoweredItem",
    "StagedItem",
    "check_item_name",
    "complete",
    "lower",
    "stage",
    "write",
]

Array: TypeAlias = "np.ndarray[Any, Any]"

RESERVED_NAMES = ("metrics", "metadata")
JSON_FILE = "metadata"  # the name Orbax's JSON handler reads
# From here on an item is spread over several databases, which costs files and buys bandwidth.
_SPREAD_BYTES = 64 * 2**20
_NUM_CHILDREN = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoweredItem:
    """An item taken apart, still in the caller's memory.

    Attributes:
        name: The item's name.
        handler: Name of the handler's class, for people.
        root: The structure; None for a JSON item.
        text: The text of a JSON item; None for a tree.
        sources: Nodes and live tensors of the arrays that hold their own bytes.
    """

    name: str
    handler: str
    root: structure.Node | None
    text: bytes | None = None
    sources: tuple[tuple[structure.ArrayNode, torch.Tensor], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StagedItem:
    """An item whose bytes will not change any more.

    Attributes:
        lowered: What it was lowered to.
        writes: Host arrays to write.
    """

    lowered: LoweredItem
    writes: tuple[arrays.ArrayWrite, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(write.data.nbytes for write in self.writes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What is written about a checkpoint besides its items.

    Attributes:
        step: The step, or None.
        init_time_ns: When the save began, nanoseconds since the epoch.
        metrics: Metrics, JSON.
        custom_metadata: The user's own metadata, JSON.
    """

    step: int | None
    init_time_ns: int
    metrics: Mapping[str, Any] | None = None
    custom_metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# ------------------------------------------------------------------------------------ lower


def check_item_name(name: object) -> str:
    """The name, if an item may have it; else `UsageError`."""
    if not isinstance(name, str) or not name:
        raise errors.UsageError(f"An item's name must be a non-empty str; got {name!r}.")
    if name in RESERVED_NAMES or name[0] in "_." or "/" in name or "\0" in name:
        raise errors.UsageError(
            f"Item name {name!r} is reserved: names may not contain '/', begin with '_' or '.', or be one of "
            f"{', '.join(RESERVED_NAMES)} (metrics are given by save(metrics=...)).",
            key_path=name,
        )
    if commit.TMP_SUFFIX in name or not name.isprintable() or len(name.encode()) > 200:
        raise errors.UsageError(f"Item name {name!r} cannot be a directory's name.", key_path=name)
    return name


def lower(items: Mapping[str, Any], registry: Registry) -> tuple[LoweredItem, ...]:
    """Takes every item apart, or raises before anything is written."""
    if not isinstance(items, Mapping) or not items:
        raise errors.UsageError(
            f"items must be a non-empty mapping of names to values; got {type(items).__name__} {items!r:.60}. "
            "Wrap a single value: {'state': value}."
        )
    return tuple(
        _lower_item(check_item_name(name), registry.bind(value, name))
        for name, value in items.items()
    )


def _lower_item(name: str, item: CheckpointItem) -> LoweredItem:
    kind = type(item.handler).__name__
    lowered = item.handler.lower(item.value)
    if item.handler.format == "json":
        return LoweredItem(name=name, handler=kind, root=None, text=to_json(lowered, name))
    flat = tree.flatten(lowered, item=name)
    sources = tuple((node, leaves.source_of(value, node)) for node, value in flat.arrays)
    return LoweredItem(name=name, handler=kind, root=flat.root, sources=sources)


def to_json(value: Any, what: str) -> bytes:
    """JSON text of a value; `UsageError` names what cannot be written."""
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.UsageError(f"{what} is not JSON: {error}.", key_path=what) from error


# ------------------------------------------------------------------------------------ stage


def stage(
    items: Sequence[LoweredItem], buffer: staging.StagingBuffer | None
) -> tuple[StagedItem, ...]:
    """Copies every array into host memory of our own, in one pass.

    Args:
        items: What to stage.
        buffer: Where to; None to refer to CPU memory as it is (the caller promises not to change it until the
            write is done).
    """
    flat = [pair for item in items for pair in item.sources]
    if buffer is None:
        hosts = [leaves.host_view(source.cpu(), node.spec.dtype) for node, source in flat]
    else:
        slots = [staging.Slot(node.spec.shape, numpy_dtype(node.spec.dtype)) for node, _ in flat]
        hosts = buffer.reserve(slots)
        _copy(flat, hosts)
    remaining = iter(hosts)
    return tuple(
        StagedItem(
            lowered=item, writes=tuple(_array_write(node, next(remaining)) for node, _ in item.sources)
        )
        for item in items
    )


def _copy(flat: Sequence[tuple[structure.ArrayNode, torch.Tensor]], hosts: Sequence[Array]) -> None:
    on_host: list[tuple[Array, Array]] = []
    for (node, source), host in zip(flat, hosts, strict=True):
        if source.device.type == "cpu":
            on_host.append((host, leaves.host_view(source, node.spec.dtype)))
        elif host.size:
            leaves.tensor_over(host).copy_(source)
    staging.copy_in_threads(on_host)


def _array_write(node: structure.ArrayNode, host: Array) -> arrays.ArrayWrite:
    return arrays.ArrayWrite(
        name=node.name,
        spec=node.spec,
        grid=chunks.choose_grid(node.spec),
        box=Box.whole(node.spec.shape),
        data=host,
    )


# ------------------------------------------------------------------------------------ write


def write(
    storage: LocalStorage, directory: str, items: Sequence[StagedItem], rank: int = 0
) -> dict[str, arrays.Digests]:
    """Writes this rank's chunks of every item below `directory`; nothing is durable yet."""
    digests: dict[str, arrays.Digests] = {}
    for item in items:
        root = item.lowered.root
        if root is None:
            continue
        path = os.path.join(directory, item.lowered.name)
        storage.make_directory(path)
        digests[item.lowered.name] = arrays.write_arrays(
            storage,
            path,
            _children(item, rank) or [""],
            item.writes,
            orbax_format.scalar_leaves(root),
        )
    return digests


def _children(item: StagedItem, rank: int) -> list[str]:
    """The databases an item is spread over; none when its own database takes everything."""
    if item.size_bytes < _SPREAD_BYTES:
        return []
    return arrays.child_names(rank, _NUM_CHILDREN)


def complete(
    storage: LocalStorage,
    directory: str,
    items: Sequence[StagedItem],
    digests: Mapping[str, arrays.Digests],
    info: CheckpointInfo,
    commit_time_ns: int,
) -> None:
    """Merges, writes every metadata file, and makes all of `directory` durable."""
    names: dict[str, str] = {}
    files: dict[str, manifest.FileRecord] = {}
    for item in items:
        name = item.lowered.name
        names[name] = "json" if item.lowered.root is None else "tree"
        if item.lowered.text is not None:
            storage.make_directory(os.path.join(directory, name))
            file = f"{name}/{JSON_FILE}"
            files[file] = _write(storage, directory, file, item.lowered.text)
        else:
            record = _complete_tree(storage, os.path.join(directory, name), item, digests[name])
            file = f"{name}/{manifest.EXTENSION_FILE}"
            files[file] = _write(storage, directory, file, record.to_json())
    if info.metrics is not None:
        storage.make_directory(os.path.join(directory, "metrics"))
        file = "metrics/metrics"
        files[file] = _write(storage, directory, file, to_json(info.metrics, "metrics"))
    text = orbax_format.checkpoint_metadata(
        names,
        init_time_ns=info.init_time_ns,
        commit_time_ns=commit_time_ns,
        custom_metadata=info.custom_metadata,
        metrics=info.metrics,
    )
    name = orbax_format.CHECKPOINT_METADATA_FILE
    files[name] = _write(storage, directory, name, text)
    step = manifest.StepRecord(step=info.step, items=names, files=files)
    _write(storage, directory, manifest.EXTENSION_FILE, step.to_json())
    commit.sync_tree(storage, directory, storage.walk(directory))


def _write(storage: LocalStorage, path: str, name: str, data: bytes) -> manifest.FileRecord:
    storage.write(os.path.join(path, name), data)
    return manifest.FileRecord(len(data), manifest.digest_hex(data))


def _complete_tree(
    storage: LocalStorage, path: str, item: StagedItem, digests: arrays.Digests
) -> manifest.ItemRecord:
    """Makes one tree item whole but for its record, which is returned."""
    root = item.lowered.root
    if root is None:
        raise errors.UsageError(f"{item.lowered.name} is not a tree item.")
    grids = {write.name: write.grid for write in item.writes}
    tied = {
        leaf.name: (leaf.tied_to, grids[leaf.tied_to])
        for _, leaf in structure.iter_leaves(root)
        if isinstance(leaf, structure.ArrayNode) and leaf.tied_to is not None
    }
    arrays.merge_children(storage, path, _children(item, 0), tied)
    _write(storage, path, orbax_format.TREE_METADATA_FILE, orbax_format.tree_metadata(root))
    if texts := orbax_format.strings(root):
        _write(storage, path, orbax_format.STRINGS_FILE, json.dumps(texts).encode())
    joined = arrays.join_digests([digests])
    return manifest.ItemRecord(
        item=item.lowered.name,
        handler=item.lowered.handler,
        root=root,
        arrays={
            name: manifest.ArrayRecord(grid.chunk_shape, joined[name])
            for name, grid in grids.items()
        },
        files=_describe(storage, path),
    )


def _describe(storage: LocalStorage, path: str) -> dict[str, manifest.FileRecord]:
    """What every file of an item must be.

    Large ones are read back for their digests while they are being synced: the one waits for the processor,
    the other for the disk.
    """
    names = storage.walk(path)
    found: dict[str, manifest.FileRecord] = {}

    def describe() -> None:
        for name in names:
            found[name] = storage.describe(os.path.join(path, name))

    if storage.total_bytes(path) < _SPREAD_BYTES:
        describe()
    else:
        sync = functools.partial(commit.sync_tree, storage, path, names)
        arrays.run_in_threads([sync, describe])
    return found
