"""What storage does between save and restore, in memory: core's halves meet without a disk."""

from __future__ import annotations

from typing import Any

import numpy as np

from functional_ckpt.core import destinations, leaves, manifest, plan, tree
from functional_ckpt.core.chunks import choose_grid, digest_offsets

Bytes = dict[str, Any]


def stored(flat: tree.FlatTree) -> Bytes:
    """The bytes of every array of a flattened tree, by name."""
    arrays: Bytes = {}
    for node, value in flat.arrays:
        source = leaves.source_of(value, node)
        arrays[node.name] = np.array(leaves.host_view(source.cpu(), node.spec.dtype))
    return arrays


def build(binding: plan.Binding, arrays: Bytes) -> Any:
    """The value that a binding describes, new in every leaf."""
    if isinstance(binding, plan.Given):
        return binding.value
    if isinstance(binding, plan.ReadArray):
        destination = destinations.allocate(binding.node)
        destination.array[...] = arrays[binding.node.stored_name]
        return destination.finish()
    children = [build(child, arrays) for child in binding.children]
    return tree.close_container(binding.node, children, binding.like)


def record(flat: tree.FlatTree) -> manifest.ItemRecord:
    """The record of a flattened tree, with digests of zeros."""
    arrays: dict[str, manifest.ArrayRecord] = {}
    for node, _ in flat.arrays:
        grid = choose_grid(node.spec)
        num_blocks = digest_offsets(grid, node.spec.itemsize_bytes)[-1]
        arrays[node.name] = manifest.ArrayRecord(grid.chunk_shape, "0" * 16 * num_blocks)
    files = {"manifest.ocdbt": manifest.FileRecord(3, "0" * 16)}
    return manifest.ItemRecord(
        item="item", handler="PyTreeHandler", root=flat.root, arrays=arrays, files=files
    )
