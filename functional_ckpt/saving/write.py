"""Writes one rank's part of a checkpoint, and reports it to the primary."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from functional_ckpt import errors
from functional_ckpt.core.records import records, structure_json
from functional_ckpt.core.tree import structure
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format.regions import Regions
from functional_ckpt.format.tuning import NUM_THREADS
from functional_ckpt.format.write_files import WrittenBox, write_files
from functional_ckpt.saving.lower import LoweredItem
from functional_ckpt.saving.parts import StagedItem
from functional_ckpt.steps.last_files import LastFiles
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.base import Storage

REPORTS = ".ranks"
"""The folder of the ranks' reports; removed before the step is committed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ItemReport:
    """One rank's part of one tree item.

    Attributes:
        regions: The regions that it wrote: columns, where there are several ranks.
        files: Their files.
        root: The structure on this rank, if it may differ from the primary's.
    """

    regions: Sequence[WrittenBox] | Regions
    files: Mapping[str, records.FileRecord]
    root: structure.Node | None

    @property
    def columns(self) -> Regions:
        """The regions in columns."""
        regions = self.regions
        return regions if isinstance(regions, Regions) else Regions.of(regions, self.files)

    def encode(self) -> tuple[dict[str, Any], bytes]:
        """Returns the report as a JSON header and the bytes behind it."""
        regions, data = self.columns.encode()
        return {
            "regions": regions,
            "files": {name: [file.size_bytes, file.xxh3] for name, file in self.files.items()},
            "root": None if self.root is None else structure_json.to_json(self.root),
            "num_bytes": len(data),
        }, data

    @classmethod
    def decode(cls, record: Mapping[str, Any], data: bytes) -> ItemReport:
        """Returns the report of `encode`."""
        root = record["root"]
        return cls(
            regions=Regions.decode(record["regions"], data),
            files={name: records.FileRecord(*file) for name, file in record["files"].items()},
            root=None if root is None else structure_json.from_json(root),
        )


RankReport: TypeAlias = Mapping[str, ItemReport]
"""One rank's part of a checkpoint: tree item -> its report."""


class Begun(NamedTuple):
    """An attempt to write a checkpoint, the same on all ranks.

    Attributes:
        tmp: The directory, created by the primary.
        digests: The digest of each item's structure on the primary; an equal one is not reported.
        id: Unique to the attempt: a directory of an object store may be that of an earlier one,
            to which a suspended rank may still write.
        token: Part of the names of data files that may be uploaded to an object store; else empty.
    """

    tmp: str
    digests: Mapping[str, str]
    id: str
    token: str


def write_part(
    storage: Storage,
    begun: Begun,
    items: Sequence[StagedItem],
    group: Coordinator,
    num_threads: int = NUM_THREADS,
    *,
    last: LastFiles | None = None,
    on_written: Callable[[int], None] | None = None,
) -> RankReport:
    """Writes this rank's regions of every item; nothing is durable yet.

    Ranks other than the primary then give their report to it, e.g. by `write_report`.

    Args:
        storage: The file system.
        begun: The attempt.
        items: The items to write.
        group: The ranks.
        num_threads: How many threads write at a time.
        last: The files of the last step; None for a checkpoint of its own.
        on_written: Called with the size of each region after it was written, on any thread.
    """
    tmp = begun.tmp
    if group.rank:
        is_tmp = commit.TMP_SUFFIX in os.path.basename(tmp)
        commit.check_visible(storage, tmp if is_tmp else commit.tmp_path(tmp), group.rank)
    report: dict[str, ItemReport] = {}
    if last is not None:
        last.start()
    for item in sorted(items, key=lambda item: not item.blocks_caller):
        name, root = item.lowered.name, item.lowered.root
        if root is None:
            continue
        path = os.path.join(tmp, name)
        # Never the parents: a directory that was moved away meanwhile must not be created again.
        storage.make_directory(path, parents=False)
        written = write_files(
            storage,
            path,
            item.files,
            item.writes,
            num_threads=num_threads,
            token=begun.token,
            kept={} if last is None else last.of(name, item.files, item.writes),
            on_written=on_written,
        )
        if last is not None:
            last.wrote(name, written.kept)
        is_known = group.rank > 0 and begun.digests.get(name) == _root_digest(root)
        report[name] = ItemReport(
            regions=written.boxes, files=written.files, root=None if is_known else root
        )
    return report


def begin(
    group: Coordinator,
    what: str,
    items: Sequence[LoweredItem],
    root: str,
    create: Callable[[], str],
    *,
    has_token: bool,
) -> Begun:
    """Starts writing on all ranks.

    The primary names the directory, since clocks of ranks may differ: `create` runs there, creates
    the temporary directory and returns its path. With `has_token`, names of data files contain a
    token of this attempt.
    """

    def on_primary(_: Sequence[bytes]) -> bytes:
        name = os.path.basename(create())
        known: dict[str, str] = {}
        if group.num_ranks > 1:
            known = {item.name: _root_digest(item.root) for item in items if item.root is not None}
        own = new_token()
        return json.dumps([name, known, own, own if has_token else ""]).encode()

    name, *others = json.loads(group.gather_broadcast(what, b"", on_primary))
    return Begun(os.path.join(root, name), *others)


def new_token() -> str:
    """Returns a text that is unique to one attempt."""
    return uuid.uuid4().hex[:12]


def every_report(
    storage: Storage, begun: Begun, own: RankReport, num_ranks: int
) -> list[RankReport]:
    """On the primary: returns the reports of all ranks, and removes them from the checkpoint."""
    if num_ranks == 1:
        return [own]
    reports = [own, *(read_report(storage, begun, rank) for rank in range(1, num_ranks))]
    storage.remove(os.path.join(begun.tmp, REPORTS))
    return reports


def _root_digest(root: structure.Node) -> str:
    """Returns a digest by which ranks compare structures, values included."""
    return records.digest_hex(json.dumps(structure_json.to_json(root)).encode())


def write_report(storage: Storage, begun: Begun, rank: int, report: RankReport) -> None:
    """Writes this rank's report to a file that the primary reads."""
    storage.make_directory(os.path.join(begun.tmp, REPORTS), parents=False)
    content = encode_report(report)
    digest = records.digest_hex(content).encode()
    storage.write(_report_path(begun, rank), content + digest)


def encode_report(report: RankReport) -> bytes:
    """Returns a report as a message to the primary."""
    encoded = {name: item.encode() for name, item in report.items()}
    header = json.dumps({name: record for name, (record, _) in encoded.items()}).encode()
    return b"".join([header, b"\n", *(data for _, data in encoded.values())])


def decode_report(content: bytes) -> RankReport:
    """Returns the report of `encode_report`."""
    header, _, data = content.partition(b"\n")
    reports: dict[str, ItemReport] = {}
    for name, record in json.loads(header).items():
        end = record["num_bytes"]
        reports[name] = ItemReport.decode(record, data[:end])
        data = data[end:]
    return reports


def _report_path(begun: Begun, rank: int) -> str:
    return os.path.join(begun.tmp, REPORTS, f"{rank}.{begun.id}.report")


def read_report(storage: Storage, begun: Begun, rank: int) -> RankReport:
    """Returns a rank's report; `CoordinationError` if it is missing."""
    path = _report_path(begun, rank)
    if not queries.exists(storage, path):
        raise errors.CoordinationError(
            f"Rank {rank} reported its files as written, but {path} does not exist. All ranks must "
            "save to the same directory on a shared file system.",
            ranks=(rank,),
            path=path,
        )
    content = storage.read(path)
    content, digest = content[:-16], content[-16:]
    if records.digest_hex(content).encode() != digest:
        raise errors.CorruptCheckpointError(f"{path}: it was changed or cut short.", path=path)
    return decode_report(content)
