"""Verifies a foreign checkpoint by reading it; there are no digests."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING

from functional_ckpt import errors
from functional_ckpt.core.tree import structure
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.verify.findings import Verification, reason

if TYPE_CHECKING:
    from functional_ckpt.format.reader import ArrayReader

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
    if not nodes:
        return
    try:
        reader = item.open_reader()
    except (errors.CorruptCheckpointError, errors.StorageError) as error:
        _add(search, item.name, error, tuple(node.name for node in nodes))  # it holds them all
        return
    with contextlib.closing(reader):
        check = functools.partial(_read_array, search, item, reader)
        threads.run_in_threads([functools.partial(check, node) for node in nodes])


def _read_array(
    search: Verification,
    item: checkpoint_dir.OpenItem,
    reader: ArrayReader,
    node: structure.ArrayNode,
) -> None:
    try:
        for box in node.spec.slabs(_SLAB_BYTES):
            for task in reader.tasks([item.request(node, box)]):
                task()
    except (errors.CheckpointError, MemoryError, ValueError) as error:
        _add(search, item.name, error, (node.name,))
    search.advance(node.spec.size_bytes)


def _add(search: Verification, item: str, error: Exception, leaves: tuple[str, ...]) -> None:
    path = getattr(error, "path", None) or search.path
    file = os.path.relpath(path, search.path)
    search.add(item, file, "unreadable", "something that can be read", reason(error, path), leaves)
