"""The steps of one run: their directory, names and cached records."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.events import Events, Kind
from functional_ckpt.policies import lines
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.policies.progress import Progress
from functional_ckpt.steps import history, template
from functional_ckpt.steps.index import StepIndex, has_record
from functional_ckpt.steps.names import NameFormat
from functional_ckpt.steps.writer_lock import WriterLock
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.base import Storage

__all__ = ["Steps"]

_log = logging.getLogger("functional_ckpt")


class Steps:
    """A directory of steps.

    Commits through this object are recorded at once; changes by other processes are read by
    `reload`. Safe to use from the commit's thread beside the caller's.

    Args:
        events: The listeners of the steps' events; None for none.
        read_only: Other processes write the directory: lists of steps read it again.
        latest_link: Name of a link to the latest step; None for no link.

    Attributes:
        storage: The store.
        root: The directory.
        commits: How its steps become visible and are removed.
        events: The listeners of the steps' events.
        hidden: Where everything is that is no step.
        remote: The steps of the other tiers that were reached, the nearest first.
        has_tiers: Whether there are others, reached or not.
        reach: Opens tiers that were out of reach; with True it raises where one still is.
    """

    def __init__(
        self,
        storage: Storage,
        root: str,
        names: NameFormat,
        events: Events | None = None,
        *,
        read_only: bool = False,
        latest_link: str | None = None,
    ) -> None:
        self.storage = storage
        self.events = events or Events()
        self.root = root
        self.read_only = read_only
        self.commits = commit.protocol(storage, root)
        self.hidden = self.commits.hidden
        self._names = names
        self._mutex = threading.Lock()
        self._index = StepIndex(storage, root, names)
        self._reported_strays: set[str] = set()
        self._infos: tuple[StepInfo, ...] = ()
        self._num_changes = 0
        self._root_id: object = None
        self._origin: StepInfo | None = None
        self._line: lines.Line | None = None
        self._has_warned = False
        self._followed: dict[int, lines.Line] = {}
        self._problems: set[tuple[int, str]] = set()
        self.remote: tuple[Steps, ...] = ()
        self._being_read: list[int] = []
        self.has_tiers = False
        self.reach: Callable[[bool], None] = lambda _: None
        if latest_link is not None and (
            names.parse(latest_link) is not None or not _is_component(latest_link)
        ):
            raise errors.UsageError(
                "latest_link must be a file name that no step directory can have; got "
                f"{latest_link!r}."
            )
        self.latest_link = latest_link
        self.lock: WriterLock | None = None

    def check_lock(self) -> None:
        """Raises `LockedError` where a writer's directory is no longer the one that it locked."""
        if self.lock is not None:
            self.lock.check()

    def unlock(self) -> None:
        """Lets the next writer in, once no commit needs the lock; safe to call twice."""
        if self.lock is not None:
            self.lock.release()

    @property
    def infos(self) -> tuple[StepInfo, ...]:
        """The steps as last seen, ascending."""
        return self._infos

    def reload(self) -> None:
        """Reads everything from disk again, in every tier."""
        self.reach(False)
        self.reload_local()
        for each in self.remote:
            each.reload()

    def reload_local(self) -> None:
        """Reads everything in this directory again, but not the other tiers, which may be slow."""
        while not self._reread():
            pass

    def _reread(self) -> bool:
        """Reads the steps from disk; whether nothing was remembered or forgotten meanwhile."""
        num_changes = self._num_changes
        root_id = self.commits.root_id()
        late = history.late_metrics(self.storage, self.root)
        found = tuple(history.with_late_metrics(info, late) for info in self._look(reread=True))
        with self._mutex:
            if num_changes != self._num_changes:
                return False
            self._infos, self._root_id = found, root_id
        self._warn_of_problems()
        return True

    def _look(self, *, reread: bool = False) -> tuple[StepInfo, ...]:
        """Reads the list of steps, without their late metrics."""
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
        """Reports each step whose small files are damaged, once."""
        found = {(info.step, info.problem) for info in self._infos if info.problem is not None}
        for step, problem in sorted(found - self._problems):
            _log.warning(
                "step %d stays in %s whatever the keep policies say: %s", step, self.root, problem
            )
        self._problems = found

    def _change(self, infos: Iterable[StepInfo]) -> None:
        """With the mutex held: other steps than those that are being read from disk."""
        self._infos = tuple(infos)
        self._num_changes += 1

    def all(self) -> list[int]:
        """The committed steps of every tier that was reached, ascending; abandoned ones too.

        Raises:
            StorageError: There is none here, and a tier that may hold some is out of reach.
        """
        if not self._own():
            self.reach(True)
        return [info.step for info in self._present()]

    def _present(self) -> tuple[StepInfo, ...]:
        """The steps of every tier that was reached, ascending."""
        return _united(each._own() for each in (self, *self.remote))

    def _own(self) -> tuple[StepInfo, ...]:
        """The steps of this directory: those that are there now, or that its writer remembers."""
        if self.read_only:
            return self._look()
        if self.commits.root_id() != self._root_id:
            self.reload_local()  # it was removed, or made again
        return self._infos

    def tiers_with(self, step: int) -> list[Steps]:
        """The tiers that hold a step, the nearest first; this one where none does."""
        found = [each for each in (self, *self.remote) if each.held([step])]
        return found or [self]

    def tiers_by_name(self) -> dict[str, Steps]:
        """The tiers that were reached, by a name that is the same on every rank.

        This directory's name is empty: hosts may know it by other paths.
        """
        return {"": self, **{each.root: each for each in self.remote}}

    def tiers_named(self, names: Sequence[str]) -> list[Steps]:
        """The tiers of these names; those that were not reached yet are opened."""
        if not set(names) <= self.tiers_by_name().keys():
            self.reach(True)
        known = self.tiers_by_name()
        return [known[name] for name in names]

    @contextlib.contextmanager
    def reading(self, step: int) -> Generator[None]:
        """While a step is being read here, an upload of it that arrives does not let it go."""
        with self._mutex:
            self._being_read.append(step)
        try:
            yield
        finally:
            with self._mutex:
                self._being_read.remove(step)

    def is_being_read(self, step: int) -> bool:
        """Whether this process is reading a step."""
        with self._mutex:
            return step in self._being_read

    def all_infos(self) -> tuple[StepInfo, ...]:
        """The steps of every tier as last seen, ascending, marked if they were abandoned."""
        return lines.marked(_united(each.infos for each in (self, *self.remote)))

    def is_abandoned(self, step: int) -> bool:
        """Whether a step is not on the present line."""
        return any(
            info.step == step and info.is_abandoned for info in lines.marked(self._present())
        )

    def newest(self) -> int | None:
        """The newest step of the present line, from which a run resumes; None for no step."""
        if not self._own():
            self.reach(True)
        found = lines.newest(self._present())
        return None if found is None else found.step

    def latest(self) -> int:
        """The newest step of the present line; raises `StepNotFoundError` where there is none."""
        if (step := self.newest()) is None:
            raise errors.StepNotFoundError(f"{self.root} has no step yet.", path=self.root)
        return step

    def existing(self, step: int) -> int:
        """The step, if it was committed; else raises `StepNotFoundError`."""
        steps = self.all()
        if step not in steps and not self._is_linked(step):
            self.reach(True)
            steps = self.all()
        if step not in steps and not self._is_linked(step):
            shown = ", ".join(map(str, steps[-10:])) or "none"
            raise errors.StepNotFoundError(
                f"{self.root} has no step {step}; the latest are: {shown}.",
                step=step,
                path=self.root,
            )
        return step

    def wait_for_new(self, after: int | None, timeout: float | None, poll: float) -> int | None:
        """Waits until the latest step comes after `after`; that, or None when the time is up."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self.reload()
            infos = self._present()
            for info in infos:
                if info.step == after:
                    self._followed[info.step] = lines.line_of(info)
            latest = lines.newest(infos)
            if latest is not None and (
                after is None or lines.is_after(latest, after, self._followed.get(after))
            ):
                self._followed = {latest.step: lines.line_of(latest)}
                return latest.step
            if deadline is not None and time.monotonic() >= deadline:
                return None
            rest = poll if deadline is None else min(poll, deadline - time.monotonic())
            time.sleep(max(0.0, rest))

    def check_writable(self) -> None:
        """Raises `ReadOnlyError` where others write the directory."""
        if self.read_only:
            raise errors.ReadOnlyError(
                "This CheckpointManager was opened with read_only=True.", path=self.root
            )

    def path(self, step: int) -> str:
        """Where a step is, or would be if its number alone says so."""
        candidates = [os.path.join(self.root, name) for name in self._names.names(step)]
        for path in candidates:
            if queries.exists(self.storage, path):
                return path
        if candidates:
            return candidates[0]
        entry = self._index.look().get(step)
        if entry is None:
            raise errors.StepNotFoundError(
                f"{self.root} has no directory of step {step}.", step=step, path=self.root
            )
        return os.path.join(self.root, entry.name)

    def _is_linked(self, step: int) -> bool:
        """Whether a link of this name leads to a step: it does not count, but can be read."""
        return any(map(self._leads_to_step, self._names.names(step)))

    def _leads_to_step(self, name: str) -> bool:
        path = os.path.join(self.root, name)
        return queries.is_link(self.storage, path) and has_record(self.storage, path)

    def linked(self) -> list[str]:
        """The names of links that lead to steps."""
        return [name for name in self._index.strays if self._leads_to_step(name)]

    def new_path(self, step: int, progress: Progress | None) -> str:
        """Where a step is written: where it is, if it is replaced, else under a new name."""
        with contextlib.suppress(errors.StepNotFoundError):
            path = self.path(step)
            if queries.exists(self.storage, path):
                return path
        return os.path.join(self.root, template.new_name(self._names, step, progress))

    def check_start(self, step: int, *, overwrite: bool) -> None:
        """Raises `StepExistsError` where steps from `step` on would have to be overwritten."""
        later = [each for each in self.all() if each >= step]
        if later and not overwrite:
            raise errors.StepExistsError(
                f"{self.root} has {len(later)} steps from {step} on (up to {later[-1]}), which a "
                f"run starting at step {step} would overwrite. Resume from step {self.latest()}, "
                "use another directory, delete them, or pass overwrite=True to CheckpointManager.",
                step=later[0],
                path=self.root,
            )

    def update_latest_link(self, *, without: Collection[int] = ()) -> None:
        """Points the link to the latest step, atomically and durably.

        Args:
            without: Steps that are about to be removed.
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
        newest = lines.newest(info for info in self._infos if info.step not in without)
        if newest is not None:
            name = os.path.basename(self.path(newest.step))
            self.commits.replace_link(link, name)
        elif is_there:
            self.storage.remove(link)
            self.storage.sync(self.root)

    def check_free(self, step: int, progress: Progress | None, *, overwrite: bool) -> None:
        """Raises `StepExistsError` when a tier has the step, and it may not be overwritten."""
        for each in () if overwrite else self.remote:
            if any(info.step == step for info in each.infos):
                raise errors.StepExistsError(
                    f"Step {step} exists in the tier {each.root}. Pass overwrite=True to "
                    "CheckpointManager to replace it, delete it, save another step, or give this "
                    "run its own tier.",
                    step=step,
                    path=each.root,
                )
        path = self.new_path(step, progress)
        if not queries.exists(self.storage, path):
            return
        if not self.commits.is_committed(path) and queries.is_directory(self.storage, path):
            return  # leftovers of a failed save, which the next commit removes
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
            raise errors.StepExistsError(
                f"Step {step} exists in {self.root}. Pass overwrite=True to CheckpointManager to "
                "replace it, delete it, or save another step.",
                step=step,
                path=path,
            )

    def remember(self, info: StepInfo) -> None:
        """A step was committed."""
        with self._mutex:
            others = [each for each in self._infos if each.step != info.step]
            self._change(sorted([*others, info], key=lambda each: each.step))

    def forget_missing(self) -> bool:
        """Forgets the steps that others have removed; returns whether there were any."""
        listed = set(self.storage.list(self.root))
        missing: list[int] = []
        for info in self._infos:
            known = self._names.names(info.step)
            if known and listed.isdisjoint(known) and self._path_if_there(info.step) is None:
                missing.append(info.step)
        self.forget(missing)
        return bool(missing)

    def forget(self, steps: Collection[int]) -> None:
        """Steps were removed."""
        with self._mutex:
            self._change(each for each in self._infos if each.step not in steps)

    def follow(self, lists: Mapping[str, Collection[int]]) -> None:
        """Records the primary's list of each tier's steps, by the tier's name."""
        known = {info.step: info for info in self.all_infos()}
        for name, each in self.tiers_by_name().items():
            if name in lists:
                with each._mutex:
                    each._change(known[step] for step in lists[name] if step in known)

    def with_late_metrics(self) -> tuple[StepInfo, ...]:
        """The steps with their late metrics, marked if they were abandoned."""
        late = history.late_metrics(self.storage, self.root)
        infos = [history.with_late_metrics(self._looked_at(info), late) for info in self._infos]
        return lines.marked(infos, self._line_of_tiers())

    def _looked_at(self, info: StepInfo) -> StepInfo:
        """The step; one that had a problem is read again, which may have passed."""
        if info.problem is None:
            return info
        return history.read_step(self.storage, self.path(info.step), info.step) or info

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records metrics of a committed step; durable when it returns."""
        self.check_lock()
        history.write_late_metrics(self.storage, self.root, self._on_disk(step), metrics)
        path = self.path(step)
        if not self.commits.is_committed(path):
            raise errors.StepNotFoundError(
                f"{path} was removed or moved while its metrics were recorded; they are not "
                "recorded.",
                step=step,
                path=path,
            )
        with self._mutex:
            self._change(
                _with_metrics(each, metrics) if each.step == step else each for each in self._infos
            )

    def recorded(self, step: int) -> Mapping[str, Any]:
        """The late metrics of a step, recorded by any process.

        Raises:
            CorruptCheckpointError: Some of it is damaged.
        """
        late = history.late_metrics(self.storage, self.root)
        return history.recorded(self._on_disk(step), late, self.path(step))

    def _on_disk(self, step: int) -> StepInfo:
        """The step as it is on disk now: another process may have committed it again."""
        return history.read_sound_step(self.storage, self.path(step), step)

    def forget_late_metrics(self, step: int) -> None:
        """Removes late metrics of a step that was overwritten."""
        info = next((each for each in self._infos if each.step == step), None)
        history.remove_late_metrics(self.storage, self.root, step, but_of=info)

    def emit(
        self,
        kind: Kind,
        step: int,
        *,
        seconds: float | None = None,
        num_bytes: int | None = None,
    ) -> None:
        """Notifies the listeners of an event of a step."""
        self.events.tell(kind, step, self.root, seconds=seconds, num_bytes=num_bytes)

    # ---------------------------------------------------------------------------- lines

    def resume_from(self, step: int) -> None:
        """Notes that the run continues from a step; nothing on disk changes before it saves."""
        found = [info for info in self._present() if info.step == step]
        self._origin = found[0] if found else None
        self._line = None

    def warn_of_newer(self, step: int) -> None:
        """Warns, once, of a step below the latest where the run has restored none."""
        newest = self.newest() if self._origin is None and not self._has_warned else None
        if newest is not None and newest > step:
            self._has_warned = True
            _log.warning(
                "%s: step %d is below the latest, %d, which stays the one that a run resumes from. "
                "To go back, restore an earlier step first; to start again, use another directory.",
                self.root,
                step,
                newest,
            )

    def next_line(self) -> lines.Line:
        """The line of the step that is saved next."""
        if self._origin is None:
            return self._line_of_tiers()
        if self._line is None:
            self._line = lines.resumed(self._origin, self._present())
        return self._line

    def _line_of_tiers(self) -> lines.Line:
        return lines.present(_united(each.infos for each in (self, *self.remote)))

    # ---------------------------------------------------------------------------- removal

    def prune(self, steps: Sequence[int]) -> dict[int, errors.CheckpointError]:
        """Removes steps that the run can do without, and reports it.

        Returns:
            Step -> why it could not be removed; the others are gone.
        """
        started = time.monotonic()
        failures = self.remove(steps)
        for step in steps:
            if step not in failures:
                _log.info("step %d pruned from %s", step, self.root)
                self.emit("pruned", step, seconds=time.monotonic() - started)
        return failures

    def delete(self, step: int) -> None:
        """Removes a step: out of sight in one rename, then from disk."""
        for error in self.remove([step]).values():
            raise error

    def remove(self, steps: Sequence[int]) -> dict[int, errors.CheckpointError]:
        """Removes steps, in this order; a failure does not stop the others.

        Returns:
            Step -> why it could not be removed. It is forgotten all the same where it is out of
            sight.
        """
        self.check_lock()
        failures: dict[int, errors.CheckpointError] = {}
        newest = lines.newest(self._infos)
        if newest is not None and newest.step in steps:
            try:
                self.update_latest_link(without=steps)
            except errors.CheckpointError as error:
                failures[newest.step] = error
        paths = {step: self._path_if_there(step) for step in steps}
        names = {os.path.basename(path): step for step, path in paths.items() if path is not None}
        failed = self.commits.remove(tuple(names))
        failures |= {names[name]: error for name, error in failed.items()}
        gone = [step for step, path in paths.items() if path is None or not self._is_there(path)]
        self.forget(gone)
        for step in gone:
            try:
                history.remove_late_metrics(self.storage, self.root, step)
            except errors.CheckpointError as error:
                failures.setdefault(step, error)
        return {step: error.replace(step=step) for step, error in failures.items()}

    def held(self, steps: Sequence[int]) -> list[int]:
        """Those of some steps that are here, in their order."""
        here = {info.step for info in self._own()}
        return [step for step in steps if step in here]

    def hide(self, names: Iterable[str]) -> None:
        """Takes directories out of sight, all in one step; they are still to be removed."""
        self.commits.removals.hide(names)

    def unhide(self, names: Iterable[str]) -> None:
        """Undoes `hide`, or forgets that it was done, once the directories are gone."""
        self.commits.removals.unhide(names)

    def names_of(self, steps: Sequence[int]) -> dict[int, str]:
        """Step -> name of its directory."""
        return {step: os.path.basename(self.path(step)) for step in steps}

    def _path_if_there(self, step: int) -> str | None:
        with contextlib.suppress(errors.StepNotFoundError):
            path = self.path(step)
            return path if queries.exists(self.storage, path) else None
        return None

    def _is_there(self, path: str) -> bool:
        """Whether a directory counts; one that is being removed does not."""
        hidden = self.commits.removals.hidden_names()
        return queries.exists(self.storage, path) and os.path.basename(path) not in hidden


def _united(tiers: Iterable[Sequence[StepInfo]]) -> tuple[StepInfo, ...]:
    """The steps of several tiers, ascending; of two with one number, that of the nearer tier."""
    infos: dict[int, StepInfo] = {}
    for tier in tiers:
        for info in tier:
            infos.setdefault(info.step, info)
    return tuple(infos[step] for step in sorted(infos))


def _with_metrics(info: StepInfo, late: Mapping[str, Any]) -> StepInfo:
    return dataclasses.replace(info, metrics={**(info.metrics or {}), **late})


def _is_component(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith((".", "_"))
