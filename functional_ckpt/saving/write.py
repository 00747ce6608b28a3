"""Writing one checkpoint directory, every rank its part: stage, write, report.

    lower     values -> structures and sources              the caller's thread, copies nothing
    plan      assigns chunks to ranks                       the caller's thread, a round trip
    stage     sources -> host arrays                        the caller's thread, the only copy
    write     host arrays -> chunks in this rank's databases     the background, every rank
    finalize  merge, metadata, digests, sync                the background, the primary

The manager and `fc.save` share it; `lower`, `plan` and `finalize` hold the other parts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.records import records, structure_json
from functional_ckpt.core.tree import structure
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format import backends, write_direct, write_tensorstore
from functional_ckpt.saving.lower import LoweredItem
from functional_ckpt.saving.parts import StagedItem
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.base import Storage

__all__ = ["RankReport", "read_report", "write", "write_report"]

REPORTS = ".ranks"
"""The folder of the ranks' reports for the primary; removed before the step is committed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """The report of one rank.

    Attributes:
        digests: Item -> the digests of its chunks.
        children: Item -> the databases it used, relative to the item.
        chunk_shapes: Item -> array -> how it is cut; of the arrays whose metadata this rank wrote.
        roots: Item -> its structure as this rank has it; only where it may differ from the
            primary's.
        files: Item -> the records of this rank's files, by path relative to the item; the primary
            reads files that it does not list.
    """

    digests: Mapping[str, write_tensorstore.Digests]
    chunk_shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    children: Mapping[str, tuple[str, ...]]
    roots: Mapping[str, structure.Node]
    files: Mapping[str, Mapping[str, records.FileRecord]] = dataclasses.field(
        default_factory=dict[str, Mapping[str, records.FileRecord]]
    )


# ------------------------------------------------------------------------------------ write


_NOTHING = write_direct.Written(digests={}, files={})


def write(
    storage: Storage,
    directory: str,
    items: Sequence[StagedItem],
    *,
    rank: int = 0,
    num_ranks: int = 1,
    known: Mapping[str, str] | None = None,
    num_threads: int = write_direct.NUM_THREADS,
) -> RankReport:
    """Writes this rank's chunks of every item below `directory`; nothing is durable yet.

    Args:
        storage: The file system.
        directory: The checkpoint.
        items: What to write.
        rank: This rank.
        num_ranks: All ranks; one alone may write into the items' own databases.
        known: Digest of each item's structure on the primary: equal structures are not reported.
        num_threads: How many are busy at a time.
    """
    backend = backends.backend_of(storage)
    digests: dict[str, write_tensorstore.Digests] = {}
    children: dict[str, tuple[str, ...]] = {}
    chunk_shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    roots: dict[str, structure.Node] = {}
    files: dict[str, Mapping[str, records.FileRecord]] = {}
    for item in sorted(items, key=lambda item: not item.blocks_caller):
        name, root = item.lowered.name, item.lowered.root
        if root is None:
            continue
        path = os.path.join(directory, name)
        # Never the parents: a directory that was moved away meanwhile must not come back.
        storage.make_directory(path, parents=False)
        tied = tied_arrays(item) if num_ranks == 1 else {}
        scalars = [scalar for scalar in item.lowered.scalars if scalar[0] in item.scalars]
        # One rank alone writes into the item's own database, and who has nothing has none.
        has_child = num_ranks > 1 and (item.writes or scalars)
        children[name] = tuple(write_tensorstore.child_names(rank, 1)) if has_child else ()
        written = _NOTHING
        if has_child or num_ranks == 1:
            child = children[name][0] if has_child else ""
            written = backend.write(
                path, child, item.writes, scalars, tied, num_threads=num_threads
            )
        digests[name], files[name] = written.digests, written.files
        chunk_shapes[name] = {w.name: w.grid.chunk_shape for w in item.writes if w.writes_metadata}
        if known is None or known.get(name) != root_digest(root):
            roots[name] = root
    return RankReport(
        digests=digests, children=children, chunk_shapes=chunk_shapes, roots=roots, files=files
    )


def tied_arrays(item: StagedItem) -> dict[str, tuple[str, ChunkGrid]]:
    """Name of every tied leaf -> name and grid of the array that holds its bytes."""
    grids = {write.name: write.grid for write in item.writes}
    return {
        leaf.name: (leaf.tied_to, grids[leaf.tied_to])
        for leaf in item.lowered.tied
        if leaf.tied_to is not None
    }


def write_part(
    storage: Storage,
    tmp: str,
    items: Sequence[StagedItem],
    group: Coordinator,
    known: Mapping[str, str],
    num_threads: int = write_direct.NUM_THREADS,
) -> RankReport:
    """Writes one rank's part below `tmp`, which the primary created; see `every_report`."""
    if group.rank:
        is_tmp = commit.TMP_SUFFIX in os.path.basename(tmp)
        commit.check_visible(storage, tmp if is_tmp else commit.tmp_path(tmp), group.rank)
    return write(
        storage,
        tmp,
        items,
        rank=group.rank,
        num_ranks=group.num_ranks,
        known=known if group.rank else None,
        num_threads=num_threads,
    )


def every_report(storage: Storage, tmp: str, own: RankReport, num_ranks: int) -> list[RankReport]:
    """On the primary: returns the reports of all ranks, and removes them from the checkpoint."""
    if num_ranks == 1:
        return [own]
    reports = [own, *(read_report(storage, tmp, rank) for rank in range(1, num_ranks))]
    storage.remove(os.path.join(tmp, REPORTS))
    return reports


def digests(items: Sequence[LoweredItem]) -> dict[str, str]:
    """Returns the digest of every tree's structure."""
    return {item.name: root_digest(item.root) for item in items if item.root is not None}


def root_digest(root: structure.Node) -> str:
    """Returns a digest by which ranks compare structures, values included."""
    return records.digest_hex(json.dumps(structure_json.to_json(root)).encode())


def write_report(storage: Storage, directory: str, rank: int, report: RankReport) -> None:
    """Writes this rank's report for the primary."""
    folder = os.path.join(directory, REPORTS)
    storage.make_directory(folder, parents=False)
    record = {
        "format": "functional_ckpt",
        "version": 1,
        "digests": report.digests,
        "children": report.children,
        "chunk_shapes": report.chunk_shapes,
        "roots": {name: structure_json.to_json(root) for name, root in report.roots.items()},
        "files": {
            item: {name: [file.size_bytes, file.xxh3] for name, file in files.items()}
            for item, files in report.files.items()
        },
    }
    storage.write(os.path.join(folder, f"{rank}.json"), records.with_checksum(record))


def read_report(storage: Storage, directory: str, rank: int) -> RankReport:
    """Returns a rank's report; `CoordinationError` if it is missing."""
    path = os.path.join(directory, REPORTS, f"{rank}.json")
    if not queries.exists(storage, path):
        raise errors.CoordinationError(
            f"Rank {rank} reported its files as written, but {path} does not exist. All ranks must "
            "save to the same directory on a shared file system.",
            ranks=(rank,),
            path=path,
        )
    record = records.verify_checksum(storage.read(path), path)
    return RankReport(
        digests={
            item: {
                name: {int(place): text for place, text in chunks.items()}
                for name, chunks in found.items()
            }
            for item, found in record["digests"].items()
        },
        children={item: tuple(names) for item, names in record["children"].items()},
        chunk_shapes={
            item: {name: tuple(shape) for name, shape in shapes.items()}
            for item, shapes in record["chunk_shapes"].items()
        },
        roots={name: structure_json.from_json(node) for name, node in record["roots"].items()},
        files={
            item: {name: records.FileRecord(*file) for name, file in files.items()}
            for item, files in record["files"].items()
        },
    )
