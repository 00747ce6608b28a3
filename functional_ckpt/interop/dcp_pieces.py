"""The regions of tensors and the objects that a plan of `torch.distributed.checkpoint` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from functional_ckpt import errors
from functional_ckpt.core.arrays import write_plan
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.spec import Box
from functional_ckpt.core.files import file_plan
from functional_ckpt.core.files.file_plan import FilePlan, StoredBox
from functional_ckpt.core.tree import encode, flatten, memory
from functional_ckpt.core.tree.structure import ArrayNode, BranchNode, Node
from functional_ckpt.format.write_files import ArrayWrite, Written, WrittenBox, write_files
from functional_ckpt.interop import dcp_layout
from functional_ckpt.storage.base import Storage

Grids = Mapping[str, tuple[ChunkGrid, bool]]
"""Entry that is stored in several parts -> its chunks, and whether they are runs of each part."""


class Piece(NamedTuple):
    """A region of an array, and the tensor that holds it."""

    box: StoredBox
    tensor: torch.Tensor


def grid_of(items: Sequence[WriteItem]) -> tuple[ChunkGrid, bool]:
    """Returns the chunks of an entry that several ranks write."""
    boxes = [box for item in items if (box := _box(item)).num_elements]
    spec = _node(items[0], ()).spec
    return write_plan.grid_of_boxes(spec, boxes or [Box.whole(spec.shape)])


def _box(item: WriteItem) -> Box:
    data: Any = item.tensor_data
    return Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))


def _node(item: WriteItem, keys: dcp_layout.Path) -> ArrayNode:
    data: Any = item.tensor_data
    return array_node(data.size, data.properties.dtype, keys)


def array_node(size: Sequence[int], dtype: torch.dtype, keys: dcp_layout.Path) -> ArrayNode:
    """Returns the node of a tensor of an entry."""
    like = torch.empty(tuple(size), dtype=dtype, device="meta")
    return encode.ordinary_node(like, dcp_layout.leaf_name(keys))


def tensor_piece(
    planner: SavePlanner, item: WriteItem, keys: dcp_layout.Path, grids: Grids
) -> Piece | None:
    """Returns the region of a tensor that this rank writes; None if it is empty."""
    fqn, node, box = item.index.fqn, _node(item, keys), _box(item)
    if not box.num_elements and node.spec.num_elements:
        return None
    tensor: Any = planner.resolve_data(item)
    what = _why_not(tensor, node, box)
    if what is not None:
        raise errors.UnsupportedLeafError(f"{fqn}: {what}", key_path=fqn)
    grid, is_tensor = grids.get(fqn) or (write_plan.plan_alone(node.spec).grid, True)
    stored = StoredBox(node.name, node.spec, box, grid, is_tensor and "dtype" not in node.detail)
    return Piece(stored, encode.source_of(tensor, node))


def _why_not(tensor: Any, node: ArrayNode, box: Box) -> str | None:
    """Returns why the planner's data is not the region that it planned."""
    if not isinstance(tensor, torch.Tensor):
        return f"the planner gave a {type(tensor).__name__} for a tensor."
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return f"a tensor of layout {tensor.layout} on {tensor.device} cannot be stored; densify it"
    if encode.torch_dtype_name(tensor.dtype) != node.dtype or tuple(tensor.shape) != box.shape:
        got = f"{tensor.dtype}{list(tensor.shape)}"
        return f"the planner announced {node.dtype}{list(box.shape)} and gave {got}."
    return None


def _lookup(planner: SavePlanner, index: MetadataIndex) -> Any:
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise errors.UsageError(
            f"{index.fqn}: {type(planner).__name__} has no lookup_object(), and gives objects as "
            "pickles only, which are never stored. Derive it from DefaultSavePlanner, or save "
            "tensors only.",
            key_path=index.fqn,
        )
    return lookup(index)


def object_pieces(
    planner: SavePlanner, index: MetadataIndex, item: str, keys: dcp_layout.Path
) -> tuple[Node, list[Piece]]:
    """Returns the structure of a plain value, and its arrays, which this rank writes entirely."""
    value = _lookup(planner, index)
    for key in reversed(keys):
        value = {str(key): value}
    flat = flatten.flatten(value, item=item)
    node = flat.root
    for _ in keys:
        node = node.children[0] if isinstance(node, BranchNode) else node
    pieces: list[Piece] = []
    for array, leaf in flat.arrays:
        if not memory.is_plain(leaf) and isinstance(leaf, torch.Tensor):
            raise errors.UnsupportedLeafError(
                f"{item}.{array.name}: a {type(leaf).__name__} within a tuple or another object, "
                "which one rank stores; keep it in dicts and lists.",
                key_path=f"{item}.{array.name}",
            )
        box = Box.whole(array.spec.shape)
        grid = write_plan.plan_alone(array.spec).grid
        stored = StoredBox(array.name, array.spec, box, grid, "dtype" not in array.detail)
        pieces.append(Piece(stored, encode.source_of(leaf, array)))
    return node, pieces


def write(
    storage: Storage, folder: str, pieces: Sequence[Piece], rank: int, num_ranks: int, token: str
) -> Written:
    """Writes the files of an item; device memory is copied file by file."""
    is_sharded = num_ranks > 1
    planned = file_plan.plan_files(
        [piece.box for piece in pieces], is_sharded=is_sharded, rank=rank
    )
    files = file_plan.file_names("data", planned, shard=rank if is_sharded else None)
    is_host = all(piece.tensor.is_cpu for piece in pieces)
    boxes: list[WrittenBox] = []
    records: dict[str, Any] = {}
    for group in [files] if is_host else [[file] for file in files]:
        written = write_files(storage, folder, group, list(_writes(group, pieces)), token=token)
        boxes += written.boxes
        records |= written.files
    return Written(boxes=boxes, files=records)


def _writes(files: Sequence[FilePlan], pieces: Sequence[Piece]) -> Iterator[ArrayWrite]:
    for member in (member for file in files for member in file.members):
        box, tensor = pieces[member.number]
        data = encode.host_view(tensor if tensor.is_cpu else tensor.cpu(), box.spec.dtype)
        yield ArrayWrite(box.name, box.spec, member.grid, box.box, data)
