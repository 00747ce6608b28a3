"""The directory of steps: their paths and names, read from the store at each call."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence

from functional_ckpt import errors
from functional_ckpt.core.records.orbax import CHECKPOINT_METADATA_FILE
from functional_ckpt.core.records.records import EXTENSION_FILE
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.policies.progress import Progress
from functional_ckpt.steps import history, template
from functional_ckpt.steps.index import Index, StepIndex, has_record
from functional_ckpt.steps.late_metrics import LateMetrics
from functional_ckpt.steps.names import NameFormat
from functional_ckpt.storage import commit, queries, replacement, tmp_paths
from functional_ckpt.storage.base import Storage


class StepDirectory:
    """A directory of steps. Only records of commits and late metrics are cached.

    Attributes:
        before_removal: Called with the steps before they are hidden or removed.
    """

    def __init__(self, storage: Storage, root: str, names: NameFormat, *, read_only: bool) -> None:
        self.storage = storage
        self.root = root
        self.read_only = read_only
        self.commits = commit.protocol(storage, root)
        self.hidden = self.commits.hidden
        self._names = names
        self.late = LateMetrics(storage, root)
        self._index: Index = StepIndex(storage, root, names)
        self.before_removal: Callable[[Iterable[int]], None] = lambda _: None

    def path(self, step: int) -> str:
        """Returns the path of a step, or its future path if the number determines it."""
        if (path := self.path_if_there(step)) is not None:
            return path
        if names := self._names.names(step):
            return os.path.join(self.root, names[0])
        raise errors.StepNotFoundError(
            f"{self.root} has no directory of step {step}.", step=step, path=self.root
        )

    def path_if_there(self, step: int) -> str | None:
        """Returns the path of a step; None if it does not exist."""
        names = self._names.names(step)
        if not names and (entry := self._index.look().get(step)) is not None:
            return os.path.join(self.root, entry.name)
        paths = [os.path.join(self.root, name) for name in names]
        there = next((path for path in paths if queries.exists(self.storage, path)), None)
        # A writer completes interrupted overwrites when it opens the directory. On an object store
        # they leave parts of the step, so that it may be there and the old one counts.
        if self.read_only:
            old = (replacement.old_copy(self.commits, path) for path in paths)
            return next((path for path in old if path is not None), there)
        return there

    def paths_if_there(self, steps: Sequence[int]) -> dict[int, str]:
        """As `path_if_there`, of several steps; the directory is listed once."""
        if len(steps) == 1:
            path = self.path_if_there(steps[0])
            return {} if path is None else {steps[0]: path}
        listed = set(self.storage.list(self.root))
        entries = None
        found: dict[int, str] = {}
        for step in steps:
            names = self._names.names(step)
            if not names:
                entries = self._index.look() if entries is None else entries
                names = (entries[step].name,) if step in entries else ()
            for name in names:
                if name in listed:
                    found.setdefault(step, os.path.join(self.root, name))
        return found

    def is_there(self, name: str) -> bool:
        """Returns whether a directory is a step; one that is being removed is not."""
        hidden = self.commits.removals.hidden_names()
        return queries.exists(self.storage, os.path.join(self.root, name)) and name not in hidden

    def names_of(self, steps: Sequence[int]) -> dict[int, str]:
        """Returns the name of each step's directory."""
        return {step: os.path.basename(self.path(step)) for step in steps}

    def new_path(self, step: int, progress: Progress | None) -> str:
        """Returns where to write a step: its present path if it exists, else a new one.

        Raises:
            UsageError: The name is too long: those of temporary directories contain it.
        """
        path = self.path_if_there(step) or os.path.join(
            self.root, template.new_name(self._names, step, progress)
        )
        num_bytes = len(os.fsencode(os.path.basename(path)))
        if num_bytes > tmp_paths.MAX_STEP_NAME_BYTES:
            raise errors.UsageError(
                f"The directory name of step {step} has {num_bytes} bytes; at most "
                f"{tmp_paths.MAX_STEP_NAME_BYTES} are possible. Choose a shorter step_name, or a "
                "lower step.",
                step=step,
                path=path,
            )
        return path

    def is_linked(self, step: int) -> bool:
        """Returns whether a link has the step's name: it is not listed, but can be restored."""
        return any(map(self.leads_to_step, self._names.names(step)))

    def leads_to_step(self, name: str) -> bool:
        """Returns whether a name is a link to a step."""
        path = os.path.join(self.root, name)
        return queries.is_link(self.storage, path) and has_record(self.storage, path)

    def list_by(self, index: Index) -> None:
        """Takes the steps from another index from now on."""
        self._index = index

    @property
    def index(self) -> Index:
        """The index of the directory."""
        return self._index

    @property
    def name_format(self) -> NameFormat:
        """The format of the steps' names."""
        return self._names

    def hide(self, names: Iterable[str]) -> None:
        """Hides directories, all at once, before they are removed."""
        names = tuple(names)
        self.before_removal(step for name in names if (step := self._names.parse(name)) is not None)
        self.commits.removals.hide(names)

    def unhide(self, names: Iterable[str]) -> None:
        """Reverts `hide`, or forgets the directories once they are removed."""
        self.commits.removals.unhide(names)

    def on_disk(self, step: int) -> StepInfo:
        """Returns the step as it is stored now: another process may have committed it again."""
        if (entry := self._index.elsewhere.get(step)) is not None:
            return entry.info
        return history.read_sound_step(self.storage, self.path(step), step)

    def records_of(self, step: int) -> list[bytes | None]:
        """Returns the records of a step, which differ between two saves; None if unreadable."""
        found: list[bytes | None] = []
        for name in (EXTENSION_FILE, CHECKPOINT_METADATA_FILE):
            try:
                found.append(self.storage.read(os.path.join(self.path(step), name)))
            except errors.CheckpointError:
                found.append(None)
        return found

    def check_writable(self) -> None:
        """Raises `ReadOnlyError` if the manager was opened with `read_only=True`."""
        if self.read_only:
            raise errors.ReadOnlyError(
                "This CheckpointManager was opened with read_only=True.", path=self.root
            )

    def check_path_free(self, step: int, progress: Progress | None, *, overwrite: bool) -> None:
        """Raises `StepExistsError` if the directory has the step and it must not be replaced."""
        path = self.new_path(step, progress)
        if not overwrite and step in self._index.elsewhere:
            raise self._exists_error(step, path)
        is_unused = self._index.is_unused(os.path.basename(path))
        if is_unused or not queries.exists(self.storage, path):
            return
        if not self.commits.is_committed(path) and queries.is_directory(self.storage, path):
            return  # the leftovers of a failed save, which `CommitProtocol.begin` removes
        if not queries.is_directory(self.storage, path):
            raise errors.StorageError(
                f"Cannot save step {step}: {path} is a file, and not a checkpoint. Move it away.",
                errno=errno.ENOTDIR,
                step=step,
                path=path,
            )
        if not has_record(self.storage, path):
            raise errors.StorageError(
                f"Cannot save step {step}: {path} is a directory without a record of a step. Move "
                "it away.",
                errno=errno.ENOTEMPTY,
                step=step,
                path=path,
            )
        if not overwrite:
            raise self._exists_error(step, path)

    def _exists_error(self, step: int, path: str) -> errors.StepExistsError:
        return errors.StepExistsError(
            f"Step {step} exists in {self.root}. Pass overwrite=True to CheckpointManager to "
            "replace it, delete it, or save another step.",
            step=step,
            path=path,
        )
