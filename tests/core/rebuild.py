"""Storage between save and restore, in memory: tests both halves of core without a disk."""

from __future__ import annotations

from typing import Any

import numpy as np

from functional_ckpt.core.arrays.chunks import choose_grid, digest_offsets
from functional_ckpt.core.records import records
from functional_ckpt.core.restore_plan import plan
from functional_ckpt.core.tree import decode, encode, flatten

Bytes = dict[str, Any]


def stored(flat: flatten.FlatTree) -> Bytes:
    """The bytes of every array of a flattened tree, by name."""
    arrays: Bytes = {}
    for node, value in flat.arrays:
        source = encode.source_of(value, node)
        arrays[node.name] = np.array(encode.host_view(source.cpu(), node.spec.dtype))
    return arrays


def build(binding: plan.Binding, arrays: Bytes) -> Any:
    """The value that a binding describes, new in every leaf."""
    if isinstance(binding, plan.Given):
        return binding.value
    if isinstance(binding, plan.ReadArray):
        destination = decode.allocate(binding.node)
        destination.array[...] = arrays[binding.node.stored_name]
        return destination.finish()
    children = [build(child, arrays) for child in binding.children]
    return flatten.unflatten_one_level(binding.node, children, binding.like)


def record(flat: flatten.FlatTree) -> records.ItemRecord:
    """The record of a flattened tree, with digests of zeros."""
    arrays: dict[str, records.ArrayRecord] = {}
    for node, _ in flat.arrays:
        grid = choose_grid(node.spec)
        num_blocks = digest_offsets(grid, node.spec.itemsize_bytes)[-1]
        arrays[node.name] = records.ArrayRecord(grid.chunk_shape, "0" * 16 * num_blocks)
    files = {"manifest.ocdbt": records.FileRecord(3, "0" * 16)}
    return records.ItemRecord(
        item="item", handler="PyTreeHandler", root=flat.root, arrays=arrays, files=files
    )
