"""The background half of a save: every rank writes, the primary finalizes, publishes and prunes.

Two collectives per save, however many leaves: the primary creates the temporary directory, then
gathers the reports of all ranks. A third one where steps are pruned. A step is reported once its
parent directory is durable.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence

from functional_ckpt import errors
from functional_ckpt.distributed.collective import collective
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format import write_direct
from functional_ckpt.policies.base import KeepPolicy, StepInfo
from functional_ckpt.saving import finalize, lower, retention, stage, write
from functional_ckpt.steps import history
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.uploads import Uploads
from functional_ckpt.storage import commit

__all__ = ["Save", "StepCommitter"]

_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """One save that is committed.

    Attributes:
        step: The step.
        staged: What to write.
        info: Metadata besides the items.
        is_repeat: Whether the step may exist already, if its content is the same.
    """

    step: int
    staged: stage.Staged
    info: finalize.CheckpointInfo
    is_repeat: bool = False

    @property
    def lowered(self) -> list[lower.LoweredItem]:
        """The items as this rank has them."""
        return [item.lowered for item in self.staged.items]


class StepCommitter:
    """Commits staged steps, on every rank.

    Args:
        steps: The directory of steps.
        keep_policies: Which steps to keep.
        coordinator: The ranks; used from one thread at a time.
        overwrite: Whether an existing step may be replaced.
        num_threads: How many threads write while `save` does not wait for them.

    Attributes:
        uploads: The upload queue; on the primary, if there are remote tiers.
    """

    def __init__(
        self,
        steps: Steps,
        keep_policies: Sequence[KeepPolicy],
        coordinator: Coordinator,
        *,
        overwrite: bool,
        num_threads: int,
    ) -> None:
        self._overwrite = overwrite
        self._num_threads = num_threads
        self.uploads: Uploads | None = None
        self._steps = steps
        self._storage = steps.storage
        self._keep_policies = tuple(keep_policies)
        self._busy = threading.Lock()  # a commit, or the pruning after an upload
        self._is_prune_due = False
        self._coordinator = coordinator
        self._leftovers: list[str] = []

    def commit(self, save: Save) -> errors.SaveError | None:
        """Writes, commits and remembers a step, then prunes.

        Returns:
            The error of the clean-up after the commit, if any; the step is committed regardless.
        """
        with self._busy:
            failure = self._commit(save)
        self._prune_if_idle()
        return failure

    def _commit(self, save: Save) -> errors.SaveError | None:
        step, info = save.step, save.info
        try:
            save.staged.finish()
        except Exception as error:
            self.abort(step, error)
            raise
        outcome = json.loads(self._write_or_free_space(save))
        if outcome["is_unchanged"]:
            return None
        committed = StepInfo(
            step=step,
            time=history.commit_time(outcome["commit_time_ns"]),
            metrics=info.metrics,
            progress=info.progress,
            generation=outcome["generation"],
            ancestors=tuple((generation, last) for generation, last in outcome["ancestors"]),
        )
        self._steps.remember(committed)
        if self._coordinator.rank == 0:
            _log.info("step %d committed", step)
            seconds = (outcome["commit_time_ns"] - info.init_time_ns) / 1e9
            self._steps.emit("committed", step, seconds=seconds)
        return self._clean_up(committed, outcome["replaced"]) if outcome["cleans_up"] else None

    def abort(self, step: int, error: BaseException) -> None:
        """Raises on all ranks, in place of `commit`, where staging failed."""
        self._coordinator.gather_broadcast(_starting(step), error, b"".join)

    def _write_or_free_space(self, save: Save) -> bytes:
        """Writes and publishes; a second time if remote tiers allow space to be freed."""
        try:
            return self._write_shards(save)
        except errors.CheckpointError as error:
            if not self._steps.has_tiers or isinstance(error, errors.CoordinationTimeoutError):
                raise
            # Live memory that `save` does not wait for any more may have changed by now.
            is_fixed = not save.staged.blocks_caller
            state = b"live" if not is_fixed else b"full" if _is_full(error) else b""
            what = f"freeing space for step {save.step}"
            removed = json.loads(self._coordinator.gather_broadcast(what, state, self._free_space))
            self._steps.forget(removed)
            if not removed:
                raise
        return self._write_shards(save)

    def _free_space(self, states: Sequence[bytes]) -> bytes:
        """On the primary: removes the steps that remote tiers hold, if a rank's disk is full."""
        if self.uploads is None or b"full" not in states or b"live" in states:
            return b"[]"
        held = self.uploads.held_elsewhere()
        with self.uploads.exclusive() as promised:
            doomed = [step for step in held if step not in promised]
            failures = self._steps.prune(doomed)
        steps = [step for step in doomed if step not in failures]
        _log.warning("%s is full: removed %s", self._steps.root, steps or "nothing")
        return json.dumps(steps).encode()

    def _write_shards(self, save: Save) -> bytes:
        group = self._coordinator
        begin = functools.partial(self._begin, save)
        begun = json.loads(group.gather_broadcast(_starting(save.step), b"", lambda _: begin()))
        tmp = os.path.join(self._steps.root, begun["directory"])
        reports: dict[int, write.RankReport] = {}

        def combine(_: Sequence[bytes]) -> bytes:
            every = write.every_report(self._storage, tmp, reports[0], group.num_ranks)
            return self._finish(save, tmp, every)

        try:
            with collective(group, f"writing step {save.step}", combine) as turn:
                reports[group.rank] = self._write_own(save, tmp, begun["digests"])
        except BaseException:
            if group.rank == 0:
                self._abandon(tmp)
            raise
        return turn.outcome

    def _write_own(self, save: Save, tmp: str, digests: Mapping[str, str]) -> write.RankReport:
        """Writes this rank's part, and its report where the primary finds it."""
        group, staged = self._coordinator, save.staged
        started = time.monotonic()
        num_threads = write_direct.NUM_THREADS if staged.blocks_caller else self._num_threads
        report = write.write_part(self._storage, tmp, staged.items, group, digests, num_threads)
        if staged.is_interrupted:
            raise errors.SaveError(
                "The save was interrupted (Ctrl-C) while it was writing the state from the "
                "caller's own memory, which may have changed since.",
                step=save.step,
            )
        seconds = time.monotonic() - started
        self._steps.emit("written", save.step, seconds=seconds, num_bytes=staged.num_bytes)
        if group.rank:
            write.write_report(self._storage, tmp, group.rank, report)
        return report

    def _abandon(self, tmp: str) -> None:
        """On the primary: removes a failed save's directory, now or before the next save."""
        if not self._steps.commits.abandon(tmp):
            self._leftovers.append(tmp)

    def _begin(self, save: Save) -> bytes:
        """On the primary: creates the temporary directory; returns its name and structure digests.

        The directory's name is the primary's: clocks of ranks may differ.
        """
        self._steps.check_lock()
        self._steps.commits.finish_overwrite()
        self._leftovers = [
            each for each in self._leftovers if not self._steps.commits.abandon(each)
        ]
        final = self._steps.new_path(save.step, save.info.progress)
        tmp = self._steps.commits.begin(final)
        digests = write.digests(save.lowered) if self._coordinator.num_ranks > 1 else {}
        return json.dumps({"directory": os.path.basename(tmp), "digests": digests}).encode()

    def _finish(self, save: Save, tmp: str, reports: Sequence[write.RankReport]) -> bytes:
        """On the primary: finalizes and publishes; the step is committed when this returns."""
        commit_time_ns, info = time.time_ns(), save.info
        finalize.finalize(self._storage, tmp, save.lowered, reports, info, commit_time_ns)
        final = commit.final_path(tmp)
        if save.is_repeat and finalize.is_same(self._storage, tmp, final):
            self._steps.commits.abandon(tmp)
            return json.dumps({"is_unchanged": True}).encode()
        if save.is_repeat:
            self._steps.check_free(save.step, info.progress, overwrite=self._overwrite)
        self._steps.check_lock()
        replaced = self._steps.commits.publish(tmp, final, overwrite=self._overwrite)
        # The primary decides on the next round, so that no rank waits for one that another skips.
        cleans_up = bool(self._keep_policies or self._steps.latest_link or self._steps.has_tiers)
        outcome = {
            "is_unchanged": False,
            "commit_time_ns": commit_time_ns,
            "replaced": replaced,
            "cleans_up": cleans_up or replaced is not None,
            "generation": info.line.generation,
            "ancestors": info.line.ancestors,
        }
        return json.dumps(outcome).encode()

    def _clean_up(self, info: StepInfo, replaced: str | None) -> errors.SaveError | None:
        """Prunes after a commit; a failure loses disk space, never a step."""

        def on_primary(_: Sequence[bytes]) -> bytes:
            self._steps.check_lock()
            failures = retention.clean_up(
                self._steps, self._keep_policies, self.uploads, info, replaced
            )
            return json.dumps({"failures": failures, "lists": self._lists()}).encode()

        what = f"cleaning up after step {info.step}"
        try:
            done = json.loads(self._coordinator.gather_broadcast(what, b"", on_primary))
        except Exception as error:  # noqa: BLE001 - reported like what fails inside
            return self._not_cleaned_up(info.step, [str(error)], error)
        if self._coordinator.rank:
            self._steps.follow(done["lists"])
        if not done["failures"]:
            return None
        return self._not_cleaned_up(info.step, done["failures"], None)

    def _not_cleaned_up(
        self, step: int, failures: Sequence[str], cause: BaseException | None
    ) -> errors.SaveError:
        error = errors.SaveError(
            f"Step {step} was committed, but cleaning up after it failed: {'; '.join(failures)}",
            step=step,
            path=self._steps.root,
        )
        error.__cause__ = cause
        if self._coordinator.rank == 0:
            _log.warning("%s", error)
        return error

    def _lists(self) -> dict[str, list[int]]:
        """On the primary: returns the steps of every tier, for the other ranks."""
        if self._coordinator.num_ranks == 1:
            return {}
        tiers = self._steps.tiers_by_name().items()
        return {name: [info.step for info in each.infos] for name, each in tiers}

    def prune_uploaded(self) -> None:
        """Prunes after a step has arrived in another tier; a commit in progress does it at its end.

        Any thread may call it.
        """
        self._is_prune_due = True
        self._prune_if_idle()

    def _prune_if_idle(self) -> None:
        while self._is_prune_due and self._busy.acquire(blocking=False):
            try:
                self._is_prune_due = False
                failures = retention.prune(
                    self._steps, self._keep_policies, self.uploads, only_copied=True
                )
                for failure in failures:
                    _log.warning("%s: pruning failed: %s", self._steps.root, failure)
            except errors.CheckpointError as error:
                _log.warning("%s: pruning failed: %s", self._steps.root, error)
            finally:
                self._busy.release()


def _starting(step: int) -> str:
    return f"starting step {step}"


def _is_full(error: BaseException | None) -> bool:
    """Returns whether a full disk caused an error."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
