"""After a commit, on the primary: updates the latest link, promises uploads, and prunes.

The step is durable by now. A failure here costs disk space or a link, never a step. So the
remaining actions run, and all failures are reported together at the end.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Generator, Sequence

from functional_ckpt import errors
from functional_ckpt.policies import keep_rules, lines
from functional_ckpt.policies.base import KeepContext, KeepPolicy, StepInfo
from functional_ckpt.steps.run_log import RunLog
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.step_table import united
from functional_ckpt.steps.uploads import Uploads

_log = logging.getLogger("functional_ckpt")


class Retention:
    """Removes steps of the first tier, on the primary.

    Attributes:
        log: The log of the run.
        uploads: The upload queue, if there are remote tiers.
    """

    def __init__(self, steps: Steps, keep_policies: Sequence[KeepPolicy]) -> None:
        self._steps = steps
        self._policies = tuple(keep_policies)
        self._warnings: set[str] = set()
        self.log = RunLog(steps.storage, steps.hidden, self._policies)
        self.uploads: Uploads | None = None

    def clean_up(self, info: StepInfo, replaced: str | None) -> list[str]:
        """Updates the link, promises a step to the tiers, and prunes.

        Args:
            info: The step that was committed.
            replaced: The path of the step that it replaced, if any.

        Returns:
            The failures, one line each.
        """
        steps, failures = self._steps, list[str]()
        with noting(failures):
            if self.uploads is not None:
                self.uploads.committed(info)
        is_promised = not failures  # else a pruned step could be in no tier
        with noting(failures):
            steps.update_latest_link()
        with noting(failures):
            if replaced is not None:
                steps.forget_late_metrics(info.step)
                steps.storage.remove(replaced)
        with noting(failures):
            if is_promised:
                failures += self.prune(committed=info.step)
        return failures

    def prune(self, *, committed: int | None = None, only_copied: bool = False) -> list[str]:
        """Removes the steps that the policies do not keep.

        Args:
            committed: The step that was just committed, if any.
            only_copied: Keep steps that no other tier holds.

        Returns:
            Why steps could not be removed, one line each.
        """
        if not self._policies:
            return []
        steps, uploads = self._steps, self.uploads
        alone = contextlib.nullcontext(set[int]()) if uploads is None else uploads.exclusive()
        with alone as promised:
            copied = {(info.step, info.time) for each in steps.remote for info in each.infos}

            def chosen(*, look: bool) -> list[StepInfo]:
                known = [
                    info
                    for info in self._not_kept(copied, committed, look=look)
                    if not (info.step in promised or steps.is_being_read(info.step))
                ]
                return [i for i in known if not only_copied or (i.step, i.time) in copied]

            doomed = chosen(look=keep_rules.read_metrics(self._policies))
            if doomed and steps.forget_missing():
                doomed = chosen(
                    look=False
                )  # other processes removed steps that were counted as kept
            failures = steps.prune([info.step for info in doomed])
        self.log.pruned(info for info in doomed if info.step not in failures)
        return [str(error) for error in failures.values()]

    def _not_kept(
        self, copied: set[tuple[int, datetime.datetime]], committed: int | None, *, look: bool
    ) -> list[StepInfo]:
        """Returns the steps that no policy keeps; the newest one only if another tier has it."""
        known: Sequence[StepInfo] = self._steps.with_late_metrics(look=look)
        if self._steps.remote:  # an evaluator may have recorded metrics in a remote tier alone
            numbers = {info.step for info in known}
            every = united([known, *(each.infos for each in self._steps.remote)])
            known = [info for info in every if info.step in numbers]
        context = KeepContext(now=datetime.datetime.now(datetime.UTC))
        gone = {*keep_rules.steps_to_prune_after(committed, self._policies, known, context=context)}
        present = [info for info in known if not info.is_abandoned]
        newest = lines.newest(present)
        if (
            newest is not None
            and (newest.step, newest.time) in copied
            and not keep_rules.keeps_newest(self._policies, present, context=context)
        ):
            gone.add(newest.step)
        if gone:
            gone -= self._steps.first.held_back(known)
            self._warn_of_metrics(known)
        return [info for info in known if info.step in gone]

    def _warn_of_metrics(self, known: Sequence[StepInfo]) -> None:
        """Warns, once for each policy, of a metric that no step has."""
        for policy, warning in keep_rules.unknown_metrics(self._policies, known).items():
            if policy not in self._warnings:
                self._warnings.add(policy)
                _log.warning("%s: %s The newest steps are kept.", self._steps.root, warning)


@contextlib.contextmanager
def noting(failures: list[str]) -> Generator[None]:
    """Adds an error in the block to the failures."""
    try:
        yield
    except errors.CheckpointError as error:
        failures.append(str(error))
