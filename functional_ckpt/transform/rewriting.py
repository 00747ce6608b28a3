"""Writes a checkpoint of which the arrays are made, piece by piece, of stored ones."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from functional_ckpt import checkpoint, errors
from functional_ckpt.core.arrays.rounding import is_floating, rounded
from functional_ckpt.core.arrays.spec import Array, Box, numpy_dtype
from functional_ckpt.core.files import safetensors_header
from functional_ckpt.core.files.hub_configs import RUNTIME, with_dtype
from functional_ckpt.core.records import orbax
from functional_ckpt.core.tree import structure
from functional_ckpt.distributed.coordinator import SingleProcess
from functional_ckpt.events import Shown, Tally
from functional_ckpt.format import index, step_files
from functional_ckpt.format.checkpoint_dir import OpenCheckpoint, OpenItem
from functional_ckpt.format.ocdbt_decode import INLINE
from functional_ckpt.format.stored_arrays import OpenArrays, StoredArray
from functional_ckpt.format.write_files import ArrayWrite, Pieces
from functional_ckpt.handlers.pytree import PyTreeHandler
from functional_ckpt.interop import atomic_output, stored_files
from functional_ckpt.saving import finalize, lower, single
from functional_ckpt.saving.parts import StagedItem
from functional_ckpt.saving.plan import PlannedPart, SavePlanner
from functional_ckpt.storage.open import connect
from functional_ckpt.transform.copying import copy
from functional_ckpt.transform.outputs import check_new

Combine: TypeAlias = Callable[[Iterator[Array]], Array]
"""Makes a piece of an array of the same piece of each of its sources, one in memory at a time."""

_PIECE_ELEMENTS = 2**19


@dataclasses.dataclass(frozen=True, slots=True)
class NewArray:
    """An array to be written.

    Attributes:
        sources: The arrays that it is made of, of one shape and dtype.
        combine: Makes it of these.
    """

    sources: Sequence[StoredArray]
    combine: Combine = next

    @property
    def size_bytes(self) -> int:
        """How much is read for it."""
        return sum(source.node.spec.size_bytes for source in self.sources)

    def write(self, node: structure.ArrayNode, part: PlannedPart, tally: Tally) -> ArrayWrite:
        """Returns the order to write a part; the bytes that it reads are added up."""
        pieces = functools.partial(self._pieces, tally=tally)
        data = Pieces(part.box.num_elements * node.spec.itemsize_bytes, pieces)
        return ArrayWrite(node.name, node.spec, part.grid, part.box, data)

    def _pieces(self, box: Box, tally: Tally) -> Iterator[Array]:
        """Yields a region piece by piece; of the next piece, the disk already reads the bytes."""
        dtype = numpy_dtype(self.sources[0].node.spec.dtype)
        memory = np.empty(min(box.num_elements, _PIECE_ELEMENTS), dtype)
        ahead: tuple[Array, list[list[Callable[[], None]]]] | None = None
        for part in (*box.cut(_PIECE_ELEMENTS), None):
            planned = None
            if part is not None:
                own = memory[: part.num_elements].reshape(part.shape)
                planned = own, [source.tasks(part, own) for source in self.sources]
            if ahead is not None:
                yield self.combine(_read(*ahead))
                tally.add(ahead[0].nbytes * len(self.sources))
            ahead = planned


def _read(memory: Array, sources: Sequence[Sequence[Callable[[], None]]]) -> Iterator[Array]:
    for tasks in sources:
        for task in tasks:
            task()
        yield memory


def narrowed(values: Array, dtype: str, name: str) -> Array:
    """Returns values of float64, or complex128, in a storage dtype, each rounded once.

    Raises:
        UsageError: A number becomes infinite or NaN.
    """
    found = rounded(values, dtype)
    lost = np.isfinite(values) & ~np.isfinite(found)
    if lost.any():
        raise errors.UsageError(
            f"{name}: {values[lost].flat[0]:.6g} is out of the range of {dtype}. Choose a dtype "
            "with a wider range, or leave this leaf out.",
            key_path=name,
        )
    return found


def arrays_of(root: structure.Node) -> dict[str, structure.ArrayNode]:
    """Returns the arrays of an item by name, tied ones too."""
    return {node.name: node for node in structure.iter_arrays(root)}


# ------------------------------------------------------------------------------------ reading


class Input:
    """A checkpoint to read from.

    Attributes:
        opened: The checkpoint.
        trees: Its tree items that were opened, by name.
    """

    def __init__(self, path: Any, files: contextlib.ExitStack) -> None:
        self.opened: OpenCheckpoint = checkpoint.open_path(*connect(path), warns=False)
        self.trees: dict[str, OpenItem] = {}
        self._arrays: dict[str, OpenArrays] = {}
        self._files = files

    def tree(self, name: str) -> OpenItem:
        """Opens a tree item, once."""
        if name not in self.trees:
            self.trees[name] = self.opened.tree(name)
            self._arrays[name] = OpenArrays(self.trees[name], self._files)
        return self.trees[name]

    def array(self, item: str, node: structure.ArrayNode) -> StoredArray:
        """Returns an array of an opened item."""
        return StoredArray(self._arrays[item], node)


@dataclasses.dataclass(frozen=True, slots=True)
class NewItem:
    """A tree item to be written.

    Attributes:
        name: Its name.
        root: Its structure.
        arrays: The sources of each array that holds its own bytes, by name.
        like: The stored item whose handler, configuration and names on the hub it has.
    """

    name: str
    root: structure.Node
    arrays: Mapping[str, NewArray]
    like: OpenItem

    def lowered(self) -> lower.LoweredItem:
        """Returns the item as a save has it, with tensors that have no values."""
        nodes = list(arrays_of(self.root).values())
        nothing = torch.empty(0, device="meta")
        record = self.like.record
        files = {} if record is None else record.files
        texts = stored_files.configs_of(self.like)
        is_model = any("model" in name for name in files if name.endswith(".safetensors"))
        is_on_hub = is_model and not any(name.startswith(RUNTIME) for name in texts)
        names = _stored_names(self.like) if is_on_hub else {}
        return lower.LoweredItem(
            name=self.name,
            handler=PyTreeHandler.__name__ if record is None else record.handler,
            root=self.root,
            file_stem="model" if is_on_hub else "data",
            texts=_with_dtype(texts, self.like.root, self.root),
            stored_names={node.name: names[node.name] for node in nodes if node.name in names},
            sources=tuple(lower.Source(n, nothing, None) for n in nodes if n.tied_to is None),
            tied=tuple(node for node in nodes if node.tied_to is not None),
            scalars=tuple(orbax.scalar_leaves(self.root)),
        )


def _with_dtype(
    texts: Mapping[str, str], old: structure.Node, new: structure.Node
) -> dict[str, str]:
    """Returns configuration files of a model that name its dtype, if all of it has a new one."""
    dtypes = _dtypes(new)
    if len(dtypes) != 1 or dtypes == _dtypes(old):
        return dict(texts)
    return {name: with_dtype(text, *dtypes) for name, text in texts.items()}


def _dtypes(root: structure.Node) -> set[str]:
    return {node.dtype for node in arrays_of(root).values() if is_floating(node.dtype)}


def _stored_names(saved: OpenItem) -> dict[str, str]:
    """Returns the names of arrays in an item's data files, where they are others.

    A program that reads these files looks for them. An array and a tensor with one offset are one.
    """
    tied = {name: node.tied_to for name, node in arrays_of(saved.root).items()}
    files = {} if saved.record is None else saved.record.files
    tensors: dict[tuple[str, int], str] = {}
    for file, record in files.items():
        if not file.endswith(".safetensors"):
            continue
        header = step_files.read_header(saved.storage, f"{saved.path}/{file}", record.size_bytes)
        found, metadata = safetensors_header.decode(header, record.size_bytes)
        if safetensors_header.SHARDING in metadata:
            return {}
        tensors |= {(file, len(header) + each.start): each.name for each in found}
    located = index.open_index(saved.storage, saved.path, files)
    batches = located.plan([saved.request(node) for node in saved.array_nodes()])
    names: dict[str, str] = {}
    for read in itertools.chain.from_iterable(batches):
        own = read.request.name
        if read.file == INLINE or read.part is None or any(read.part.chunk):
            continue  # only the first chunk is at the offset of its tensor
        name = tensors.get((located.files[read.file], read.offset), own)
        if name != own:
            names[own] = name
            if tied.get(name) == own:
                names[name] = own
    return names


# ------------------------------------------------------------------------------------ writing


def write(
    output: Any,
    like: OpenCheckpoint,
    items: Sequence[NewItem | lower.LoweredItem],
    report: Shown | None,
    *,
    metrics: Mapping[str, Any] | None = None,
    custom_metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint with the progress and metadata of another one.

    Args:
        output: Its path; nothing is there.
        like: The other one.
        items: Its items; those of JSON are lowered.
        report: Called after each piece.
        metrics: Its metrics.
        custom_metadata: Added to those of the other one.
    """
    storage, final = connect(output)
    atomic_output.check_disjoint(like.path, final)
    check_new(storage, final)
    if storage.objects is not None:  # which keeps new files in memory until they are complete
        with tempfile.TemporaryDirectory(prefix="functional_ckpt-") as folder:
            local = os.path.join(folder, "checkpoint")
            write(local, like, items, report, metrics=metrics, custom_metadata=custom_metadata)
            copy(local, output)
        return
    lowered = [item.lowered() if isinstance(item, NewItem) else item for item in items]
    group = SingleProcess()
    with SavePlanner(group).planning(None) as planning:
        planning.items = lowered
    new = {item.name: item.arrays for item in items if isinstance(item, NewItem)}
    total_bytes = sum(array.size_bytes for each in new.values() for array in each.values())

    def staged() -> list[StagedItem]:
        tally = Tally(report, 0, total_bytes)
        found: list[StagedItem] = []
        for item in lowered:
            plan, own = planning.plan[item.name], new.get(item.name, {})
            nodes = (item.sources[part.source].node for part in plan.parts)
            writes = tuple(
                own[node.name].write(node, part, tally)
                for node, part in zip(nodes, plan.parts, strict=True)
            )
            found.append(StagedItem(lowered=item, files=plan.files, writes=writes))
        return found

    info = finalize.CheckpointInfo(
        step=None,
        init_time_ns=time.time_ns(),
        metrics=metrics,
        progress=like.progress,
        custom_metadata={**like.custom_metadata, **(custom_metadata or {})},
    )
    single.write(storage, final, lowered, staged, info, group)


def json_item(source: OpenCheckpoint, name: str, new_name: str | None = None) -> lower.LoweredItem:
    """Returns a JSON item as it is stored."""
    text = source.files.read(f"{name}/{step_files.JSON_FILE}")
    return lower.LoweredItem(name=new_name or name, handler="JsonHandler", root=None, text=text)
