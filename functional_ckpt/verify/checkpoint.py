"""Verifies a checkpoint on disk: damaged files and lost leaves. Free of torch.

    the checkpoint's record   its own seal, its step
    every file listed         there, regular, of its size, with its digest
    every file not listed     is none
    every array               its stored metadata and each chunk, as a reader gets it

Files are compared first: that finds any flipped bit. Arrays are then read through the database,
which lists the leaves lost with a damaged file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Collection, Mapping

from functional_ckpt import errors
from functional_ckpt.core.nodes.part import PART_FILE
from functional_ckpt.core.records import orbax
from functional_ckpt.core.records import records as records_lib
from functional_ckpt.core.records.records import EXTENSION_FILE, FileRecord
from functional_ckpt.format import parts
from functional_ckpt.runtime.threads import gc_paused, run_in_threads
from functional_ckpt.storage import commit, queries, replacement
from functional_ckpt.storage.base import Storage
from functional_ckpt.verify.arrays import ItemArrays
from functional_ckpt.verify.findings import Finding, Problem, Progress, Verification, reason
from functional_ckpt.verify.foreign import verify_foreign
from functional_ckpt.verify.shared import note_damage, sharing

# Below this a second thread takes longer to start than it saves.
_THREADS_BYTES = 2**20


def verify_checkpoint(
    storage: Storage, path: str, step: int | None = None, *, progress: Progress | None = None
) -> list[Finding]:
    """Compares a checkpoint with its records.

    Args:
        storage: Where it is.
        path: Its directory: a step's, or one without steps; native or Orbax's.
        step: The step of its directory name; None if unknown.
        progress: Progress callback.

    Returns:
        The findings, sorted by item and file; empty if every byte is intact.

    Raises:
        StepNotFoundError: There is no directory at `path`.
        UsageError: It is an item's directory of a native checkpoint.
        CorruptCheckpointError: The directory is no checkpoint at all.
    """
    # Readers get the old copy while a replacement is under way.
    path = replacement.old_copy(commit.protocol(storage, os.path.dirname(path)), path) or path
    if not queries.is_directory(storage, path):
        raise errors.StepNotFoundError(f"There is no checkpoint at {path}.", path=path, step=step)
    if _is_item(storage, path):
        raise errors.UsageError(
            f"{path} is one item; verify its checkpoint {os.path.dirname(path)}, which has the "
            "digest of the item's record.",
            path=path,
        )
    search = Verification(storage, path, progress)
    if _is_ours(storage, path):
        _verify_ours(search, step)
    else:
        verify_foreign(search, step)
    return sorted(search.findings, key=lambda found: (found.item or "", found.file))


def _is_item(storage: Storage, path: str) -> bool:
    names = (EXTENSION_FILE, orbax.TREE_METADATA_FILE)
    return all(queries.exists(storage, os.path.join(path, name)) for name in names)


def _is_ours(storage: Storage, path: str) -> bool:
    """Returns whether this package wrote the checkpoint, even if its record is gone."""
    folders = (path, *(os.path.join(path, name) for name in storage.list(path)))
    if any(queries.exists(storage, os.path.join(folder, EXTENSION_FILE)) for folder in folders):
        return True
    try:
        return b"functional_ckpt" in storage.read(os.path.join(path, orbax.COMMIT_FILE))
    except errors.StorageError:
        return False


def _verify_ours(search: Verification, step: int | None) -> None:
    sizes = queries.sizes(search.storage, search.path)
    on_disk = sorted(sizes)
    record = _step_record(search, step)
    with gc_paused():
        items = {name: _item_record(search, name, record) for name in _tree_items(record, on_disk)}
        elsewhere = _part_of_node(search)
        files = _Files(search, _expected_files(record, items), sizes, elsewhere)
        own = {name: item for name, item in items.items() if item is not None}
        arrays = [ItemArrays(search, name, item) for name, item in own.items()]
    search.total_bytes = sum(file.size_bytes for file in files.expected.values())
    search.total_bytes += sum(each.size_bytes for each in arrays)
    num_threads = 2 if search.total_bytes > _THREADS_BYTES else 1
    compare = [functools.partial(files.compare, name) for name in files.expected]
    run_in_threads(compare, num_threads)
    _find_unlisted(search, record, items, on_disk, files.expected)
    with contextlib.ExitStack() as opened:
        run_in_threads([task for each in arrays for task in each.tasks(opened)], num_threads)
    for each in arrays:
        each.attribute_failures(files.damaged)
    search.findings += _with_steps(search, files.damaged)


def _with_steps(search: Verification, damaged: Mapping[str, Finding]) -> list[Finding]:
    """Returns the findings with the other steps whose files these are."""
    lost = {name: each for name, each in damaged.items() if each.is_damage}
    steps = sharing(search.storage, search.path, lost)
    note_damage(search.storage, search.path, lost)
    return [
        dataclasses.replace(each, shared_with=steps.get(name, ())) for name, each in damaged.items()
    ]


# ------------------------------------------------------------------------------------ records


def _step_record(search: Verification, step: int | None) -> records_lib.StepRecord | None:
    """Returns the checkpoint's own record; None, and a finding, where it cannot be believed."""
    path = os.path.join(search.path, EXTENSION_FILE)
    expected = "the record of a checkpoint" if step is None else f"the record of step {step}"
    if not _is_regular(search.storage, path):
        search.add(None, EXTENSION_FILE, "missing", expected, queries.kind(search.storage, path))
        return None
    try:
        record = records_lib.parse_step(search.storage.read(path), path)
    except errors.CheckpointError as error:
        search.add(None, EXTENSION_FILE, _problem(error), expected, reason(error, path))
        return None
    if step is not None and record.step != step:
        got = "one without a step" if record.step is None else f"that of step {record.step}"
        search.add(None, EXTENSION_FILE, "swapped", expected, got)
    return record


def _part_of_node(search: Verification) -> dict[str, str]:
    """Returns the files of a step that other nodes wrote, and by which; none of a complete one."""
    path = os.path.join(search.path, PART_FILE)
    try:
        part = parts.read_part(search.storage, search.path)
    except errors.CheckpointError as error:
        search.add(None, PART_FILE, _problem(error), "the record of a part", reason(error, path))
        return {}
    if part is None:
        return {}
    root = os.path.dirname(search.path)
    own = parts.read_directory_id(search.storage, root)
    return {file: node.name for node in part.nodes if node.directory != own for file in node.files}


def _tree_items(record: records_lib.StepRecord | None, on_disk: Collection[str]) -> list[str]:
    if record is not None:
        return [name for name, kind in record.items.items() if kind == "tree"]
    return [name.split("/")[0] for name in on_disk if name.split("/")[1:] == [EXTENSION_FILE]]


def _item_record(
    search: Verification, name: str, step: records_lib.StepRecord | None
) -> records_lib.ItemRecord | None:
    """Returns the record of a tree item; None, and a finding, where it cannot be believed."""
    file = f"{name}/{EXTENSION_FILE}"
    path = os.path.join(search.path, file)
    expected = f"the record of item {name!r}"
    if not _is_regular(search.storage, path):
        search.add(name, file, "missing", expected, queries.kind(search.storage, path))
        return None
    try:
        data = search.storage.read(path)
        record = records_lib.parse_item(data, path)
    except errors.CheckpointError as error:
        search.add(name, file, _problem(error), expected, reason(error, path))
        return None
    if record.item != name:
        search.add(name, file, "swapped", expected, f"that of item {record.item!r}")
    elif step is not None and step.files.get(file) != FileRecord.of(data):
        search.add(name, file, "swapped", expected, "that of the same item in another save")
    return record


def _problem(error: errors.CheckpointError) -> Problem:
    """Returns the kind of a finding: an error of the system is not damage."""
    return "unreadable" if isinstance(error, errors.StorageError) else "record"


# ------------------------------------------------------------------------------------ files


def _expected_files(
    step: records_lib.StepRecord | None, items: Mapping[str, records_lib.ItemRecord | None]
) -> dict[str, FileRecord]:
    """Returns every listed file, except for the records, which were compared when read."""
    listed = {} if step is None else step.files
    records = {f"{item}/{EXTENSION_FILE}" for item in items}
    expected = {name: file for name, file in listed.items() if name not in records}
    for item, record in items.items():
        if record is not None:
            expected |= {f"{item}/{name}": file for name, file in record.files.items()}
    return expected


def _find_unlisted(
    search: Verification,
    step: records_lib.StepRecord | None,
    items: Mapping[str, records_lib.ItemRecord | None],
    on_disk: Collection[str],
    expected: Collection[str],
) -> None:
    for name in on_disk:
        top = name.split("/")[0]
        is_record = name in (EXTENSION_FILE, PART_FILE) or (
            top in items and name == f"{top}/{EXTENSION_FILE}"
        )
        # The files of a damaged record are unknown.
        is_unknowable = items[top] is None if top in items else step is None
        if name in expected or is_record or is_unknowable:
            continue
        kind = queries.kind(search.storage, os.path.join(search.path, name))
        search.add(_item_of(name), name, "unexpected", "no such file", kind)


class _Files:
    """Compares files with their records."""

    def __init__(
        self,
        search: Verification,
        expected: Mapping[str, FileRecord],
        sizes: Mapping[str, int],
        elsewhere: Mapping[str, str],
    ) -> None:
        self.expected = expected
        self._elsewhere = elsewhere
        self._sizes = sizes
        self._expected_sizes = {file.size_bytes for file in expected.values()}
        self.damaged: dict[str, Finding] = {}
        self._search = search
        self._owners = {file: name for name, file in expected.items() if file.size_bytes}

    def compare(self, name: str) -> None:
        """Compares one file; safe from any thread."""
        expected = self.expected[name]
        path = os.path.join(self._search.path, name)
        try:
            is_regular = _is_regular(self._search.storage, path)
        except errors.StorageError as error:
            self._add(name, "unreadable", "a file that can be read", reason(error, path))
            return
        if not is_regular:
            kind = queries.kind(self._search.storage, path)
            owner = self._elsewhere.get(name)
            if owner is not None and kind == "nothing":
                self._add(name, "elsewhere", f"a file of node {owner}", kind)
            else:
                self._add(name, "missing", f"a file of {expected.size_bytes:,} bytes", kind)
            return
        size_bytes = self._sizes.get(name, expected.size_bytes)
        if size_bytes not in self._expected_sizes:  # it is none of the others either
            self._add(name, "size", f"{expected.size_bytes:,} bytes", f"{size_bytes:,} bytes")
            return
        try:
            got = self._search.storage.checksum(path)
        except errors.CheckpointError as error:
            self._add(name, "unreadable", "a file that can be read", reason(error, path))
            return
        self._search.advance(got.size_bytes)
        if got == expected:
            return
        if (owner := self._owners.get(got)) is not None:
            self._add(name, "swapped", "its own content", f"that of {owner}")
        elif got.size_bytes != expected.size_bytes:
            sizes = f"{expected.size_bytes:,} bytes", f"{got.size_bytes:,} bytes"
            self._add(name, "size", *sizes)
        else:
            self._add(name, "content", f"digest {expected.xxh3}", f"digest {got.xxh3}")

    def _add(self, name: str, problem: Problem, expected: str, got: str) -> None:
        self.damaged[name] = Finding(
            item=_item_of(name), file=name, problem=problem, expected=expected, got=got
        )


def _item_of(name: str) -> str | None:
    """Returns the item that a file belongs to, by its path in the checkpoint."""
    top, slash, rest = name.partition("/")
    return top if slash and (top, rest) != ("metrics", "metrics") else None


def _is_regular(storage: Storage, path: str) -> bool:
    return queries.kind(storage, path) == "a file"
