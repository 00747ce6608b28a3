"""The background half of a save: every rank writes, the primary completes, publishes and prunes.

Two rounds between the ranks, whatever they save: the primary makes the temporary directory, then
gathers what everyone wrote. A third, where something is to be removed afterwards. Nothing is
reported before the parent directory is durable.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format import write_direct
from functional_ckpt.policies.base import KeepPolicy, StepInfo
from functional_ckpt.runtime.fence import PendingCopy
from functional_ckpt.saving import finalize, lower, retention, stage, write
from functional_ckpt.steps import history
from functional_ckpt.steps.directory import Steps
from functional_ckpt.steps.uploads import Uploads
from functional_ckpt.storage import commit

__all__ = ["StepCommitter"]

_log = logging.getLogger("functional_ckpt")


class StepCommitter:
    """Commits staged steps, on every rank.

    Args:
        steps: Where to.
        keep_policies: Which steps stay.
        coordinator: How the ranks agree; used from one thread at a time.
        overwrite: Whether a step that is there may be replaced.
        num_threads: How many are busy writing, where nobody waits for it.

    Attributes:
        uploads: Where committed steps go from here; on the primary, if there are further tiers.
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

    def commit(
        self,
        step: int,
        items: Sequence[stage.StagedItem],
        info: finalize.CheckpointInfo,
        pending: PendingCopy | None = None,
        *,
        is_repeat: bool = False,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> errors.SaveError | None:
        """Writes, commits and remembers a step, then removes what the policies let go.

        Args:
            step: Its number.
            items: What to write.
            info: What is written besides.
            pending: What is left to be copied first.
            is_repeat: The step may be there already, if it holds the same.
            is_interrupted: Whether the memory that the items refer to may have changed since `save`
                was called.

        Returns:
            What could not be cleaned up after the commit; the step is committed all the same.
        """
        with self._busy:
            failure = self._commit(step, items, info, pending, is_interrupted, is_repeat=is_repeat)
        self._prune_if_idle()
        return failure

    def _commit(
        self,
        step: int,
        items: Sequence[stage.StagedItem],
        info: finalize.CheckpointInfo,
        pending: PendingCopy | None,
        is_interrupted: Callable[[], bool],
        *,
        is_repeat: bool,
    ) -> errors.SaveError | None:
        if pending is not None:
            try:
                pending.run()
            except Exception as error:
                self.abort(step, error)
                raise
        lowered = [item.lowered for item in items]
        finish = functools.partial(self._finish, lowered, info, is_repeat)
        outcome = json.loads(self._write_or_free_space(step, items, info, finish, is_interrupted))
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
        """Instead of `commit`, where staging failed: tells the other ranks and raises."""
        self._coordinator.gather_broadcast(f"starting step {step}", error, b"".join)

    def _write_or_free_space(
        self,
        step: int,
        items: Sequence[stage.StagedItem],
        info: finalize.CheckpointInfo,
        finish: Callable[[str, Sequence[write.RankReport]], bytes],
        is_interrupted: Callable[[], bool],
    ) -> bytes:
        """Writes and publishes; once more where a disk was full and further tiers made room."""
        try:
            return self._write_shards(step, items, info, finish, is_interrupted)
        except errors.CheckpointError as error:
            if not self._steps.has_tiers or isinstance(error, errors.CoordinationTimeoutError):
                raise
            # Live memory, which a bounded save writes from, may have changed by now.
            is_fixed = not any(item.blocks_caller for item in items)
            state = b"live" if not is_fixed else b"full" if _is_full(error) else b""
            what = f"freeing space for step {step}"
            removed = json.loads(self._coordinator.gather_broadcast(what, state, self._free_space))
            self._steps.forget(removed)
            if not removed:
                raise
        return self._write_shards(step, items, info, finish, is_interrupted)

    def _free_space(self, states: Sequence[bytes]) -> bytes:
        """On the primary: removes the steps that further tiers hold, if a rank's disk is full."""
        if self.uploads is None or b"full" not in states or b"live" in states:
            return b"[]"
        held = self.uploads.held_elsewhere()
        with self.uploads.exclusive() as promised:
            doomed = [step for step in held if step not in promised]
            failures = self._steps.prune(doomed)
        steps = [step for step in doomed if step not in failures]
        _log.warning("%s is full: removed %s", self._steps.root, steps or "nothing")
        return json.dumps(steps).encode()

    def _write_shards(
        self,
        step: int,
        items: Sequence[stage.StagedItem],
        info: finalize.CheckpointInfo,
        finish: Callable[[str, Sequence[write.RankReport]], bytes],
        is_interrupted: Callable[[], bool],
    ) -> bytes:
        group = self._coordinator
        begin = functools.partial(self._begin, step, [item.lowered for item in items], info)
        begun = json.loads(group.gather_broadcast(f"starting step {step}", b"", lambda _: begin()))
        tmp = os.path.join(self._steps.root, begun["directory"])
        reports: dict[int, write.RankReport] = {}
        value: bytes | BaseException = b""
        try:
            if group.rank:
                is_tmp = commit.TMP_SUFFIX in os.path.basename(tmp)
                seen = tmp if is_tmp else commit.tmp_path(tmp)
                commit.check_visible(self._storage, seen, group.rank)
            started = time.monotonic()
            is_awaited = any(item.blocks_caller for item in items)
            reports[group.rank] = write.write(
                self._storage,
                tmp,
                items,
                rank=group.rank,
                num_ranks=group.num_ranks,
                known=begun["digests"] if group.rank else None,
                num_threads=write_direct.NUM_THREADS if is_awaited else self._num_threads,
            )
            if is_interrupted():
                raise errors.SaveError(
                    "The save was interrupted (Ctrl-C) while it was writing the state from the "
                    "caller's own memory, which may have changed since.",
                    step=step,
                )
            num_bytes = sum(item.num_bytes for item in items)
            seconds = time.monotonic() - started
            self._steps.emit("written", step, seconds=seconds, num_bytes=num_bytes)
            if group.rank:
                write.write_report(self._storage, tmp, group.rank, reports[group.rank])
        except Exception as error:  # noqa: BLE001 - the other ranks must hear of it before it is raised here
            value = error

        def combine(_: Sequence[bytes]) -> bytes:
            for rank in range(1, group.num_ranks):
                reports[rank] = write.read_report(self._storage, tmp, rank)
            if group.num_ranks > 1:
                self._storage.remove(os.path.join(tmp, write.REPORTS))
            return finish(tmp, [reports[rank] for rank in range(group.num_ranks)])

        try:
            return group.gather_broadcast(f"writing step {step}", value, combine)
        except BaseException:
            if group.rank == 0:
                self._abandon(tmp)
            raise

    def _abandon(self, tmp: str) -> None:
        """On the primary: removes what a failed save wrote, now or before the next save."""
        if not commit.abandon(self._storage, tmp):
            self._leftovers.append(tmp)

    def _begin(
        self, step: int, items: Sequence[lower.LoweredItem], info: finalize.CheckpointInfo
    ) -> bytes:
        """On the primary: makes the temporary directory; says what structures look like here.

        The directory's name is the primary's: ranks may count their time differently.
        """
        self._steps.check_lock()
        commit.finish_overwrite(self._storage, self._steps.root, self._steps.hidden)
        self._leftovers = [
            each for each in self._leftovers if not commit.abandon(self._storage, each)
        ]
        tmp = commit.create_tmp(self._storage, self._steps.new_path(step, info.progress))
        is_shared = self._coordinator.num_ranks > 1
        digests = {
            item.name: write.root_digest(item.root)
            for item in items
            if item.root is not None and is_shared
        }
        return json.dumps({"directory": os.path.basename(tmp), "digests": digests}).encode()

    def _finish(
        self,
        items: Sequence[lower.LoweredItem],
        info: finalize.CheckpointInfo,
        is_repeat: bool,
        tmp: str,
        reports: Sequence[write.RankReport],
    ) -> bytes:
        """On the primary: completes and publishes; the step counts once this returns."""
        commit_time_ns = time.time_ns()
        finalize.finalize(self._storage, tmp, items, reports, info, commit_time_ns)
        final = commit.final_path(tmp)
        if is_repeat and finalize.is_same(self._storage, tmp, final):
            commit.abandon(self._storage, tmp)
            return json.dumps({"is_unchanged": True}).encode()
        if is_repeat and info.step is not None:
            self._steps.check_free(info.step, info.progress, overwrite=self._overwrite)
        hidden = self._steps.hidden
        self._steps.check_lock()
        replaced = commit.publish(self._storage, tmp, final, hidden, overwrite=self._overwrite)
        # The primary says what follows, so that no rank waits for a round that another skips.
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
        """What follows a commit; a failure here loses disk space, never a step."""

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
        """On the primary: the steps of every tier, for the other ranks."""
        if self._coordinator.num_ranks == 1:
            return {}
        tiers = self._steps.tiers_by_name().items()
        return {name: [info.step for info in each.infos] for name, each in tiers}

    def prune_uploaded(self) -> None:
        """A step has arrived in another tier: removes what need not stay here any more.

        On any thread; during a commit, that one does it at its end.
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


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is what went wrong."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
