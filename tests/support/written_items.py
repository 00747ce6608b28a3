"""An item's arrays on disk, written from regions as a save writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorstore as ts

from functional_ckpt.core.files import file_plan
from functional_ckpt.core.files.file_plan import StoredBox
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.format.write_files import ArrayWrite, WrittenBox, write_files
from functional_ckpt.format.write_index import IndexedArray, Scalars, write_index
from functional_ckpt.saving.finalize import joined_digests
from functional_ckpt.storage.base import Storage

__all__ = ["write_by_tensorstore", "write_item", "write_regions"]


def write_regions(
    storage: Storage,
    directory: str,
    writes: Sequence[ArrayWrite],
    *,
    rank: int = 0,
    num_threads: int = 4,
) -> tuple[Sequence[WrittenBox], Mapping[str, FileRecord]]:
    """One rank's files."""
    boxes = [
        StoredBox(each.name, each.spec, each.box, each.grid, _is_tensor(each)) for each in writes
    ]
    plans = file_plan.plan_files(boxes, is_sharded=True, rank=rank)
    named = file_plan.file_names("data", plans, shard=rank)
    ordered = [writes[member.number] for plan in named for member in plan.members]
    written = write_files(storage, directory, named, ordered, num_threads=num_threads)
    return written.boxes, written.files


def write_item(
    storage: Storage,
    directory: str,
    *ranks: Sequence[ArrayWrite],
    scalars: Scalars = (),
    tied: Mapping[str, str] | None = None,
    num_threads: int = 4,
) -> tuple[dict[str, str], dict[str, FileRecord]]:
    """Returns the digests of every array, and the records of the files."""
    boxes: list[WrittenBox] = []
    files: dict[str, FileRecord] = {}
    for rank, writes in enumerate(ranks):
        found, records = write_regions(
            storage, directory, writes, rank=rank, num_threads=num_threads
        )
        boxes += found
        files |= records
    held: dict[str, list[WrittenBox]] = {}
    for box in boxes:
        held.setdefault(box.name, []).append(box)
    arrays = {
        write.name: IndexedArray(write.name, write.spec, write.grid, held[write.name])
        for writes in ranks
        for write in writes
    }
    again = [arrays[owner]._replace(name=name) for name, owner in (tied or {}).items()]
    files |= write_index(storage, directory, list(files), [*arrays.values(), *again], scalars)[0]
    return {name: joined_digests(array).hex() for name, array in arrays.items()}, files


def write_by_tensorstore(
    directory: str, values: Mapping[str, bytes], *, node_bytes: int, inline_bytes: int = 1024
) -> None:
    """Writes the keys of a database as format 1 did in object stores: its nodes are compressed."""
    config = {
        "compression": {"id": "zstd"},
        "max_inline_value_bytes": inline_bytes,
        "max_decoded_node_bytes": node_bytes,
    }
    base = {"driver": "file", "path": f"{directory}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": config}).result()
    transaction = ts.Transaction()
    writes = [store.with_transaction(transaction).write(key, v) for key, v in values.items()]
    transaction.commit_sync()
    for write in writes:
        write.result()


def _is_tensor(write: ArrayWrite) -> bool:
    try:
        itemsize = write.spec.itemsize_bytes
        file_plan.stored_chunks(write.grid, write.box, itemsize, is_tensor=True)
    except ValueError:
        return False
    return True
