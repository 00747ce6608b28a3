"""The steps of one run: their directory, their names and what is remembered of them."""

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
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.policies.progress import Progress
from functional_ckpt.steps import history, template
from functional_ckpt.steps.names import NameFormat
from functional_ckpt.storage import commit
from functional_ckpt.storage.base import Storage

__all__ = ["Steps"]

_log = logging.getLogger("functional_ckpt")


class Steps:
    """A directory of steps.

    What was committed through this object is remembered at once; what other processes do is seen by
    `reload`. Safe to use from the commit's thread beside the caller's.

    Args:
        events: Told what happens to the steps; None for nobody.
        read_only: Others write the directory: the lists of steps look at it anew.
        latest_link: Name of a link to the latest step; None for no link.

    Attributes:
        storage: The file system.
        root: The directory.
        events: Where what happens to the steps is told.
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
        self.hidden = os.path.join(root, commit.HIDDEN)
        self._names = names
        self._mutex = threading.Lock()
        self._infos: tuple[StepInfo, ...] = ()
        self._num_changes = 0
        self._problems: set[tuple[int, str]] = set()
        self.remote: tuple[Steps, ...] = ()
        self._being_read: list[int] = []
        self.has_tiers = False
        self.reach: Callable[[bool], None] = lambda _: None
        if latest_link is not None and (
            names.parse(latest_link) is not None or not _is_component(latest_link)
        ):
            raise errors.UsageError(
                f"latest_link must be a name that no step has, without '/'; got {latest_link!r}."
            )
        self.latest_link = latest_link

    @property
    def infos(self) -> tuple[StepInfo, ...]:
        """The steps as last seen, ascending."""
        return self._infos

    def reload(self) -> None:
        """Reads everything from disk anew, in every tier."""
        self.reach(False)
        self.reload_local()
        for each in self.remote:
            each.reload()

    def reload_local(self) -> None:
        """Reads everything in this directory anew; no other tier is asked, which may be far."""
        while not self._reread():
            pass

    def _reread(self) -> bool:
        """Reads the steps from disk; whether nothing was remembered or forgotten meanwhile."""
        num_changes = self._num_changes
        found = tuple(history.scan(self.storage, self.root, self._names))
        with self._mutex:
            if num_changes != self._num_changes:
                return False
            self._infos = found
        self._warn_of_problems()
        return True

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
        """The committed steps of every tier that was reached, ascending.

        Raises:
            StorageError: There is none here, and a tier that may hold some is out of reach.
        """
        if not self._own():
            self.reach(True)
        return self._reached()

    def _reached(self) -> list[int]:
        return sorted({*self._own(), *(s for each in self.remote for s in each._own())})

    def _own(self) -> list[int]:
        if self.read_only:
            return list(history.list_steps(self.storage, self.root, self._names))
        return [info.step for info in self._infos]

    def tiers_with(self, step: int) -> list[Steps]:
        """The tiers that hold a step, the nearest first; this one where none does."""
        found = [each for each in (self, *self.remote) if step in each._own()]
        return found or [self]

    def tiers_at(self, roots: Sequence[str]) -> list[Steps]:
        """The tiers at these roots; those that were not reached yet are opened."""
        if not set(roots) <= {each.root for each in (self, *self.remote)}:
            self.reach(True)
        known = {each.root: each for each in (self, *self.remote)}
        return [known[root] for root in roots]

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
        """The steps of every tier as last seen, ascending."""
        infos = {info.step: info for each in (*reversed(self.remote), self) for info in each.infos}
        return tuple(infos[step] for step in sorted(infos))

    def latest(self) -> int:
        """The highest committed step; raises `StepNotFoundError` where there is none."""
        steps = self.all()
        if not steps:
            raise errors.StepNotFoundError(f"{self.root} has no step yet.", path=self.root)
        return steps[-1]

    def existing(self, step: int) -> int:
        """The step, if it was committed; else raises `StepNotFoundError`."""
        steps = self.all()
        if step not in steps:
            self.reach(True)
            steps = self.all()
        if step not in steps:
            shown = ", ".join(map(str, steps[-10:])) or "none"
            raise errors.StepNotFoundError(
                f"{self.root} has no step {step}; the latest are: {shown}.",
                step=step,
                path=self.root,
            )
        return step

    def wait_for_new(self, after: int | None, timeout: float | None, poll: float) -> int | None:
        """Waits until there is a step above `after`; the latest, or None when the time is up."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self.reload()
            latest = max(self._reached(), default=None)
            if latest is not None and (after is None or latest > after):
                return latest
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
            if self.storage.exists(path):
                return path
        if candidates:
            return candidates[0]
        name = history.list_steps(self.storage, self.root, self._names).get(step)
        if name is None:
            raise errors.StepNotFoundError(
                f"{self.root} has no directory of step {step}.", step=step, path=self.root
            )
        return os.path.join(self.root, name)

    def new_path(self, step: int, progress: Progress | None) -> str:
        """Where a step is written: where it is, if it is replaced, else under a new name."""
        with contextlib.suppress(errors.StepNotFoundError):
            path = self.path(step)
            if self.storage.exists(path):
                return path
        return os.path.join(self.root, template.new_name(self._names, step, progress))

    def check_start(self, step: int, *, overwrite: bool) -> None:
        """Raises `StepExistsError` where steps from `step` on would have to be overwritten."""
        later = [each for each in self.all() if each >= step]
        if later and not overwrite:
            raise errors.StepExistsError(
                f"{self.root} has {len(later)} steps from {step} on (up to {later[-1]}), which a "
                f"run that begins at {step} would come to overwrite. Go on from step {later[-1]}, "
                "give this run its own directory, delete them, or make the manager with "
                "overwrite=True.",
                step=later[0],
                path=self.root,
            )

    def update_latest_link(self, *, without: int | None = None) -> None:
        """Points the link to the latest step, atomically and durably.

        Args:
            without: A step that is about to be removed.
        """
        if self.latest_link is None:
            return
        link = os.path.join(self.root, self.latest_link)
        is_there = self.storage.exists(link)
        if is_there and not self.storage.is_link(link):
            raise errors.StorageError(
                f"Cannot make {link} a link to the latest step: something else is there. Move it "
                "away, or give another latest_link.",
                errno=errno.EEXIST,
                path=link,
            )
        steps = [info.step for info in self._infos if info.step != without]
        if steps:
            name = os.path.basename(self.path(steps[-1]))
            temporary = os.path.join(self.hidden, f"{self.latest_link}.tmp")
            self.storage.replace_link(link, name, temporary)
        elif is_there:
            self.storage.remove(link)
            self.storage.sync_directory(self.root)

    def check_free(self, step: int, progress: Progress | None, *, overwrite: bool) -> None:
        """Raises `StepExistsError` when a tier has the step, and it may not be overwritten."""
        for each in () if overwrite else self.remote:
            if any(info.step == step for info in each.infos):
                raise errors.StepExistsError(
                    f"Step {step} exists in the tier {each.root}. Make the manager with "
                    "overwrite=True to replace it, delete it, save another step, or give this run "
                    "its own tier.",
                    step=step,
                    path=each.root,
                )
        path = self.new_path(step, progress)
        if not self.storage.exists(path):
            return
        if not self.storage.is_committed(path) and self.storage.is_directory(path):
            return  # what a failed save left; `commit.create_tmp` sees to it
        if not self.storage.is_directory(path):
            raise errors.StorageError(
                f"Cannot save step {step}: {path} is a file, and not a checkpoint. Move it away.",
                errno=errno.ENOTDIR,
                step=step,
                path=path,
            )
        if not overwrite:
            raise errors.StepExistsError(
                f"Step {step} exists in {self.root}. Make the manager with overwrite=True to "
                "replace it, delete it, or save another step.",
                step=step,
                path=path,
            )

    def remember(self, info: StepInfo) -> None:
        """A step was committed."""
        with self._mutex:
            others = [each for each in self._infos if each.step != info.step]
            self._change(sorted([*others, info], key=lambda each: each.step))

    def forget(self, steps: Collection[int]) -> None:
        """Steps were removed."""
        with self._mutex:
            self._change(each for each in self._infos if each.step not in steps)

    def follow(self, lists: Mapping[str, Collection[int]]) -> None:
        """Remembers of every tier what the primary says that it holds, by its root."""
        known = {info.step: info for info in self.all_infos()}
        for each in (self, *self.remote):
            if each.root in lists:
                with each._mutex:
                    each._change(known[step] for step in lists[each.root] if step in known)

    def with_late_metrics(self) -> tuple[StepInfo, ...]:
        """The steps with what was recorded of them since, by whatever process."""
        late = history.late_metrics(self.storage, self.root)
        return tuple(history.with_late_metrics(info, late) for info in self._infos)

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records metrics of a committed step; durable when it returns."""
        history.write_late_metrics(self.storage, self.root, self._on_disk(step), metrics)
        with self._mutex:
            self._change(
                _with_metrics(each, metrics) if each.step == step else each for each in self._infos
            )

    def recorded(self, step: int) -> Mapping[str, Any]:
        """What was recorded of a step since it was committed, by whatever process.

        Raises:
            CorruptCheckpointError: Some of it is damaged.
        """
        late = history.late_metrics(self.storage, self.root)
        return history.recorded(self._on_disk(step), late, self.path(step))

    def _on_disk(self, step: int) -> StepInfo:
        """The step as it is on disk now: another process may have committed it again."""
        return history.read_sound_step(self.storage, self.path(step), step)

    def forget_late_metrics(self, step: int) -> None:
        """The step was written anew: what was measured of the old one is of no more use."""
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
        """Tells the listeners what happened to a step here."""
        self.events.tell(kind, step, self.root, seconds=seconds, num_bytes=num_bytes)

    def prune(self, step: int) -> None:
        """Removes a step that the run can do without, and says so."""
        started = time.monotonic()
        self.delete(step)
        _log.info("step %d pruned from %s", step, self.root)
        self.emit("pruned", step, seconds=time.monotonic() - started)

    def delete(self, step: int) -> None:
        """Removes a step: out of sight in one rename, then from disk."""
        path = self.path(step)
        try:
            if self._infos and self._infos[-1].step == step:
                self.update_latest_link(without=step)
            if self.storage.exists(path):
                commit.discard(self.storage, path, self.hidden)
            history.remove_late_metrics(self.storage, self.root, step)
        except errors.CheckpointError as error:
            error.step = step
            raise
        finally:
            if not self.storage.exists(path):  # out of sight, however far its removal came
                self.forget([step])


def _with_metrics(info: StepInfo, late: Mapping[str, Any]) -> StepInfo:
    return dataclasses.replace(info, metrics={**(info.metrics or {}), **late})


def _is_component(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith((".", "_"))
