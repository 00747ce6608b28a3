"""The steps of one run in all its tiers, and the line that it saves on."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import SingleProcess
from functional_ckpt.events import Events
from functional_ckpt.format import parts
from functional_ckpt.policies import lines
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.policies.checks import check_seconds
from functional_ckpt.policies.progress import Progress
from functional_ckpt.steps.first_tier import FirstTier, SharedTier
from functional_ckpt.steps.index import no_such_step
from functional_ckpt.steps.names import NameFormat
from functional_ckpt.steps.step_table import united
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.storage.base import Storage

_log = logging.getLogger("functional_ckpt")


class Steps(TierSteps):
    """The steps of a run: its own directory, which is the first tier, and the remote tiers.

    The arguments are those of `TierSteps`, and how the ranks hold the first tier.

    Attributes:
        first: How the ranks hold the first tier.
        remote: The remote tiers that were opened, the nearest first.
        has_tiers: Whether there are remote tiers, open or not.
        has_stores: Whether one of them is an object store.
        reach: Opens tiers that could not be reached; with True it raises if one still cannot.
        restored_commits: Step -> the commit of it that was restored last (see `history.commit_of`).
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
        first: FirstTier | None = None,
    ) -> None:
        super().__init__(storage, root, names, events, read_only=read_only, latest_link=latest_link)
        self.first: FirstTier = first or SharedTier(SingleProcess())
        self.remote: tuple[TierSteps, ...] = ()
        self.has_tiers = self.has_stores = False
        self.reach: Callable[[bool], None] = lambda _: None
        self._origin: StepInfo | None = None
        self._line: lines.Line | None = None
        self._has_warned = False
        self.restored_commits: dict[int, int] = {}
        self._followed: dict[int, lines.Line] = {}

    @property
    def all_tiers(self) -> tuple[TierSteps, ...]:
        """This tier and the others that were opened, the nearest first."""
        return (self, *self.remote)

    def forget(self, steps: Collection[int]) -> None:
        """Forgets steps that were removed."""
        super().forget(steps)
        self.first.forget(steps)

    def reload(self, *, reread: bool = False) -> None:
        """Lists every tier again and reads new steps, or with `reread` all of them."""
        self.reach(False)
        for each in self.all_tiers:
            each.reload_local(reread=reread)

    def all(self) -> list[int]:
        """Returns the steps of every open tier, ascending, including abandoned ones.

        Raises:
            StorageError: This directory has none, and a tier cannot be reached.
        """
        return [info.step for info in self._present(must_reach=True)]

    def _present(self, *, must_reach: bool = False) -> tuple[StepInfo, ...]:
        """Returns the steps of every open tier, ascending."""
        infos = self.own()
        if must_reach and not infos:
            self.reach(True)
        return united((infos, *(each.own() for each in self.remote)))

    def tiers_with(self, step: int) -> list[TierSteps]:
        """Returns the tiers that hold a step, the nearest first; this one if none does."""
        found = [each for each in self.all_tiers if each.held([step])]
        return found or [self]

    def tiers_by_name(self) -> dict[str, TierSteps]:
        """Returns the open tiers by a name that is the same on every rank.

        This directory's name is empty: its path may differ between hosts.
        """
        return {"": self, **{each.root: each for each in self.remote}}

    def tiers_named(self, names: Sequence[str]) -> list[TierSteps]:
        """Returns the tiers of these names; opens them if needed."""
        if not set(names) <= self.tiers_by_name().keys():
            self.reach(True)
        known = self.tiers_by_name()
        return [known[name] for name in names]

    def all_infos(self) -> tuple[StepInfo, ...]:
        """Returns the steps of every tier as last read, ascending, marked if abandoned."""
        return lines.marked(united(each.infos for each in self.all_tiers))

    def is_abandoned(self, step: int) -> bool:
        """Returns whether a step is not on the current line."""
        return any(
            info.step == step and info.is_abandoned for info in lines.marked(self._present())
        )

    def newest(self) -> int | None:
        """Returns the newest step of the current line, from which a run resumes, or None."""
        found = lines.newest(self._present(must_reach=True))
        return None if found is None else found.step

    def latest(self) -> int:
        """Returns the newest step of the current line; raises `StepNotFoundError` without one."""
        if (step := self.newest()) is None:
            raise self._no_step_yet()
        return step

    def existing(self, step: int) -> int:
        """Returns the step if it exists; else raises `StepNotFoundError`."""
        steps = self.all()
        if step not in steps and not self.is_linked(step):
            self.reach(True)
            steps = self.all()
        if step not in steps and not self.is_linked(step):
            path = self.path_if_there(step)
            if path is not None and (found := parts.missing(self.storage, path)) is not None:
                raise parts.incomplete(path, found, step)
            raise no_such_step(self.root, step, steps)
        return step

    def _no_step_yet(self) -> errors.StepNotFoundError:
        for name in reversed(tuple(self._index.strays)):
            path = os.path.join(self.root, name)
            if (found := parts.missing(self.storage, path)) is not None:
                return parts.incomplete(path, found, None)
        return errors.StepNotFoundError(f"{self.root} has no step yet.", path=self.root)

    def wait_for_new(self, after: int | None, timeout: float | None, poll: float) -> int | None:
        """Waits for a step after `after`; returns it, or None after the timeout."""
        check_seconds("timeout", timeout)
        check_seconds("poll", poll)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self.read_only:
                self.reach(False)  # the tiers list their steps at each call
            else:
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

    def check_start(self, step: int, *, overwrite: bool) -> None:
        """Raises `StepExistsError` if a run from `step` on would overwrite steps."""
        later = [each for each in self.all() if each >= step]
        if later and not overwrite:
            raise errors.StepExistsError(
                f"{self.root} has {len(later)} steps from {step} on (up to {later[-1]}), which a "
                f"run starting at step {step} would overwrite. Resume from step {self.latest()}, "
                "use another directory, delete them, or pass overwrite=True to CheckpointManager.",
                step=later[0],
                path=self.root,
            )

    def check_free(self, step: int, progress: Progress | None, *, overwrite: bool) -> None:
        """Raises `StepExistsError` if any tier has the step and it must not be replaced."""
        for each in () if overwrite else self.remote:
            if each.info(step) is not None:
                raise errors.StepExistsError(
                    f"Step {step} exists in the tier {each.root}. Pass overwrite=True to "
                    "CheckpointManager to replace it, delete it, save another step, or give this "
                    "run its own tier.",
                    step=step,
                    path=each.root,
                )
        self.check_path_free(step, progress, overwrite=overwrite)

    def follow(self, lists: Mapping[str, Collection[int]]) -> None:
        """Takes over the primary's lists of steps, by the name of their tier."""
        known = {info.step: info for info in self.all_infos()}
        for name, each in self.tiers_by_name().items():
            if name in lists:
                each.set_infos(known[step] for step in lists[name] if step in known)

    def resume_from(self, step: int) -> None:
        """Sets the step that the run resumes from; nothing is written before the next save."""
        found = [info for info in self._present() if info.step == step]
        self._origin = found[0] if found else None
        self._line = None

    def warn_of_newer(self, step: int) -> None:
        """Warns, once, of a step below the latest in a run that has restored none.

        No save waits for a tier that cannot be reached.
        """
        if self._origin is not None or self._has_warned:
            return
        newest = lines.newest(self._present())
        if newest is not None and newest.step > step:
            self._has_warned = True
            _log.warning(
                "%s: step %d is below the latest, %d, which stays the one that a run resumes from. "
                "To go back, restore an earlier step first; to start again, use another directory.",
                self.root,
                step,
                newest.step,
            )

    def next_line(self) -> lines.Line:
        """Returns the line of the next step to be saved."""
        if self._origin is None:
            present = lines.present(united(each.infos for each in self.all_tiers))
            return self.first.line(None, present)
        if self._line is None:
            self._line = lines.resumed(self._origin, self._present())
        return self.first.line(self._origin, self._line)
