"""The headers of an item's `.safetensors` files, compared with its record and its index.

Other programs find tensors by these headers: they must lead to the bytes that the index leads to.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.files import file_plan, safetensors_header
from functional_ckpt.core.files.safetensors_header import Tensor
from functional_ckpt.core.tree import plain_json, structure
from functional_ckpt.format import step_files
from functional_ckpt.storage.base import Storage
from functional_ckpt.verify.findings import Problem, reason

if TYPE_CHECKING:
    from functional_ckpt.format.index import Index

_NOWHERE = (-1, 0, 0)
_MALFORMED = (errors.UsageError, LookupError, RecursionError, TypeError, ValueError)


def problems(
    storage: Storage,
    directory: str,
    files: Mapping[str, int],
    arrays: Mapping[str, tuple[ArraySpec, ChunkGrid]],
    index: Index,
) -> Iterator[tuple[str, Problem, str, str]]:
    """Yields a file, the kind of problem, the expected and the actual, for each wrong header.

    Args:
        storage: The store.
        directory: The item.
        files: Name -> size of each file.
        arrays: Name -> spec and chunks of each array that holds its own bytes.
        index: With all chunks loaded.
    """
    stored: dict[str, set[str]] = {name: set() for name in files}
    # A tensor may have another name than its array: that of a tie, or the one on the hub.
    starts: dict[tuple[str, int], str] = {}
    numbers = {number: file for number, file in enumerate(index.files) if file in files}
    for name, (_, grid) in arrays.items():
        prefix = structure.key_prefix(name)
        for key in _keys(grid):
            number, offset, length = index.locations.get((prefix + key).encode(), _NOWHERE)
            if number not in numbers:
                continue
            file = numbers[number]
            stored[file].add(name)
            starts[file, offset] = name
            if (end := offset + length) > files[file]:
                expected = f"chunks within {files[file]:,} bytes"
                yield file, "mismatch", expected, f"one of {name!r} that ends at byte {end:,}"
    for file, size_bytes in files.items():
        path = os.path.join(directory, file)
        try:
            data = step_files.read_header(storage, path, size_bytes)
            tensors, metadata = safetensors_header.decode(data, size_bytes)
            offsets = plain_json.parse(metadata.get(safetensors_header.SHARDING, "{}").encode())
            found: set[str] = set()
            for tensor in tensors:
                name, _, shape, start, _ = tensor
                if file_plan.is_padding(name):
                    continue
                offset = (0,) * len(shape)
                if offsets:
                    offset = tuple(map(plain_json.integer, offsets[name]["saved_offsets"]))
                if name not in arrays:
                    if 0 in shape:
                        continue
                    name = starts[file, len(data) + start]
                found.add(name)
                _check_tensor(tensor, offset, (file, len(data) + start), name, arrays[name], index)
        except _MALFORMED as error:
            yield file, "mismatch", "a header that agrees with the index", f"{error}"
            continue
        except (errors.CorruptCheckpointError, errors.StorageError) as error:
            yield file, "unreadable", "a header", reason(error, directory)
            continue
        if lost := stored[file] - found:
            yield file, "mismatch", f"the tensor {min(lost)!r} in the header", "none"


def _check_tensor(
    tensor: Tensor,
    offset: tuple[int, ...],
    location: tuple[str, int],
    name: str,
    array: tuple[ArraySpec, ChunkGrid],
    index: Index,
) -> None:
    """Raises ValueError unless a tensor is where the index has the first chunk of its box.

    Args:
        tensor: The tensor.
        offset: The first element of its box.
        location: Its file, and its first byte there.
        name: The array.
        array: Spec and chunks of the array.
        index: With the chunks of the array loaded.
    """
    spec, grid = array
    first = _first_key(grid, offset, tensor.shape)
    if tensor.dtype != spec.dtype or first is None:
        raise ValueError(f"tensor {name!r}: {tensor.dtype}{list(tensor.shape)} of {spec}")
    if 0 in tensor.shape:
        return
    number, at, _ = index.locations[(structure.key_prefix(name) + first).encode()]
    if (index.files[number], at) != location:
        raise ValueError(f"tensor {name!r} at byte {location[1]:,}, in the index at {at:,}")


# Arrays that are alike have the same.
@functools.lru_cache(maxsize=1024)
def _keys(grid: ChunkGrid) -> Sequence[str]:
    return [grid.key(index) for index in grid.indices()]


@functools.lru_cache(maxsize=1024)
def _first_key(grid: ChunkGrid, offset: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
    """Returns the key of the first chunk of a box; None for a box beyond the array.

    Raises:
        ValueError: The box starts within a chunk.
    """
    box = Box(offset, shape)
    if not Box.whole(grid.shape).contains(box):
        return None
    first = tuple(o // c for o, c in zip(offset, grid.chunk_shape, strict=True))
    if box.num_elements and grid.box(first).offset != offset:
        raise ValueError(f"a box at {list(offset)} starts within chunk {list(first)}")
    return grid.key(first)
