"""The caller's half of a save: decide, lower, plan, stage, and start the commit."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from functional_ckpt import errors
from functional_ckpt.distributed.collective import fails_on_all
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format.tuning import NUM_THREADS
from functional_ckpt.handlers.base import Registry
from functional_ckpt.policies import lines
from functional_ckpt.policies.checks import check_bool
from functional_ckpt.policies.progress import Progress
from functional_ckpt.runtime import threads
from functional_ckpt.saving import background, commit, finalize, lower, snapshots, stage
from functional_ckpt.saving import plan as plan_lib
from functional_ckpt.saving.options import Blocking, SaveOptions
from functional_ckpt.saving.publishing import MakePublishing, Save, SharedPublishing
from functional_ckpt.steps import decide, preemption, rollback
from functional_ckpt.steps.last_files import LastFiles
from functional_ckpt.steps.names import check_step
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.uploads import Uploads

_log = logging.getLogger("functional_ckpt")


class Helper(Protocol):
    """Work in the background of one node: uploads of its share, or copies to other nodes."""

    def wait(self) -> None:
        """Waits until the work on committed steps has ended."""

    def close(self) -> None:
        """Waits, and ends it."""

    def stop(self) -> None:
        """Ends it soon."""


class Saver:
    """Saves the steps of one run, on every rank.

    Attributes:
        committer: The thread that commits.
        decider: Decides which steps to save.
        last_files: The data files that the next step may share.
    """

    def __init__(
        self,
        steps: Steps,
        registry: Registry,
        coordinator: Coordinator,
        options: SaveOptions,
        make_publishing: MakePublishing = SharedPublishing,
    ) -> None:
        self._steps = steps
        self._registry = registry
        self._coordinator = coordinator
        self._options = options
        self._stager = stage.Stager(options.staging)
        self._planner = plan_lib.SavePlanner(coordinator)
        self._helpers: tuple[Helper, ...] = ()
        self.committer = background.CommitThread()
        in_background = coordinator.background()
        policy = None if steps.read_only else preemption.snapshot_policy(options.save_rule)
        for_snapshots = in_background if policy is None else in_background.background()
        is_blocking = isinstance(options.staging, Blocking)
        self.last_files = LastFiles(steps.storage, steps.root, is_enabled=options.share_unchanged)
        self._writer = commit.StepCommitter(
            steps,
            options.keep_policies,
            in_background,
            overwrite=options.overwrite,
            last_files=self.last_files,
            num_threads=NUM_THREADS if is_blocking else threads.num_spare_cores(),
            publishing=make_publishing,
        )
        self.decider = decide.SaveDecider(
            options.save_rule,
            steps,
            lambda: self.committer.step,
            (coordinator, in_background, for_snapshots),
        )
        self._snapshots = snapshots.Snapshots(
            policy, self.committer, for_snapshots, self._start_copy
        )

    def start(self) -> None:
        """Listens for SIGTERM and the clock, if a policy waits for them."""
        self.decider.start()
        if (pipe := self.decider.signals.pipe) is not None:
            self._snapshots.serve(pipe)

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        *,
        metrics: Mapping[str, Any] | None,
        progress: Progress | None,
        custom_metadata: Mapping[str, Any] | None,
        force: bool,
    ) -> background.Commit | None:
        """Saves a step if the policy accepts it; see `CheckpointManager.save`."""
        started = time.monotonic()
        with fails_on_all(self._coordinator, plan_lib.plan_of(step)):
            step, progress = check_step(step), checked_progress(progress)
            check_bool("force", force)
        # A rank with a pending error takes part in the collectives below: the others would hang.
        failure = self.committer.take_error()
        is_wanted = self.decider.should_save(step, progress, force=force)
        if is_wanted:
            self._steps.check_writable()
            can_skip = self._options.on_busy == "skip" and not force
            skips = can_skip and not self.decider.is_last_chance(step, progress)
            if skips and self._is_any_busy(step):
                _log.info("step %d skipped: another is still being committed", step)
                is_wanted = False
        if not is_wanted and not self._snapshots.is_due(step):
            return self._refuse(step, failure)
        if is_wanted:
            self.committer.wait()
            failure = failure or self.committer.take_error()
        may_exist = self._options.overwrite or self._is_repeat(step, force) or not is_wanted
        with self._planner.planning(step, force=force) as planning:
            if failure is not None:
                raise failure
            line = self._next_line(step, progress, may_exist=may_exist)
            info = checkpoint_info(step, metrics, progress, custom_metadata, line)
            group = self._coordinator
            planning.items = lower.lower(
                items, self._registry, rank=group.rank, ranks=group.global_ranks
            )
        if not is_wanted:
            self._snapshots.hold(planning.items, planning.plan, info)
            return self._refuse(step, None)
        with self._snapshots.turn, contextlib.ExitStack() as cleanup:
            self.committer.wait()  # a snapshot may have been saved meanwhile
            staged = self._stage(step, planning, cleanup)
            interruption = self._emit_staged(step, staged, time.monotonic() - started)
            # From here on the commit cleans up, or its cancellation does.
            closing = cleanup.pop_all()
            is_repeat = self._is_repeat(step, force)
            save = Save(step=step, staged=staged, info=info, is_repeat=is_repeat)
            return self._commit(save, closing, interruption)

    def _is_repeat(self, step: int, force: bool) -> bool:
        """Returns whether this run has just saved the step, maybe as a snapshot."""
        return step == self.decider.last_saved and (force or step == self._snapshots.saved_step)

    def _start_copy(self, save: Save) -> background.Commit:
        """Starts the commit of a snapshot."""
        closing = contextlib.ExitStack()
        if (lock := self._steps.lock) is not None:
            closing.callback(lock.leave, lock.enter())
        return self._start(save, closing)

    def _start(self, save: Save, closing: contextlib.ExitStack) -> background.Commit:
        """Starts a commit."""
        on_durable = self._snapshots.cover()
        work = functools.partial(_run_and_close, self._writer, save, closing, on_durable)
        handle = self.committer.start(save.step, work, closing.close)
        self.decider.mark_saved(save.step, save.info.progress)
        return handle

    def _commit(
        self,
        save: Save,
        closing: contextlib.ExitStack,
        interruption: BaseException | None,
    ) -> background.Commit:
        """Starts the commit of a staged save; with `fc.Blocking()` also waits for it."""
        staged = save.staged
        is_awaited = save.is_repeat or isinstance(self._options.staging, Blocking)
        try:
            handle = self._start(save, closing)
            if interruption is not None:
                raise interruption
            staged.wait()
            if is_awaited:
                self.committer.wait()
        except BaseException:
            staged.interrupt()
            raise
        if is_awaited and (error := self.committer.take_error()) is not None:
            cause = error.__cause__
            raise cause if isinstance(cause, errors.StepExistsError) else error
        return handle

    def _next_line(self, step: int, progress: Progress | None, *, may_exist: bool) -> lines.Line:
        """Checks that the step may be saved; returns the line that it belongs to."""
        if self._coordinator.rank:
            return lines.Line()  # the primary's counts
        self._steps.check_lock()
        self._steps.check_free(step, progress, overwrite=may_exist)
        line = self._steps.next_line()
        self._steps.warn_of_newer(step)
        return line

    def _stage(
        self, step: int, planning: plan_lib.Planning, cleanup: contextlib.ExitStack
    ) -> stage.Staged:
        """Stages the items; on failure the other ranks raise too, which wait in the commit.

        `cleanup` receives the actions to run after the commit, or instead of it.
        """
        if (lock := self._steps.lock) is not None:
            cleanup.callback(lock.leave, lock.enter())
        try:
            staged = self._stager.stage(planning.items, planning.plan, step)
        except BaseException as error:
            self._writer.abort(step, error)
            raise
        cleanup.callback(staged.abort)
        return staged

    def _emit_staged(self, step: int, staged: stage.Staged, seconds: float) -> BaseException | None:
        """Notifies the listeners; returns the exception that interrupted them.

        The commit starts all the same: the other ranks take part in it already.
        """
        try:
            self._steps.emit("staged", step, seconds=seconds, num_bytes=staged.num_bytes)
        except BaseException as error:  # noqa: BLE001 - raised once the commit has started
            return error
        return None

    def is_in_background(self) -> bool:
        """Returns whether this thread runs this manager's commit or a listener."""
        return self.committer.is_current() or self._steps.events.is_telling()

    def fence(self) -> None:
        """Waits until the overlapped copy is complete."""
        self._stager.wait()

    def upload_by(self, uploads: Uploads | None, helpers: Sequence[Helper]) -> None:
        """Sets the upload queue, and the helpers of this node."""
        self._writer.uploads, self._helpers = uploads, tuple(helpers)
        if uploads is not None:
            uploads.set_on_arrived(self._writer.prune_uploaded)
            self._writer.prune_uploaded()  # steps that arrived while the last manager closed

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """On the primary: records metrics of a committed step in the tiers that hold it.

        If the first tier holds it, the upload queue copies the metrics to the remote ones.
        """
        uploads = self._writer.uploads
        # A writer knows of every overwrite.
        commit = self._steps.restored_commits.get(step) if self._steps.read_only else None
        # The remote tiers alone would have the metrics of a directory that was moved away.
        self._steps.check_lock()
        self._steps.check_there()
        with contextlib.nullcontext() if uploads is None else uploads.exclusive():
            holders = self._steps.tiers_with(step)
            if holders[0] is self._steps:
                self._steps.record(step, metrics, commit)
                if uploads is not None:
                    uploads.recorded()  # before the step can be removed
                return
        for each in holders:
            each.record(step, metrics, commit)

    def delete(self, steps: Sequence[int], *, together: bool = False) -> None:
        """On the primary: removes steps from every tier, the first one last.

        Args:
            steps: The steps, in the order of removal.
            together: Hide all of them before the first is removed.
        """
        uploads = self._writer.uploads
        with contextlib.nullcontext() if uploads is None else uploads.exclusive():
            remote = () if uploads is None else uploads.withdraw(steps)
            rollback.remove((*reversed(remote), self._steps), steps, together=together)

    def discard_later(self, step: int) -> None:
        """On the primary: removes every step that is newer than the restored one."""
        self.delete(rollback.later(self._steps, step), together=True)
        self._steps.resume_from(step)

    def wait_for(self, step: int) -> None:
        """Waits for the commit of a step, if it is in progress; `wait` raises its error."""
        with contextlib.suppress(errors.UsageError):  # an invalid step is refused on all ranks
            if self.committer.step == check_step(step) and not self.is_in_background():
                self.committer.wait()

    def wait(self) -> None:
        """Waits for the commit in progress and for uploads; raises their errors."""
        self.committer.wait()
        self.raise_errors()
        if (uploads := self._writer.uploads) is not None:
            uploads.wait()
            uploads.raise_error()
        for helper in self._helpers:
            helper.wait()

    def finish_commits(self) -> None:
        """Waits for the commit in progress, the last one."""
        self._snapshots.close(saves=self.decider.signals.is_reached)
        self.committer.wait()

    def raise_errors(self) -> None:
        """Raises background errors, once."""
        self.committer.raise_error()
        if (uploads := self._writer.uploads) is not None:
            uploads.raise_error()

    def finish_uploads(self) -> None:
        """Waits for uploads in progress; the next run retries those that fail."""
        if (uploads := self._writer.uploads) is not None:
            uploads.close()
        for helper in self._helpers:
            helper.close()

    def release(self) -> None:
        """Removes signal handlers and the fence, and frees the staging memory."""
        if (uploads := self._writer.uploads) is not None:
            uploads.release()
        for helper in self._helpers:
            helper.stop()
        self._stager.release()
        self._snapshots.close(saves=False)
        self.decider.stop()

    def _refuse(self, step: int, failure: BaseException | None) -> None:
        """Records that the step is not saved; raises the error of an earlier save."""
        self.decider.mark_skipped(step)
        if failure is not None:
            raise failure

    def _is_any_busy(self, step: int) -> bool:
        """Returns whether any rank is still committing; the same on all ranks."""
        busy = b"1" if self.committer.is_busy else b""
        group = self._coordinator
        return group.gather_broadcast(f"whether to skip step {step}", busy, b"".join) != b""


def _run_and_close(
    committer: commit.StepCommitter,
    save: Save,
    closing: contextlib.ExitStack,
    on_durable: Callable[[], None],
) -> errors.SaveError | None:
    with closing:
        failure = committer.commit(save)
        on_durable()
        return failure


def checkpoint_info(
    step: int | None,
    metrics: Mapping[str, Any] | None,
    progress: Progress | None,
    custom_metadata: Mapping[str, Any] | None,
    line: lines.Line,
) -> finalize.CheckpointInfo:
    """Validates and returns the metadata of a checkpoint whose save starts now."""
    return finalize.CheckpointInfo(
        step=step,
        init_time_ns=time.time_ns(),
        metrics=as_json(metrics, "metrics"),
        progress=checked_progress(progress),
        custom_metadata=as_json(custom_metadata, "custom_metadata") or {},
        line=line,
    )


def as_json(value: Mapping[str, Any] | None, what: str) -> Mapping[str, Any] | None:
    """Returns the mapping with plain numbers; raises `UsageError` unless it is JSON."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise errors.UsageError(f"{what} must be a mapping with str keys; got {value!r:.80}.")
    plain = {key: lower.plain_number(each) for key, each in value.items()}
    lower.to_json(plain, what)
    lower.check_kept_by_json(plain, what)
    return plain


def checked_progress(progress: Progress | None) -> Progress | None:
    """Returns the progress; raises `UsageError` if it is something else."""
    if progress is not None and not isinstance(progress, Progress):
        raise errors.UsageError(f"progress must be an fc.Progress or None; got {progress!r:.80}.")
    return progress
