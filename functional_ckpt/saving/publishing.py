"""How a written step becomes one of the directory: in one directory that all ranks share.

`node_publishing` does the same where each node has a directory of its own.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.saving import finalize, lower, stage, write
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.storage import commit


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """A save to commit. The step of a repeat may exist, if its content is the same."""

    step: int
    staged: stage.Staged
    info: finalize.CheckpointInfo
    is_repeat: bool = False

    @property
    def lowered(self) -> list[lower.LoweredItem]:
        """The items as this rank has them."""
        return [item.lowered for item in self.staged.items]


@dataclasses.dataclass(slots=True, kw_only=True)
class Attempt:
    """One rank's side of writing a step.

    Attributes:
        is_last: Whether no other attempt follows.
        state_of: Returns why a second attempt may succeed after an error; empty if it will not.
        verdict_of: On the primary, returns whether all ranks try again, given these states.
        begun: The directory and names of this attempt.
        report: The report of this rank.
        is_publishing: On the primary, whether the step may be visible.
        failure: The error after which a second attempt may succeed.
        verdict: The outcome, the same on all ranks; with `retries` if it was not published.
    """

    is_last: bool
    state_of: Callable[[BaseException], bytes]
    verdict_of: Callable[[set[bytes]], dict[str, Any]]
    begun: write.Begun = dataclasses.field(init=False)
    report: write.RankReport = dataclasses.field(default_factory=dict[str, write.ItemReport])
    is_publishing: bool = False
    failure: Exception | None = None
    verdict: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def state_after(self, error: BaseException, save: Save) -> bytes:
        """Notes an error of this rank, and returns why a second attempt may succeed, or empty.

        Only staged copies are written again: live memory may have changed.
        """
        if self.is_last or save.staged.blocks_caller:
            return b""
        if (state := self.state_of(error)) and isinstance(error, Exception):
            self.failure = error
        return state


class Publishing(Protocol):
    """Makes the directories of a step, and publishes the files of all ranks."""

    def begin(self, save: Save, what: str) -> write.Begun:
        """Creates the temporary directory on all ranks; all of them call."""
        ...

    def deliver(self, begun: write.Begun, report: write.RankReport) -> None:
        """Makes this rank's report available to the primary, before all ranks have written."""
        ...

    def publish(self, save: Save, attempt: Attempt) -> dict[str, Any]:
        """On the primary, once all ranks have written: publishes the step.

        Returns:
            The outcome, which all ranks get.
        """
        ...

    def complete(self, save: Save, attempt: Attempt, outcome: dict[str, Any]) -> dict[str, Any]:
        """Does the part of all ranks after `publish`; returns the final outcome."""
        ...

    def abandon(self, tmp: str) -> None:
        """Removes a failed save's directory, now or before the next save, if this rank may."""
        ...

    def follow(self, step: int, lists: dict[str, list[int]]) -> list[str]:
        """On ranks other than the primary: cleans up after a step as the primary has done.

        Args:
            step: The step that was committed.
            lists: The primary's lists of steps, by name of the tier.

        Returns:
            The failures, one line each.
        """
        ...


class MakePublishing(Protocol):
    """Makes the `Publishing` of a run."""

    def __call__(
        self, steps: Steps, group: Coordinator, /, *, overwrite: bool, has_pruning: bool
    ) -> Publishing:
        """Returns it."""
        ...


class SharedPublishing:
    """One directory: the primary creates, finalizes and renames. See `Publishing`.

    Args:
        steps: The steps.
        group: The ranks.
        overwrite: Whether a step may replace another one.
        has_pruning: Whether steps are pruned after a commit.
    """

    def __init__(
        self, steps: Steps, group: Coordinator, *, overwrite: bool, has_pruning: bool
    ) -> None:
        self._steps = steps
        self._storage = steps.storage
        self._group = group
        self._overwrite = overwrite
        self._has_pruning = has_pruning
        self._leftovers = Leftovers(steps)

    def begin(self, save: Save, what: str) -> write.Begun:
        """See `Publishing.begin`."""
        steps = self._steps

        def create() -> str:
            self._leftovers.prepare()
            return steps.commits.begin(steps.new_path(save.step, save.info.progress))

        has_token = steps.commits.repeats_names or steps.has_stores
        return write.begin(self._group, what, save.lowered, steps.root, create, has_token=has_token)

    def deliver(self, begun: write.Begun, report: write.RankReport) -> None:
        """See `Publishing.deliver`: writes a file that the primary reads."""
        if self._group.rank:
            write.write_report(self._storage, begun, self._group.rank, report)

    def publish(self, save: Save, attempt: Attempt) -> dict[str, Any]:
        """See `Publishing.publish`; the step is committed when this returns."""
        commit_time_ns, info, begun = time.time_ns(), save.info, attempt.begun
        tmp = begun.tmp
        num_ranks = self._group.num_ranks
        reports = write.every_report(self._storage, begun, attempt.report, num_ranks)
        size_bytes = finalize.finalize(
            self._storage, tmp, save.lowered, reports, info, commit_time_ns, begun.token
        )
        final = commit.final_path(tmp)
        if save.is_repeat and finalize.is_same(self._storage, tmp, final):
            self.abandon(tmp)
            return {"is_unchanged": True}
        if save.is_repeat:
            self._steps.check_free(save.step, info.progress, overwrite=self._overwrite)
        self._steps.check_lock()
        attempt.is_publishing = True
        replaced = self._steps.commits.publish(tmp, final, overwrite=self._overwrite)
        has_pruning = self._has_pruning or replaced is not None
        return outcome_of(
            self._steps, save, commit_time_ns, size_bytes, has_pruning=has_pruning
        ) | {"replaced": replaced}

    def complete(self, save: Save, attempt: Attempt, outcome: dict[str, Any]) -> dict[str, Any]:
        """Returns the outcome: the primary has done all."""
        del save, attempt
        return outcome

    def abandon(self, tmp: str) -> None:
        """See `Publishing.abandon`."""
        if self._group.rank == 0:
            self._leftovers.abandon(tmp)

    def follow(self, step: int, lists: dict[str, list[int]]) -> list[str]:
        """See `Publishing.follow`."""
        del step
        self._steps.follow(lists)
        return []


class Leftovers:
    """The directories of failed saves that could not be removed yet."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._paths: list[str] = []

    def abandon(self, tmp: str) -> None:
        """Removes a failed save's directory, now or before the next save."""
        if not self._steps.commits.abandon(tmp):
            self._paths.append(tmp)

    def prepare(self) -> None:
        """Prepares the directory for another save; raises if the lock was lost."""
        self._steps.check_lock()
        self._steps.commits.finish_overwrite()
        self._paths = [each for each in self._paths if not self._steps.commits.abandon(each)]


def outcome_of(
    steps: Steps, save: Save, commit_time_ns: int, size_bytes: int, *, has_pruning: bool
) -> dict[str, Any]:
    """Returns the outcome of a commit, for all ranks.

    The primary decides whether there is a round to clean up, so that no rank waits for one that
    another skips.
    """
    return {
        "is_unchanged": False,
        "commit_time_ns": commit_time_ns,
        "size_bytes": size_bytes,
        "replaced": None,
        "cleans_up": bool(has_pruning or steps.latest_link or steps.has_tiers),
        "generation": save.info.line.generation,
        "ancestors": save.info.line.ancestors,
    }
