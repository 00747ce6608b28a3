"""Verifies a foreign checkpoint by reading it; there are no digests."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from functional_ckpt import errors
from functional_ckpt.core.arrays import spec
from functional_ckpt.core.tree import structure
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.verify.findings import Verification, reason

__all__ = ["verify_foreign"]

# How much of an array is held in memory at a time.
_SLAB_BYTES = 256 * 2**20


def verify_foreign(search: Verification, step: int | None) -> None:
    """Reads every array and every small file; unreadable ones are findings."""
    opened = checkpoint_dir.open_checkpoint(search.storage, search.path, step)
    for name, kind in opened.items.items():
        try:
            if kind == "json":
                opened.json(name)
            else:
                _read_tree(search, opened.tree(name))
        except (errors.CorruptCheckpointError, errors.StorageError) as error:
            _add(search, name, error, () if error.key_path is None else (error.key_path,))
    search.add(None, ".", "no digests", "digests to compare with", "a checkpoint without them")


def _read_tree(search: Verification, item: checkpoint_dir.OpenItem) -> None:
    from functional_ckpt.runtime import threads

    nodes = list(item.array_nodes())
    search.total_bytes += sum(node.spec.size_bytes for node in nodes)
    if nodes:
        try:
            _ = item.database
        except (errors.CorruptCheckpointError, errors.StorageError) as error:
            _add(search, item.name, error, tuple(node.name for node in nodes))  # it holds them all
            return
    threads.run_in_threads([functools.partial(_read_array, search, item, node) for node in nodes])


def _read_array(
    search: Verification, item: checkpoint_dir.OpenItem, node: structure.ArrayNode
) -> None:
    import numpy as np

    from functional_ckpt.format import read_tensorstore

    try:
        for box in _slabs(node.spec):
            read_tensorstore.read_foreign_array(
                item.database,
                node.name,
                np.empty(box.shape, spec.numpy_dtype(node.spec.dtype)),
                box=box,
                shape=node.spec.shape,
                is_zarr3=item.is_zarr3,
                fills_missing=item.fills_missing,
            )
    except (errors.CheckpointError, MemoryError, ValueError) as error:
        _add(search, item.name, error, (node.name,))
    search.advance(node.spec.size_bytes)


def _slabs(array: spec.ArraySpec) -> Iterator[spec.Box]:
    """The array in parts along its first dim, each of them bounded."""
    if not array.num_elements:
        return
    if not array.shape or array.size_bytes <= _SLAB_BYTES:
        yield spec.Box.whole(array.shape)
        return
    num_rows = max(1, _SLAB_BYTES * array.shape[0] // array.size_bytes)
    rest = array.shape[1:]
    for row in range(0, array.shape[0], num_rows):
        yield spec.Box((row, *(0 for _ in rest)), (min(num_rows, array.shape[0] - row), *rest))


def _add(search: Verification, item: str, error: Exception, leaves: tuple[str, ...]) -> None:
    path = getattr(error, "path", None) or search.path
    file = os.path.relpath(path, search.path)
    search.add(item, file, "unreadable", "something that can be read", reason(error, path), leaves)
