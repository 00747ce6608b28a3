"""The data files of the last step, which the next one shares where nothing has changed.

Each rank knows its own: it needs no other rank and no lock, since a link to a file that is removed
at the same time either keeps its bytes or fails, and then the file is written. They are the files
of the last step that this manager committed or restored; none once one of them was found damaged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from functional_ckpt import errors
from functional_ckpt.format.shared_files import KeptFile, damage_path
from functional_ckpt.format.stored_files import stored_files
from functional_ckpt.storage.base import Stat, Storage

if TYPE_CHECKING:
    from functional_ckpt.core.files.file_plan import FilePlan
    from functional_ckpt.format.write_files import ArrayWrite

_log = logging.getLogger("functional_ckpt")


class LastFiles:
    """The files of one rank, of one run.

    Args:
        storage: The store of the steps.
        root: Their directory.
        is_enabled: Whether steps share files.
    """

    def __init__(self, storage: Storage, root: str, *, is_enabled: bool) -> None:
        self._is_enabled = is_enabled
        self._storage = storage
        self._root = root
        self._restored: str | None = None
        self._restored_items: frozenset[str] = frozenset()
        self._committed: Mapping[str, Mapping[str, KeptFile]] = {}
        self._written: dict[str, Mapping[str, KeptFile]] = {}
        self._damage: Stat | None = None
        self._is_doubted = False

    def start(self) -> None:
        """A step is written from now on."""
        self._written, self._is_doubted = {}, False
        if self._restored is not None or any(self._committed.values()):
            damage = self._noted_damage()
            if damage != self._damage:
                self._committed, self._restored, self._damage = {}, None, damage

    def of(
        self, item: str, plans: Sequence[FilePlan], writes: Sequence[ArrayWrite]
    ) -> Mapping[str, KeptFile]:
        """Returns the files of an item that the step may share, by their planned names."""
        if self._restored is None:
            return self._committed.get(item, {})
        if item not in self._restored_items:
            return {}
        path = os.path.join(self._restored, item)
        try:
            return stored_files(self._storage, path, plans, writes)
        except errors.CheckpointError as error:
            _log.warning("%s: all files are written again: %s", path, error)
            return {}

    def wrote(self, item: str, files: Mapping[str, KeptFile]) -> None:
        """Notes the files of an item of the step."""
        self._written[item] = files

    def committed(self, path: str) -> None:
        """Notes that the step was committed."""
        self._committed, self._restored = {}, None
        if not self._is_enabled or self._is_doubted:
            return
        try:
            self._committed = {
                item: {
                    name: file.committed(self._storage, os.path.join(path, item))
                    for name, file in files.items()
                }
                for item, files in self._written.items()
            }
        except errors.StorageError as error:
            _log.warning("%s: the next step writes all files again: %s", path, error)

    def restored(self, path: str, items: Iterable[str]) -> None:
        """Notes that items of a step of this directory were restored: their bytes were compared."""
        if self._is_enabled:
            self._restored_items = frozenset(items)
            self._damage = self._noted_damage()
            self._committed, self._restored = {}, path

    def forget(self) -> None:
        """Has all files written, also after a step that is written now: some are damaged."""
        self._committed, self._restored, self._is_doubted = {}, None, True

    def _noted_damage(self) -> Stat | None:
        return self._storage.stat(damage_path(self._root))
