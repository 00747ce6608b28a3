"""The steps of one tier: its directory, and a cache of its steps."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.events import Events, Kind
from functional_ckpt.policies import lines
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps import history
from functional_ckpt.steps.directory import StepDirectory
from functional_ckpt.steps.names import NameFormat
from functional_ckpt.steps.step_table import StepTable, united
from functional_ckpt.steps.writer_lock import WriterLock
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage

_log = logging.getLogger("functional_ckpt")


class TierSteps(StepDirectory):
    """The steps of one directory, cached.

    Steps committed through this object are added at once; changes by other processes are read by
    `reload_local`. Safe to use from several threads.

    Args:
        storage: The store.
        root: The directory.
        names: The format of the steps' names.
        events: Notified of changes of the steps.
        read_only: Whether another process may write the directory; then each list is read again.
        latest_link: Name of a link to the latest step; None for no link.
    """

    def __init__(
        self,
        storage: Storage,
        root: str,
        names: NameFormat,
        events: Events,
        *,
        read_only: bool,
        latest_link: str | None,
    ) -> None:
        super().__init__(storage, root, names, read_only=read_only)
        if latest_link is not None and (
            not isinstance(latest_link, str)  # pyright: ignore[reportUnnecessaryIsInstance]
            or names.parse(latest_link) is not None
            or not _is_component(latest_link)
        ):
            raise errors.UsageError(
                "latest_link must be a file name that no step directory can have; got "
                f"{latest_link!r}."
            )
        self.events = events
        self.latest_link = latest_link
        self.lock: WriterLock | None = None
        self._mutex = threading.Lock()
        self._reported_strays: set[str] = set()
        self._table = StepTable(self.late)
        self._looking = threading.Lock()
        self._num_changes = 0
        self._root_id: object = None
        self._was_there = False
        self._problems: set[tuple[int, str]] = set()
        self._being_read: list[int] = []

    @property
    def all_tiers(self) -> tuple[TierSteps, ...]:
        """This tier and the others that were opened, the nearest first."""
        return (self,)

    def check_lock(self) -> None:
        """Raises `LockedError` if a writer has lost its lock, or its directory was replaced."""
        if self.lock is not None:
            self.lock.check()

    def check_there(self) -> None:
        """Raises `StorageError` if the directory is missing: only remote tiers have its steps."""
        if self.commits.root_id() is not None:
            return
        advice = "Move it back, or make a new CheckpointManager."
        if not self._was_there:
            advice = "Make a manager of the tier itself to record metrics there."
        raise errors.StorageError(
            f"{self.root} was moved or removed, so nothing is recorded. {advice}", path=self.root
        )

    def unlock(self) -> None:
        """Releases the lock once no commit or upload needs it; safe to call twice."""
        if self.lock is not None:
            self.lock.release()

    @property
    def infos(self) -> tuple[StepInfo, ...]:
        """The steps as last read, ascending."""
        with self._mutex:
            return self._table.infos

    def info(self, step: int) -> StepInfo | None:
        """Returns a step as last read; None if there is none."""
        with self._mutex:
            return self._table.get(step)

    def reload_local(self, *, reread: bool = False) -> None:
        """Lists this directory again and reads new steps, or with `reread` all of them."""
        while not self._reload(reread=reread):
            pass

    def _reload(self, *, reread: bool) -> bool:
        """Reads the steps; returns False if any was added or removed at the same time."""
        num_changes = self._num_changes
        root_id = self.commits.root_id()
        self.look_at_metrics(reread=reread)
        found = self._look(reread=reread)
        with self._mutex:
            if num_changes != self._num_changes:
                return False
            self._table.replace(found)
            self._root_id = root_id
            self._was_there |= root_id is not None
        self._warn_of_problems()
        return True

    def look_at_metrics(self, step: int | None = None, *, reread: bool = False) -> None:
        """Reads new late metrics, of one step or of all, or with `reread` all again."""
        with self._looking:  # else another thread would decide before the table is refreshed
            changed = self.late.look(step, reread=reread)
            with self._mutex:
                self._table.refresh(changed)

    def _look(self, *, reread: bool = False) -> tuple[StepInfo, ...]:
        """Reads the steps, without late metrics; with `reread` their records too."""
        found = self._index.look(reread=reread)
        strays = {n: what for n, what in self._index.strays.items() if n != self.latest_link}
        new = sorted(strays.keys() - self._reported_strays)
        self._reported_strays |= strays.keys()
        if new:
            listed = ", ".join(f"{name} ({strays[name]})" for name in new[:10])
            more = f" and {len(new) - 10} more" if len(new) > 10 else ""
            _log.warning("%s: ignoring entries that are not steps: %s%s", self.root, listed, more)
        return tuple(entry.info for entry in found.values())

    def _warn_of_problems(self) -> None:
        """Logs each step whose records are damaged, once."""
        found = {(info.step, info.problem) for info in self.infos if info.problem is not None}
        for step, problem in sorted(found - self._problems):
            _log.warning(
                "step %d stays in %s regardless of the keep policies: %s", step, self.root, problem
            )
        self._problems = found

    def own(self) -> tuple[StepInfo, ...]:
        """Returns the steps of this directory; only a read-only manager lists it again."""
        if self.read_only:
            found = self._look()
            with self._mutex:
                self._table.replace(found)
            return found
        if self.commits.root_id() != self._root_id:
            self.reload_local()  # it was removed, or made again
        return self.infos

    def held(self, steps: Sequence[int]) -> list[int]:
        """Returns the given steps that are in this directory, in the given order."""
        here = {info.step for info in self.own()}
        return [step for step in steps if step in here]

    def linked(self) -> list[str]:
        """Returns the names of links to steps."""
        return [name for name in self._index.strays if self.leads_to_step(name)]

    def holds_other_save(self, step: int, nearer: TierSteps) -> bool:
        """Returns whether this tier's copy of a step is known to differ from that of a nearer tier.

        After an overwrite a remote tier has the earlier save until the upload is complete.
        """
        infos = [each.info(step) for each in (nearer, self)]
        times = [info.time for info in infos if info is not None and info.problem is None]
        if len(times) == 2:
            return times[0] != times[1]
        records = [each.records_of(step) for each in (nearer, self)]
        pairs = [(near, far) for near, far in zip(*records, strict=True) if None not in (near, far)]
        return bool(pairs) and all(near != far for near, far in pairs)

    @contextlib.contextmanager
    def reading(self, step: int) -> Generator[None]:
        """Keeps a step from being pruned, after its upload, while it is being read."""
        with self._mutex:
            self._being_read.append(step)
        try:
            yield
        finally:
            with self._mutex:
                self._being_read.remove(step)

    def is_being_read(self, step: int) -> bool:
        """Returns whether this process is reading a step."""
        with self._mutex:
            return step in self._being_read

    def remember(self, info: StepInfo) -> None:
        """Adds a step that was committed."""
        self._index.forget([info.step])
        with self._changing() as table:
            table.add(info)

    def set_infos(self, infos: Iterable[StepInfo]) -> None:
        """Replaces all steps."""
        with self._changing() as table:
            table.replace(infos)

    def forget_missing(self) -> bool:
        """Forgets the steps that other processes removed; returns whether there were any."""
        known = [info.step for info in self.infos]
        there = {*self.paths_if_there(known), *self._index.elsewhere}
        missing = [step for step in known if step not in there]
        self.forget(missing)
        return bool(missing)

    def forget(self, steps: Collection[int]) -> None:
        """Forgets steps that were removed."""
        self._index.forget(steps)
        with self._changing() as table:
            table.discard(steps)

    @contextlib.contextmanager
    def _changing(self) -> Generator[StepTable]:
        """Yields the table for changes, and invalidates a read in progress."""
        with self._mutex:
            yield self._table
            self._num_changes += 1

    def with_late_metrics(self, *, look: bool = True) -> tuple[StepInfo, ...]:
        """Returns the steps with their late metrics, marked if they were abandoned.

        Steps with a problem are read again.

        Args:
            look: Whether to read late metrics that any process has recorded since the last look.
        """
        if look:
            self.look_at_metrics()
        with self._mutex:
            doubtful = self._table.doubtful()
        for info in doubtful:
            found = history.read_step(self.storage, self.path(info.step), info.step)
            with self._changing() as table:
                if found is not None and table.is_known(info):
                    table.add(found)
        return lines.marked(
            self.infos, lines.present(united(each.infos for each in self.all_tiers))
        )

    def recorded(self, info: StepInfo) -> Mapping[str, Any]:
        """Returns the late metrics of a step as last read; damaged ones are read again.

        Raises:
            CorruptCheckpointError, StorageError: Some are damaged, or cannot be read.
        """
        path = self.path(info.step)
        with contextlib.suppress(errors.CheckpointError):
            return self.late.of(info, path)
        self.look_at_metrics(info.step)
        return self.late.of(info, path)

    def record(self, step: int, metrics: Mapping[str, Any], commit: int | None = None) -> None:
        """Records metrics of the current commit of a step; durable when it returns."""
        self.check_lock()
        info = self.on_disk(step)
        if commit not in (None, history.commit_of(info)):
            raise errors.StepNotFoundError(
                f"Step {step} was overwritten after this manager restored it: its metrics are not "
                "recorded of the new one, which has other values. Restore and evaluate it again.",
                step=step,
                path=self.path(step),
            )
        self.late.record(info, metrics)
        path = self.path(step)
        if step not in self._index.elsewhere and not self.commits.is_committed(path):
            raise errors.StepNotFoundError(
                f"{path} was removed or moved while its metrics were recorded; they are not "
                "recorded.",
                step=step,
                path=path,
            )
        with self._mutex:
            self._table.refresh([step])

    def forget_late_metrics(self, step: int) -> None:
        """Removes the late metrics of earlier commits of a step."""
        self.late.remove([step], but_of=self.info(step))

    def update_latest_link(self, *, without: Collection[int] = ()) -> None:
        """Points the link to the latest step, atomically and durably.

        Args:
            without: Steps that will be removed next.
        """
        if self.latest_link is None:
            return
        link = os.path.join(self.root, self.latest_link)
        is_there = queries.exists(self.storage, link)
        if is_there and not queries.is_link(self.storage, link):
            raise errors.StorageError(
                f"Cannot make {link} a link to the latest step: the path exists and is not a link. "
                "Move it away, or give another latest_link.",
                errno=errno.EEXIST,
                path=link,
            )
        gone = set(without)
        newest = lines.newest(info for info in self.infos if info.step not in gone)
        if newest is not None:
            name = os.path.basename(self.path(newest.step))
            self.commits.replace_link(link, name)
        elif is_there:
            self.storage.remove(link)
            self.storage.sync(self.root)

    def emit(self, kind: Kind, step: int, **measured: Any) -> None:
        """Notifies the listeners of an event of a step in this directory; see `Events.notify`."""
        path = self.path(step) if kind in ("committed", "replicated", "uploaded") else None
        self.events.notify(kind, step, self.root, path=path, **measured)

    def prune(self, steps: Sequence[int]) -> dict[int, errors.CheckpointError]:
        """Removes steps that no policy keeps, and notifies the listeners.

        Returns:
            Step -> the reason why it could not be removed; the others are removed.
        """
        started = time.monotonic()
        failures = self.remove(steps)
        for step in steps:
            if step not in failures:
                _log.info("step %d pruned from %s", step, self.root)
                self.emit("pruned", step, seconds=time.monotonic() - started)
        return failures

    def delete(self, step: int) -> None:
        """Removes a step: hides it at once, then removes its files."""
        for error in self.remove([step]).values():
            raise error

    def remove(self, steps: Sequence[int]) -> dict[int, errors.CheckpointError]:
        """Removes steps, in this order; a failure does not stop the others.

        Returns:
            Step -> the reason why it could not be removed. A hidden step is forgotten regardless.
        """
        self.check_lock()
        self.before_removal(steps)
        failures: dict[int, errors.CheckpointError] = {}
        newest = lines.newest(self.infos)
        if newest is not None and newest.step in steps:
            try:
                self.update_latest_link(without=steps)
            except errors.CheckpointError as error:
                failures[newest.step] = error
        paths = self.paths_if_there(steps)
        names = {os.path.basename(path): step for step, path in paths.items()}
        failed = self.commits.remove(tuple(names))
        failures |= {names[name]: error for name, error in failed.items()}
        left = {step for name, step in names.items() if name in failed and self.is_there(name)}
        gone = [step for step in steps if step not in left]
        self.forget(gone)
        if gone:
            try:
                self.late.remove(gone)
            except errors.CheckpointError as error:
                failures.setdefault(gone[0], error)
        return {step: error.replace(step=step) for step, error in failures.items()}


def _is_component(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith((".", "_"))
