"""Files of tensors with the bytes that a step holds: read, verified and written without torch.

Processes that only write such files start in a tenth of the time that importing torch takes.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from functional_ckpt import errors
from functional_ckpt.core.arrays import chunks
from functional_ckpt.core.arrays.spec import STORAGE_DTYPES, ArraySpec, Box, numpy_dtype
from functional_ckpt.core.files import safetensors_header
from functional_ckpt.core.tree import structure
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.format.data_file import DataFile
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.open import connect

_PIECE_BYTES = 8 * 2**20
_ALIGNMENT = 64
DTYPES = (
    *("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
)
"""The dtypes of the format."""


class PlainFile(NamedTuple):
    """A file whose tensors are arrays of a step.

    Attributes:
        path: The file to create.
        arrays: Name of each tensor -> that of its array.
        dtypes: Name of each tensor -> its dtype.
        shapes: Name of each tensor -> its shape.
        tied: Other name -> the name of its bytes, for the metadata.
    """

    path: str
    arrays: Mapping[str, str]
    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]


def write_files(step: str, item: str, files: Sequence[PlainFile]) -> None:
    """Writes files of an item of a step; nothing is durable yet."""
    saved = checkpoint_dir.open_checkpoint(*connect(step)).tree(item)
    nodes = {node.name: node for node in saved.array_nodes()}
    for file in files:

        def stream(names: Sequence[str], file: PlainFile = file) -> Iterator[Any]:
            found = [nodes[file.arrays[name]] for name in names]
            return (data for _, data in stream_bytes(saved, found))

        write(file.path, file.dtypes, file.shapes, file.tied, stream)


def write(
    path: str,
    dtypes: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
    stream: Callable[[Sequence[str]], Iterable[Any]],
) -> None:
    """Writes a file while its tensors are read; nothing is durable yet.

    Args:
        path: The file to create.
        dtypes: Name -> dtype of each tensor.
        shapes: Name -> shape of each tensor.
        tied: Other name -> the name of its bytes, for the metadata.
        stream: Names -> their bytes in order, as flat arrays of uint8.
    """
    header, tensors = layout(path, dtypes, shapes, tied)
    end = tensors[-1].end if tensors else 0
    file = DataFile(LocalStorage(), path, len(header) + end)
    with contextlib.closing(file):
        file.append(np.frombuffer(header, np.uint8))
        for data in stream([tensor.name for tensor in tensors]):
            file.append(data)
        file.finish()


def layout(
    path: str,
    dtypes: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
    *,
    small_bytes: int = 0,
) -> tuple[bytes, list[safetensors_header.Tensor]]:
    """Returns the header of a file, and its tensors in order.

    They are sorted by the bytes of an element, so that each is aligned; of one size of elements,
    tensors of fewer than `small_bytes` bytes come first. The other arguments are those of `write`.
    """

    def size_bytes(name: str) -> int:
        return math.prod(shapes[name]) * STORAGE_DTYPES[dtypes[name]]

    def place(name: str) -> tuple[int, bool]:
        return -STORAGE_DTYPES[dtypes[name]], size_bytes(name) >= small_bytes

    tensors: list[safetensors_header.Tensor] = []
    end = 0
    for name in sorted(dtypes, key=place):
        start, end = end, end + size_bytes(name)
        tensors.append(safetensors_header.Tensor(name, dtypes[name], shapes[name], start, end))
    header = safetensors_header.encode(tensors, {"format": "pt", **tied})
    if len(header) > safetensors_header.MAX_READABLE_BYTES:
        raise errors.UnsupportedLeafError(
            f"{path}: {len(tensors):,} tensors do not fit into one file; write a directory.",
            path=path,
        )
    return header, tensors


def require(names: Iterable[tuple[str, str]], path: object) -> None:
    """Raises `UnsupportedLeafError` that names leaves which the format cannot store."""
    bad = [f"{name} ({dtype})" for name, dtype in names if dtype not in DTYPES]
    if bad:
        raise errors.UnsupportedLeafError(
            f"{path}: safetensors has no such dtype: {', '.join(bad[:8])}; convert the tensor, or "
            "write torch's own format.",
            path=path,
        )


def end_with_parent() -> None:
    """Has a worker end when the process that started it is killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ------------------------------------------------------------------------------------- reading


class _Piece(NamedTuple):
    """A region of an array, which goes to bytes `start` to `end` of the memory of pieces."""

    node: structure.ArrayNode
    box: Box
    start: int
    end: int


def stream_bytes(
    saved: checkpoint_dir.OpenItem, nodes: Sequence[structure.ArrayNode]
) -> Iterator[tuple[structure.ArrayNode, Any]]:
    """Yields the bytes of arrays, each with its array, in pieces that the next ones overwrite.

    While some are used, the disk fetches the next ones.
    """
    memory = np.empty(_PIECE_BYTES, np.uint8)
    requests = {node.name: saved.request(node) for node in nodes}

    def plan(group: Sequence[_Piece]) -> list[Callable[[], None]]:
        wanted = []
        for node, box, start, end in group:
            place = memory[start:end].view(numpy_dtype(node.spec.dtype)).reshape(box.shape)
            to = Destination.into(place)
            wanted.append(requests[node.name]._replace(box=box, destination=to))
        return reader.tasks(wanted)

    with contextlib.closing(saved.open_reader()) as reader:
        groups = _groups(nodes, requests)
        group = next(groups, None)
        tasks = plan(group or ())
        while group is not None:
            later = next(groups, None)
            later_tasks = plan(later or ())
            for task in tasks:
                task()
            for node, _, start, end in group:
                yield node, memory[start:end]
            group, tasks = later, later_tasks


def pieces(spec: ArraySpec, grid: chunks.ChunkGrid | None) -> Iterator[Box]:
    """Yields regions that cover an array, in C order; each is a run of its bytes, 8 MiB at most."""
    grid = grid or chunks.ChunkGrid(spec.shape, tuple(max(1, n) for n in spec.shape))
    return chunks.runs(grid, spec.itemsize_bytes, _PIECE_BYTES)


def _groups(
    nodes: Sequence[structure.ArrayNode], requests: Mapping[str, ReadRequest]
) -> Iterator[list[_Piece]]:
    """Yields pieces of arrays in order, as many at a time as the memory holds."""
    group: list[_Piece] = []
    end = 0
    for node in nodes:
        spec, grid = node.spec, requests[node.name].grid
        for box in pieces(spec, grid):
            size_bytes = box.num_elements * spec.itemsize_bytes
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            if group and start + size_bytes > _PIECE_BYTES:
                yield group
                group, start = [], 0
            end = start + size_bytes
            group.append(_Piece(node, box, start, end))
    if group:
        yield group
