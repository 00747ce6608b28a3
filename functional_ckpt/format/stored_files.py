"""The data files of a stored step that the next one may share, by its record."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from functional_ckpt.core.arrays.chunks import DIGEST_BLOCK_BYTES
from functional_ckpt.core.arrays.digests import Digests
from functional_ckpt.core.files.file_plan import FilePlan
from functional_ckpt.core.records.records import EXTENSION_FILE, parse_item
from functional_ckpt.core.tree import structure
from functional_ckpt.format.digest_table import ItemDigests
from functional_ckpt.format.shared_files import KeptFile
from functional_ckpt.format.tuning import SHARED_FROM_BYTES
from functional_ckpt.format.write_files import ArrayWrite, WrittenBox
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage

_TOKEN = re.compile(r"-[0-9a-f]{12}(?=\.)")


def stored_files(
    storage: Storage, item_directory: str, plans: Sequence[FilePlan], writes: Sequence[ArrayWrite]
) -> dict[str, KeptFile]:
    """Returns the files of an item that have the layout of planned ones, by planned names.

    Args:
        storage: The store.
        item_directory: The item.
        plans: The planned files.
        writes: Their members, file by file and in the order of each.

    Raises:
        CorruptCheckpointError: The item's record, or a page of its digests, was changed.
        StorageError: The store refused.
    """
    path = os.path.join(item_directory, EXTENSION_FILE)
    is_worth_it = any(plan.size_bytes >= SHARED_FROM_BYTES for plan in plans)
    text = queries.read_optional(storage, path) if is_worth_it else None
    if text is None:
        return {}
    record = parse_item(text, path)
    specs = {node.name: node.spec for node in structure.iter_arrays(record.root)}
    digests = ItemDigests(storage, item_directory, record)

    def digests_of(write: ArrayWrite) -> str | None:
        array = record.arrays.get(write.name)
        if array is None or specs[write.name] != write.spec:
            return None
        if (array.chunk_shape, record.block_bytes) != (write.grid.chunk_shape, DIGEST_BLOCK_BYTES):
            return None
        stored = Digests(write.grid, write.spec.itemsize_bytes, digests.of(write.name))
        return "".join(map(stored.of, write.grid.indices(write.box)))

    names = {_TOKEN.sub("", name): name for name in record.files}
    found: dict[str, KeptFile] = {}
    rest = iter(writes)
    for plan in plans:
        own = [next(rest) for _ in plan.members]
        file = record.files.get(names.get(plan.name, ""))
        if file is None or file.size_bytes != plan.size_bytes:
            continue
        path = os.path.join(item_directory, names[plan.name])
        status = storage.stat(path)
        boxes = _boxes(plan, own, digests_of)
        if status is None or boxes is None:
            continue
        if storage.read(path, 0, len(plan.header)) == plan.header:
            count = status.num_links
            found[plan.name] = KeptFile(path, status, file, plan.header, boxes, count)
    return found


def _boxes(
    plan: FilePlan, writes: Sequence[ArrayWrite], digests_of: Callable[[ArrayWrite], str | None]
) -> list[WrittenBox] | None:
    """Returns the members of a file with their stored digests; None if one is stored otherwise."""
    boxes: list[WrittenBox] = []
    for member, write in zip(plan.members, writes, strict=True):
        digests = digests_of(write)
        if digests is None:
            return None
        chunk_shape, name = write.grid.chunk_shape, plan.name
        boxes.append(
            WrittenBox(
                write.name, chunk_shape, write.box, name, member.offset, plan.has_tensors, digests
            )
        )
    return boxes
