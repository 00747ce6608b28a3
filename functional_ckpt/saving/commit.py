"""The background half of a save: every rank writes, the primary finalizes, publishes and prunes.

A commit takes two collectives, however many leaves there are: the primary creates the temporary
directory, then gathers the reports of all ranks. If steps are pruned, there is a third one. A step
is reported once its parent directory is durable.
"""

from __future__ import annotations

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
from functional_ckpt.saving import retention, retry, write
from functional_ckpt.saving.publishing import Attempt, MakePublishing, Save, SharedPublishing
from functional_ckpt.steps import history
from functional_ckpt.steps.last_files import LastFiles
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.uploads import Uploads
from functional_ckpt.storage import commit

_log = logging.getLogger("functional_ckpt")

# State of a rank's part: written (empty), written from live memory, or the reason of a failure.
_LIVE, _IS_FULL, _AGAIN = b"live", b"full", b"again"


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
        publishing: MakePublishing = SharedPublishing,
    ) -> None:
        self._num_threads = num_threads
        self._steps = steps
        self._storage = steps.storage
        self._last_files = last_files
        self._publishing = publishing(
            steps, coordinator, overwrite=overwrite, has_pruning=bool(keep_policies)
        )
        self._retention = retention.Retention(steps, keep_policies)
        self._busy = threading.Lock()  # a commit, or the pruning after an upload
        self._is_prune_due = False
        self._coordinator = coordinator

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
        attempt = self._write_shards(save, self._attempt(is_last=False))
        if "retries" not in attempt.verdict:
            return attempt.verdict
        self._publishing.abandon(attempt.begun.tmp)
        self._forget(attempt.verdict["removed"])
        if not attempt.verdict["retries"]:
            with collective(self._coordinator, f"writing step {save.step}"):
                if attempt.failure is not None:
                    raise attempt.failure
        if attempt.failure is not None:
            _log.warning("writing step %d again after: %s", save.step, attempt.failure)
        return self._write_shards(save, self._attempt(is_last=True)).verdict

    def _write_shards(self, save: Save, attempt: Attempt) -> Attempt:
        """Writes and publishes, or decides whether to try again; the same on all ranks."""
        group = self._coordinator
        attempt.begun = self._publishing.begin(save, _starting(save.step))
        combine = functools.partial(self._finish_or_retry, save, attempt)
        try:
            with collective(group, f"writing step {save.step}", combine) as turn:
                turn.value = _LIVE if save.staged.blocks_caller else b""
                try:
                    attempt.report = self._write_own(save, attempt.begun)
                except Exception as error:
                    if not (state := attempt.state_after(error, save)):
                        raise
                    turn.value = state
        except BaseException:
            self._publishing.abandon(attempt.begun.tmp)
            raise
        attempt.verdict = json.loads(turn.outcome)
        if "retries" not in attempt.verdict:
            attempt.verdict = self._publishing.complete(save, attempt, attempt.verdict)
        if attempt.verdict.get("is_unchanged") is False:
            self._last_files.committed(commit.final_path(attempt.begun.tmp))
        return attempt

    def _state_of(self, error: BaseException) -> bytes:
        """Returns the reason why a second attempt may succeed; empty if it will not."""
        if retry.is_full(error):
            return _IS_FULL if self._steps.has_tiers else b""
        return _AGAIN if retry.is_transient(error) else b""

    def _finish_or_retry(self, save: Save, attempt: Attempt, states: Sequence[bytes]) -> bytes:
        """On the primary: finishes the save, or decides that all ranks write it again."""
        found = set(states)
        if not found - {b"", _LIVE}:
            try:
                return json.dumps(self._publishing.publish(save, attempt)).encode()
            except Exception as error:
                state = self._state_of(error)
                # A step whose publishing failed may be visible.
                is_certain = state == _IS_FULL or not attempt.is_publishing
                if attempt.is_last or not state or not is_certain:
                    raise
                attempt.failure = error
                found.add(state)
        return json.dumps(self._verdict_of(found)).encode()

    def _attempt(self, *, is_last: bool) -> Attempt:
        return Attempt(is_last=is_last, state_of=self._state_of, verdict_of=self._verdict_of)

    def _verdict_of(self, states: set[bytes]) -> dict[str, Any]:
        """On the primary: decides whether all ranks write the step again, given their states."""
        removed = self._free_space() if _IS_FULL in states and _LIVE not in states else []
        retries = _LIVE not in states and (_IS_FULL not in states or bool(removed))
        return {"retries": retries, "removed": removed}

    def _forget(self, removed: Sequence[int]) -> None:
        """Forgets steps that the primary removed; heads of other nodes remove them, too."""
        if self._coordinator.rank and self._steps.lock is not None:
            self._steps.prune(removed)
        self._steps.forget(removed)

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
        self._publishing.deliver(begun, report)
        seconds = time.monotonic() - started
        self._steps.emit("written", save.step, seconds=seconds, num_bytes=staged.num_bytes)
        return report

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
        failures: list[str] = done["failures"]
        if self._coordinator.rank:
            failures += self._publishing.follow(info.step, done["lists"])
        return self._not_cleaned_up(info.step, failures, None) if failures else None

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
