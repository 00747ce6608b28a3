"""The index of a directory: its steps and their records. Does not import torch.

A step is a directory with a step's name that was committed and holds a record: this package's, or
Orbax's. Other entries with such a name (empty directories, incomplete copies, links) are not steps:
they are never listed, counted or removed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Protocol

from functional_ckpt import errors
from functional_ckpt.core.records import orbax, records
from functional_ckpt.format import parts
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps import history
from functional_ckpt.steps.names import NameFormat
from functional_ckpt.storage import commit, queries, replacement
from functional_ckpt.storage.base import Storage


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A step in a directory."""

    name: str
    commit_id: str
    info: StepInfo


class Index(Protocol):
    """The steps of a directory, as `StepIndex` finds them, or as several nodes hold them."""

    @property
    def strays(self) -> Mapping[str, str]:
        """Name -> kind of each entry that has a step's name but is no step."""
        ...

    @property
    def elsewhere(self) -> Mapping[int, Entry]:
        """Steps that only directories of other nodes hold."""
        ...

    def look(self, *, reread: bool = False) -> dict[int, Entry]:
        """Returns the steps that exist now, ascending; with `reread` all records are read again."""
        ...

    def forget(self, steps: Collection[int]) -> None:
        """Notes that steps were removed, or committed here: they are not elsewhere."""
        ...

    def is_unused(self, name: str) -> bool:
        """Returns whether a directory is a part that cannot be used, and may be moved aside."""
        ...


_NUM_CHECKED = 8
"""How many known steps each look at an object store compares, in turn."""


class StepIndex:
    """The steps of a directory; the records of a commit are read once.

    A step that was read is identified by its name and its `commit_id`: inode and time of the
    directory, or time, size and version of the marker. One of them differs in each commit. On a
    file system each look compares the `commit_id` of every step. Steps with a problem are always
    read again.

    On an object store this would take a request for each step. A writer that replaces or removes
    steps rewrites an object, the `change_id`; only if that has changed are all steps compared.
    Earlier versions, foreign software and a writer that was killed in between do not rewrite it.
    So each look also compares some known steps, in turn, and notices their changes after a few
    looks.

    Args:
        storage: Where the directory is.
        root: The directory.
        names: How its steps are named.
        takes_parts: Whether a part of a step counts, of which other nodes have some files; else it
            is a stray.

    Attributes:
        strays: Name -> kind of each entry that has a step's name but is no step.
        elsewhere: Steps that only directories of other nodes hold; none here.
    """

    def __init__(
        self, storage: Storage, root: str, names: NameFormat, *, takes_parts: bool = False
    ) -> None:
        self._takes_parts = takes_parts
        self._storage = storage
        self._root = root
        self._names = names
        self._commits = commit.protocol(storage, root)
        # The change_id and the steps of the last look; threads must not see those of two looks.
        self._last: tuple[bytes | None, Mapping[str, Entry]] = None, {}
        self._num_looks = 0
        self.strays: Mapping[str, str] = {}
        self.elsewhere: Mapping[int, Entry] = {}

    def look(self, *, reread: bool = False) -> dict[int, Entry]:
        """Returns the steps that exist now, ascending.

        Args:
            reread: Whether to read the records of every step again.
        """
        last_change_id, last = (None, {}) if reread else self._last
        change_id = self._commits.change_id()  # first: a change from now on is seen next time
        listed = self._storage.list(self._root)
        named = [(s, name) for name in listed if (s := self._names.parse(name)) is not None]
        named += self._overwritten(set(listed))
        hidden = self._commits.removals.hidden_names()
        is_known = change_id is not None and change_id == last_change_id
        unchanged = self._unchanged(last) if is_known else {}
        shown = [each for each in named if each[1] not in hidden]
        found = {name: unchanged[name] for _, name in shown if name in unchanged}
        strays: dict[str, str] = {}

        def look_at(step: int, name: str) -> None:
            entry = self._entry(step, name, last.get(name))
            if isinstance(entry, Entry):
                found[name] = entry
            elif entry is not None:
                strays[name] = entry

        tasks = [functools.partial(look_at, *each) for each in shown if each[1] not in found]
        queries.run_requests(self._storage, tasks)
        self._last, self.strays = (change_id, found), strays
        steps: dict[int, Entry] = {}
        for step, name in named:
            if name in found:
                steps.setdefault(step, found[name])
        return dict(sorted(steps.items()))

    def forget(self, steps: Collection[int]) -> None:
        """Does nothing: the next look finds that out."""

    def is_unused(self, name: str) -> bool:
        """Returns False."""
        del name
        return False

    def _unchanged(self, known: Mapping[str, Entry]) -> dict[str, Entry]:
        """Returns the known steps without those to compare in this look."""
        names = sorted(known)
        start = self._num_looks * _NUM_CHECKED
        self._num_looks += 1
        compared = {names[(start + k) % len(names)] for k in range(min(_NUM_CHECKED, len(names)))}
        return {
            name: entry
            for name, entry in known.items()
            if name not in compared and entry.info.problem is None
        }

    def _overwritten(self, listed: Set[str]) -> list[tuple[int, str]]:
        """Returns the steps that are between the two renames of an overwrite, with their paths."""
        found: list[tuple[int, str]] = []
        for name in {commit.final_path(name) for name in listed if commit.TMP_SUFFIX in name}:
            step, path = self._names.parse(name), os.path.join(self._root, name)
            if step is not None and (old := replacement.old_copy(self._commits, path)) is not None:
                found.append((step, os.path.relpath(old, self._root)))
        return found

    def _entry(self, step: int, name: str, known: Entry | None) -> Entry | str | None:
        """Returns the step, or the kind of a stray; None if it was removed or is not committed."""
        path = os.path.join(self._root, name)
        commit_id = self._commits.commit_id(path)
        if commit_id is None:
            what = queries.kind(self._storage, path)
            return None if what in ("nothing", "a directory") else what
        if known is not None and known.commit_id == commit_id and known.info.problem is None:
            return known
        if not self._takes_parts and (part := self._part(path)):
            return part
        if has_record(self._storage, path):
            info = history.read_step(self._storage, path, step)
            return None if info is None else Entry(name, commit_id, info)
        is_there = self._commits.commit_id(path) is not None
        return "a directory without a record of a step" if is_there else None

    def _part(self, path: str) -> str | None:
        """Returns a description of a step of which other nodes have some files; else None."""
        try:
            found = parts.missing(self._storage, path)
        except errors.CorruptCheckpointError as error:
            return f"a part of a step: {error.message.removeprefix(f'{path}/')}"
        return None if found is None else f"{found}"


def no_such_step(root: str, step: int, known: Sequence[int]) -> errors.StepNotFoundError:
    """Returns the error for a step that a directory lacks; it names the latest ones."""
    shown = ", ".join(map(str, known[-10:])) or "none"
    return errors.StepNotFoundError(
        f"{root} has no step {step}; the latest are: {shown}.", step=step, path=root
    )


def has_record(storage: Storage, path: str) -> bool:
    """Returns whether a directory holds a record of a step, this package's or Orbax's."""
    marks = (records.EXTENSION_FILE, orbax.CHECKPOINT_METADATA_FILE, orbax.TREE_METADATA_FILE)
    if any(queries.exists(storage, os.path.join(path, mark)) for mark in marks):
        return True
    # Old versions of Orbax wrote items and nothing above them. An item of this package without the
    # record above it is an incomplete copy.
    folders = [os.path.join(path, name) for name in storage.list(path)]
    items = [
        folder
        for folder in folders
        if queries.exists(storage, os.path.join(folder, orbax.TREE_METADATA_FILE))
    ]
    return bool(items) and not any(
        queries.exists(storage, os.path.join(folder, records.EXTENSION_FILE)) for folder in items
    )
