"""The background half of a save: every rank writes, the primary finalizes, publishes and prunes.

A commit takes two collectives, however many leaves there are: the primary creates the temporary
directory, then gathers the reports of all ranks. If steps are pruned, there is a third one. A step
is reported once its parent directory is durable.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.distributed.collective import collective
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.events import Tally
from functional_ckpt.format.tuning import NUM_THREADS
from functional_ckpt.policies.base import KeepPolicy, StepInfo
from functional_ckpt.saving import finalize, lower, retention, retry, stage, write
from functional_ckpt.steps import history
from functional_ckpt.steps.last_files import LastFiles
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.uploads import Uploads
from functional_ckpt.storage import commit

_log = logging.getLogger("functional_ckpt")

# State of a rank's part: written (empty), written from live memory, or the reason of a failure.
_LIVE, _IS_FULL, _AGAIN = b"live", b"full", b"again"


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
class _Attempt:
    """One rank's side of writing a step.

    Attributes:
        is_last: Whether no other attempt follows.
        begun: The directory and names of this attempt.
        report: The report of this rank.
        is_publishing: On the primary, whether the step may be visible.
        failure: The error after which a second attempt may succeed.
        verdict: The outcome, the same on all ranks; with `retries` if it was not published.
    """

    is_last: bool
    begun: write.Begun = dataclasses.field(init=False)
    report: write.RankReport = dataclasses.field(default_factory=dict[str, write.ItemReport])
    is_publishing: bool = False
    failure: Exception | None = None
    verdict: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


class StepCommitter:
    """Commits staged steps, on every rank.

    The coordinator is used from one thread at a time. `num_threads` threads write if `save` does
    not wait for them.
    """

    def __init__(
        self,
        steps: Steps,
        keep_policies: Sequence[KeepPolicy],
        coordinator: Coordinator,
        *,
        overwrite: bool,
        last_files: LastFiles,
        num_threads: int,
    ) -> None:
        self._overwrite = overwrite
        self._num_threads = num_threads
        self._steps = steps
        self._storage = steps.storage
        self._last_files = last_files
        self._prunes = bool(keep_policies)
        self._retention = retention.Retention(steps, keep_policies)
        self._busy = threading.Lock()  # a commit, or the pruning after an upload
        self._is_prune_due = False
        self._coordinator = coordinator
        self._leftovers: list[str] = []

    @property
    def uploads(self) -> Uploads | None:
        """The upload queue; on the primary, if there are remote tiers."""
        return self._retention.uploads

    @uploads.setter
    def uploads(self, uploads: Uploads | None) -> None:
        self._retention.uploads = uploads

    def commit(self, save: Save) -> errors.SaveError | None:
        """Writes and commits a step, adds it to the index, then prunes.

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
        outcome = self._write_or_retry(save)
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
            self._steps.emit("committed", step, seconds=seconds, metrics=info.metrics)
            self._retention.log.committed(
                committed, size_bytes=outcome["size_bytes"], seconds=seconds
            )
        return self._clean_up(committed, outcome["replaced"]) if outcome["cleans_up"] else None

    def abort(self, step: int, error: BaseException) -> None:
        """Raises on all ranks; called instead of `commit` if staging failed."""
        self._coordinator.gather_broadcast(_starting(step), error, b"".join)

    def _write_or_retry(self, save: Save) -> dict[str, Any]:
        """Writes and publishes; after a transient error a second time, in a new directory.

        Only staged copies are written again: live memory may have changed once `save` has returned.
        """
        attempt = self._write_shards(save, _Attempt(is_last=False))
        if "retries" not in attempt.verdict:
            return attempt.verdict
        if self._coordinator.rank == 0:
            self._abandon(attempt.begun.tmp)
        self._steps.forget(attempt.verdict["removed"])
        if not attempt.verdict["retries"]:
            with collective(self._coordinator, f"writing step {save.step}"):
                if attempt.failure is not None:
                    raise attempt.failure
        if attempt.failure is not None:
            _log.warning("writing step %d again after: %s", save.step, attempt.failure)
        return self._write_shards(save, _Attempt(is_last=True)).verdict

    def _write_shards(self, save: Save, attempt: _Attempt) -> _Attempt:
        """Writes and publishes, or decides whether to try again; the same on all ranks."""
        group = self._coordinator
        create = functools.partial(self._create, save)
        what, root = _starting(save.step), self._steps.root
        has_token = self._storage.objects is not None or self._steps.has_stores
        attempt.begun = write.begin(group, what, save.lowered, root, create, has_token=has_token)
        combine = functools.partial(self._finish_or_retry, save, attempt)
        try:
            with collective(group, f"writing step {save.step}", combine) as turn:
                turn.value = _LIVE if save.staged.blocks_caller else b""
                try:
                    attempt.report = self._write_own(save, attempt.begun)
                except Exception as error:
                    state = self._state_of(error)
                    if attempt.is_last or turn.value == _LIVE or not state:
                        raise
                    attempt.failure, turn.value = error, state
        except BaseException:
            if group.rank == 0:
                self._abandon(attempt.begun.tmp)
            raise
        attempt.verdict = json.loads(turn.outcome)
        if attempt.verdict.get("is_unchanged") is False:
            self._last_files.committed(commit.final_path(attempt.begun.tmp))
        return attempt

    def _state_of(self, error: BaseException) -> bytes:
        """Returns the reason why a second attempt may succeed; empty if it will not."""
        if retry.is_full(error):
            return _IS_FULL if self._steps.has_tiers else b""
        return _AGAIN if retry.is_transient(error) else b""

    def _finish_or_retry(self, save: Save, attempt: _Attempt, states: Sequence[bytes]) -> bytes:
        """On the primary: finishes the save, or decides that all ranks write it again."""
        found = set(states)
        if not found - {b"", _LIVE}:
            try:
                return self._finish(save, attempt)
            except Exception as error:
                state = self._state_of(error)
                # A step whose publishing failed may be visible.
                is_certain = state == _IS_FULL or not attempt.is_publishing
                if attempt.is_last or not state or not is_certain:
                    raise
                attempt.failure = error
                found.add(state)
        removed = self._free_space() if _IS_FULL in found and _LIVE not in found else []
        retries = _LIVE not in found and (_IS_FULL not in found or bool(removed))
        return json.dumps({"retries": retries, "removed": removed}).encode()

    def _free_space(self) -> list[int]:
        """On the primary: removes the steps that remote tiers hold; returns them."""
        if self.uploads is None:
            return []
        held = self.uploads.held_elsewhere()
        with self.uploads.exclusive() as promised:
            doomed = [step for step in held if step not in promised]
            failures = self._steps.prune(doomed)
        steps = [step for step in doomed if step not in failures]
        _log.warning("%s is full: removed %s", self._steps.root, steps or "nothing")
        return steps

    def _write_own(self, save: Save, begun: write.Begun) -> write.RankReport:
        """Writes this rank's part, and its report for the primary."""
        staged = save.staged
        started = time.monotonic()
        num_threads = NUM_THREADS if staged.blocks_caller else self._num_threads
        with self._steps.events.bar(f"saving step {save.step}") as show:
            report = write.write_part(
                self._storage,
                begun,
                staged.items,
                self._coordinator,
                num_threads,
                last=self._last_files,
                on_written=show and Tally(show, 0, staged.num_bytes).add,
            )
        if staged.is_interrupted:
            raise errors.SaveError(
                "The save was interrupted (Ctrl-C) while it was writing the state from the "
                "caller's own memory, which may have changed since.",
                step=save.step,
            )
        seconds = time.monotonic() - started
        self._steps.emit("written", save.step, seconds=seconds, num_bytes=staged.num_bytes)
        return report

    def _abandon(self, tmp: str) -> None:
        """On the primary: removes a failed save's directory, now or before the next save."""
        if not self._steps.commits.abandon(tmp):
            self._leftovers.append(tmp)

    def _create(self, save: Save) -> str:
        """On the primary: creates the temporary directory; returns its path."""
        self._steps.check_lock()
        self._steps.commits.finish_overwrite()
        self._leftovers = [
            each for each in self._leftovers if not self._steps.commits.abandon(each)
        ]
        final = self._steps.new_path(save.step, save.info.progress)
        return self._steps.commits.begin(final)

    def _finish(self, save: Save, attempt: _Attempt) -> bytes:
        """On the primary: finalizes and publishes; the step is committed when this returns."""
        commit_time_ns, info, begun = time.time_ns(), save.info, attempt.begun
        tmp = begun.tmp
        num_ranks = self._coordinator.num_ranks
        reports = write.every_report(self._storage, begun, attempt.report, num_ranks)
        size_bytes = finalize.finalize(
            self._storage, tmp, save.lowered, reports, info, commit_time_ns, begun.token
        )
        final = commit.final_path(tmp)
        if save.is_repeat and finalize.is_same(self._storage, tmp, final):
            self._abandon(tmp)
            return json.dumps({"is_unchanged": True}).encode()
        if save.is_repeat:
            self._steps.check_free(save.step, info.progress, overwrite=self._overwrite)
        self._steps.check_lock()
        attempt.is_publishing = True
        replaced = self._steps.commits.publish(tmp, final, overwrite=self._overwrite)
        # The primary decides on the next round, so that no rank waits for one that another skips.
        cleans_up = bool(self._prunes or self._steps.latest_link or self._steps.has_tiers)
        outcome = {
            "is_unchanged": False,
            "commit_time_ns": commit_time_ns,
            "size_bytes": size_bytes,
            "replaced": replaced,
            "cleans_up": cleans_up or replaced is not None,
            "generation": info.line.generation,
            "ancestors": info.line.ancestors,
        }
        return json.dumps(outcome).encode()

    def _clean_up(self, info: StepInfo, replaced: str | None) -> errors.SaveError | None:
        """Prunes after a commit; a failure costs disk space, never a step."""

        def on_primary(_: Sequence[bytes]) -> bytes:
            self._steps.check_lock()
            failures = self._retention.clean_up(info, replaced)
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
        """Prunes after the upload of a step; a running commit prunes at its end.

        Any thread may call it.
        """
        self._is_prune_due = True
        self._prune_if_idle()

    def _prune_if_idle(self) -> None:
        while self._is_prune_due and self._busy.acquire(blocking=False):
            try:
                self._is_prune_due = False
                for failure in self._retention.prune(only_copied=True):
                    _log.warning("%s: pruning failed: %s", self._steps.root, failure)
            except errors.CheckpointError as error:
                _log.warning("%s: pruning failed: %s", self._steps.root, error)
            finally:
                self._busy.release()


def _starting(step: int) -> str:
    return f"starting step {step}"
