"""A reader for `torch.distributed.checkpoint.load` that reads a step.

PyTorch's planner decides which region of which tensor a rank needs, for any sharding; the reader
reads and verifies these regions, straight into the target's memory where that is possible.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import Box
from functional_ckpt.core.restore_plan import json_tree, plan
from functional_ckpt.core.restore_plan.match import match
from functional_ckpt.core.tree import decode, encode
from functional_ckpt.core.tree.placeholders import AS_SAVED
from functional_ckpt.core.tree.structure import ArrayNode, Node
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.format.checkpoint_dir import OpenCheckpoint, OpenItem
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.interop import dcp_layout
from functional_ckpt.interop.dcp_layout import Layout
from functional_ckpt.restoring import destinations, read
from functional_ckpt.runtime import fence, threads
from functional_ckpt.storage.open import connect

_BATCH_BYTES = 2**30
"""Regions that are read at once; those for devices need that much host memory."""


class _Entry(NamedTuple):
    """An entry of the state dict: a leaf of an item, or the node of an object."""

    item: OpenItem | None
    node: Node


class Reader(StorageReader):
    """Reads a step for `dcp.load(state_dict, storage_reader=Reader(path))`; every byte is verified.

    The step may be written by `Writer`, a manager, `fc.save` or Orbax: the name of a leaf is that
    of its item and its own, as of `{"item": {"leaf": value}}`.

    Args:
        path: The step: a path or a URI. A `checkpoint_id` of the load replaces it.
        cast: Whether a tensor of another dtype is converted to the target's; else it is an error.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, cast: bool = False) -> None:
        self.checkpoint_id = path
        self._cast = cast
        self._entries: dict[str, _Entry] = {}
        self._path = ""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns True: any path and URI may be given."""
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Starts a new load."""
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self._entries = {}

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Returns the names, shapes and dtypes of all entries."""
        if self.checkpoint_id is None:
            raise errors.UsageError("Give Reader(path), or checkpoint_id= to the load.")
        opened = checkpoint_dir.open_checkpoint(*connect(self.checkpoint_id))
        layout = Layout.from_json(opened.custom_metadata.get(dcp_layout.RECORD))
        self._path = opened.path
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        paths: dict[str, dcp_layout.Path] = {}
        self._entries = {}
        for path, entry in _entries(opened, layout):
            name = dcp_layout.name_of(path)
            if name in paths:
                raise errors.NameCollisionError(
                    f"{opened.path}: two leaves are called {name!r} in a flat state dict; restore "
                    "it with fc.restore.",
                    key_path=name,
                )
            paths[name], self._entries[name] = path, entry
            found[name] = _described(entry.node)
        meta = StorageMeta(checkpoint_id=self.checkpoint_id)
        return Metadata(state_dict_metadata=found, planner_data=paths, storage_meta=meta)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Does nothing: every rank has read the records."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads, verifies and delivers every region and object of a plan."""
        fence.wait_for_all()  # a save may still be copying from the memory that is read into
        wanted: list[ReadItem] = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._object(item.storage_index.fqn))
            else:
                wanted.append(item)
        for batch in self._batches(wanted):
            self._read(batch, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _batches(self, items: Sequence[ReadItem]) -> Iterator[list[ReadItem]]:
        batch: list[ReadItem] = []
        num_bytes = 0
        for item in items:
            _, node = self._array(item)
            batch.append(item)
            num_bytes += _region(item).num_elements * node.spec.itemsize_bytes
            if num_bytes >= _BATCH_BYTES:
                yield batch
                batch, num_bytes = [], 0
        if batch:
            yield batch

    def _array(self, item: ReadItem) -> tuple[OpenItem, ArrayNode]:
        opened, node = self._entries[item.storage_index.fqn]
        if opened is None or not isinstance(node, ArrayNode):
            raise errors.UsageError(f"{item.storage_index.fqn} is no tensor in {self._path}.")
        return opened, node

    def _read(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        """Reads regions of tensors."""
        targets: list[torch.Tensor] = []
        buffers: list[decode.Destination] = []
        requests: dict[str, tuple[OpenItem, list[ReadRequest]]] = {}
        for item in items:
            opened, node = self._array(item)
            target = planner.resolve_tensor(item).detach()
            self._check(item, node, target)
            buffer = destinations.host_destination(
                plan.ReadArray(node=node, form="fill", like=target)
            )
            request = opened.request(node, _region(item), Destination.into(buffer.array))
            requests.setdefault(opened.path, (opened, []))[1].append(request)
            targets.append(target)
            buffers.append(buffer)
        readers = [(opened.open_reader(), held) for opened, held in requests.values()]
        try:
            threads.run_in_threads(
                [task for reader, held in readers for task in reader.tasks(held)]
            )
        finally:
            for reader, _ in readers:
                reader.close()
        for item, target, buffer in zip(items, targets, buffers, strict=True):
            buffer.finish()
            planner.commit_tensor(item, target)

    def _check(self, item: ReadItem, node: ArrayNode, target: torch.Tensor) -> None:
        """Raises unless a target takes a region."""
        name = item.storage_index.fqn
        if tuple(target.shape) != tuple(item.lengths):
            raise errors.MismatchError(
                f"{name}: expected a target of shape {list(item.lengths)}, got "
                f"{list(target.shape)}."
            )
        dtype = encode.torch_dtype_name(target.dtype)
        if dtype != node.dtype and not self._cast:
            raise errors.MismatchError(
                f"{name}: the checkpoint has {node.dtype}, the target {dtype}. Convert the target, "
                "or pass Reader(path, cast=True), which converts the values."
            )

    def _object(self, name: str) -> io.BytesIO:
        """Returns an object as PyTorch's planner takes it: a pickle made of the stored data."""
        item, node = self._entries[name]
        bound = match(node, AS_SAVED, item=name)
        if item is None or isinstance(bound.binding, plan.Given):
            value = json_tree.from_node(node) if item is None else _given(bound.binding)
        else:
            (value,) = read.read_all(
                [(item, bound.binding)], verify="stream", touched=read.TargetState()
            )
        data = io.BytesIO()
        torch.save(value, data)
        data.seek(0)
        return data


def _given(binding: plan.Binding) -> Any:
    return binding.value if isinstance(binding, plan.Given) else None


def _region(item: ReadItem) -> Box:
    return Box(tuple(item.storage_offsets), tuple(item.lengths))


def _entries(opened: OpenCheckpoint, layout: Layout) -> Iterator[tuple[dcp_layout.Path, _Entry]]:
    """Yields the entries of all items."""
    for name, kind in opened.items.items():
        item = opened.tree(name) if kind == "tree" else None
        root = json_tree.to_node(opened.json(name)) if item is None else item.root
        for path, node in layout.entries(name, root):
            yield path, _Entry(item, node)


def _described(node: Node) -> TensorStorageMetadata | BytesStorageMetadata:
    if not dcp_layout.is_tensor(node) or not isinstance(node, ArrayNode):
        return BytesStorageMetadata()
    size = torch.Size(node.spec.shape)
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=encode.torch_dtype(node.dtype)),
        size=size,
        chunks=[ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)],
    )
