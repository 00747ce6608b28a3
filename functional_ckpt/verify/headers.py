"""The headers of an item's `.safetensors` files, compared with its record and its index.

Other programs find tensors by these headers: they must lead to the bytes that the index leads to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

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
    numbers = dict(enumerate(index.files))
    for name, (_, grid) in arrays.items():
        prefix = structure.key_prefix(name)
        for chunk in grid.indices():
            location = index.locations.get((prefix + grid.key(chunk)).encode())
            file = None if location is None else numbers.get(location[0])
            if location is None or file not in stored:
                continue
            stored[file].add(name)
            starts[file, location[1]] = name
            if (end := location[1] + location[2]) > files[file]:
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
                if file_plan.is_padding(tensor.name):
                    continue
                name = tensor.name
                start = offsets[name]["saved_offsets"] if offsets else [0] * len(tensor.shape)
                box = Box(tuple(map(plain_json.integer, start)), tensor.shape)
                if name not in arrays and not box.num_elements:
                    continue
                if name not in arrays:
                    name = starts[file, len(data) + tensor.start]
                found.add(name)
                own = tensor._replace(name=name)
                _check_tensor(own, box, len(data), file, arrays[name], index)
        except _MALFORMED as error:
            yield file, "mismatch", "a header that agrees with the index", f"{error}"
            continue
        except (errors.CorruptCheckpointError, errors.StorageError) as error:
            yield file, "unreadable", "a header", reason(error, directory)
            continue
        if lost := stored[file] - found:
            yield file, "mismatch", f"the tensor {min(lost)!r} in the header", "none"


def _check_tensor(
    tensor: Tensor, box: Box, header_bytes: int, file: str, array: Any, index: Index
) -> None:
    """Raises ValueError unless a tensor is where the index has the first chunk of its box."""
    spec, grid = array
    if tensor.dtype != spec.dtype or not Box.whole(spec.shape).contains(box):
        raise ValueError(f"tensor {tensor.name!r}: {tensor.dtype}{list(tensor.shape)} of {spec}")
    if not box.num_elements:
        return
    first = tuple(o // c for o, c in zip(box.offset, grid.chunk_shape, strict=True))
    key = (structure.key_prefix(tensor.name) + grid.key(first)).encode()
    number, offset, _ = index.locations[key]
    start = header_bytes + tensor.start
    if (index.files[number], offset) != (file, start) or grid.box(first).offset != box.offset:
        raise ValueError(f"tensor {tensor.name!r} at byte {start:,}, in the index at {offset:,}")
