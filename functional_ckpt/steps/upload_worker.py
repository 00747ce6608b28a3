"""The thread that uploads the promised steps of one tier, the oldest first."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import time
import weakref
from collections.abc import Callable, Generator

from functional_ckpt import errors
from functional_ckpt.policies import keep_rules
from functional_ckpt.policies.base import KeepContext
from functional_ckpt.steps.promises import lacks
from functional_ckpt.steps.remote_tier import RemoteTier
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.steps.upload_choice import UploadChoice
from functional_ckpt.steps.upload_queue import UploadQueue
from functional_ckpt.steps.upload_shares import Shares
from functional_ckpt.steps.upload_step import NotHeldError, Upload
from functional_ckpt.steps.upload_unchanged import Arrived, newest

_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 1.0, 60.0
_SETTLE_SECONDS = 1.0
_log = logging.getLogger("functional_ckpt")


class UploadWorker:
    """Uploads to one tier, in shares if there are other nodes; used by its own thread."""

    def __init__(
        self,
        local: Steps,
        tier: RemoteTier,
        queue: UploadQueue,
        choice: UploadChoice,
        shares: Shares | None,
    ) -> None:
        self.on_arrived: Callable[[], None] = _nothing
        self._local = local
        self._tier = tier
        self._queue = queue
        self._choice = choice
        self._shares = shares
        self._wait_seconds = _FIRST_WAIT_SECONDS
        self._late_since: float | None = None
        self._is_settled = True
        self._settled_at = time.monotonic()
        self._arrived: Arrived | None = None
        self._deferred: set[tuple[int, datetime.datetime | None]] = set()

    def start(self) -> None:
        """Starts the thread."""
        serve = functools.partial(_serve, self._tier.root, self._queue, weakref.ref(self))
        self._queue.start(serve)

    def work(self) -> float | None:
        """Opens the tier and uploads one step.

        Returns:
            The seconds to wait before the next attempt; None if there is none.
        """
        step: int | None = None
        commit_time: datetime.datetime | None = None
        is_due = True
        try:
            steps = self._tier.open()
            if (step := self._queue.next(self._tier.root)) is None:
                return 0.0
            commit_time = self._commit_time(step)
            self._deliver(steps, step)
            is_last = self._queue.next(self._tier.root, but=step) is None
            is_due = is_last or time.monotonic() >= self._settled_at + _SETTLE_SECONDS
            if is_due:
                self._prune(steps, step)
        except NotHeldError as error:
            self._settle()
            if step is not None:
                self._defer(step, commit_time, error)
            return 0.0
        except Exception as error:  # noqa: BLE001 - a warning, or raised when it is too late
            self._late_since = self._late_since or time.monotonic()
            self._settle()
            if step is None or self._commit_time(step) == commit_time:
                self._fail(step, error, time.monotonic() - self._late_since)
            if self._queue.fail(self._tier.root):
                root = self._tier.root
                _log.warning("%s: the upload will resume when the manager is next opened", root)
                return None
            seconds = self._wait_seconds
            self._wait_seconds = min(2 * seconds, _LAST_WAIT_SECONDS)
            return seconds
        self._wait_seconds, self._late_since = _FIRST_WAIT_SECONDS, None
        with self._queue.arriving():
            with self._queue.mutex:
                if self._commit_time(step) == commit_time:  # it was not overwritten
                    self._queue.book.withdraw(self._tier.root, step)
            self._is_settled = False
            if is_due:
                self._settle()
        return 0.0

    def _settle(self) -> None:
        """Does the local actions after uploads, whose costs depend on the number of steps.

        It is called after the last upload, and about once a second during many. Until then the
        promises on disk are out of date, and uploaded steps stay in the first tier.
        """
        if self._is_settled:
            return
        with self._queue.arriving():
            with self._queue.mutex, self._reporting():
                self._choice.promise_metrics()  # recorded during the uploads
                self._choice.write()
            with self._reporting():
                self.on_arrived()
        self._is_settled, self._settled_at = True, time.monotonic()

    def _commit_time(self, step: int) -> datetime.datetime | None:
        """Returns which commit of a step the first tier holds."""
        found = self._local.info(step)
        return None if found is None else found.time

    @contextlib.contextmanager
    def _reporting(self) -> Generator[None]:
        """Keeps an exception inside for the manager's next call to raise.

        If the promises cannot be saved, those on disk are out of date: after a restart an uploaded
        step is compared again.
        """
        try:
            yield
        except errors.CheckpointError as error:
            root = self._local.root
            _log.warning("%s: after an upload: %s", root, error)
            text = f"A step was copied, but a later action failed: {error}"
            self._queue.report(errors.SaveError(text, path=root), error)

    def _defer(self, step: int, commit_time: datetime.datetime | None, error: NotHeldError) -> None:
        """Lets a step wait: it stays promised, so that no node removes its files."""
        root, queue = self._tier.root, self._queue
        with queue.mutex:
            if self._commit_time(step) != commit_time:
                return  # it was overwritten
            queue.waiting[root].add(step)
            queue.mutex.notify_all()
        if (step, commit_time) not in self._deferred:
            self._deferred.add((step, commit_time))
            _log.warning(
                "Upload of step %d to %s waits: %s. It is tried again after each save and copy, "
                "and when the manager is next opened.",
                step,
                root,
                error,
            )

    def _fail(self, step: int | None, error: Exception, late_seconds: float) -> None:
        root, queue, limit = self._tier.root, self._queue, self._tier.max_delay_seconds
        if isinstance(error, errors.ClosedError):
            return
        what = "steps" if step is None else f"step {step}"
        is_damaged = isinstance(error, errors.CorruptCheckpointError)
        is_refused = isinstance(error, errors.StepExistsError)
        fate = "" if is_damaged or is_refused or queue.is_closing else ", retrying"
        _log.warning("Upload of %s to %s failed%s: %s", what, root, fate, error)
        with queue.mutex:
            if is_damaged and step is not None:
                queue.book.withdraw(root, step)  # for good: others wait behind it
                with self._reporting():
                    self._choice.write()
            if is_refused and step is not None:
                queue.refused[root].add(step)  # it stays promised, so it is not pruned
        is_late = limit is not None and late_seconds >= limit
        if is_damaged or is_refused or is_late or isinstance(error, errors.LockedError):
            text = "Steps" if step is None else f"Step {step}"
            queue.report_once(root, step, f"{text} cannot be copied to {root}: {error}", error)

    def _deliver(self, remote: TierSteps, step: int) -> None:
        local, queue = self._local, self._queue
        source = local.path(step)
        if not local.commits.is_committed(source):
            if self._shares is not None and self._shares.is_apart(step) and local.info(step):
                raise NotHeldError("the primary's node has no part of it")
            return  # the user has deleted it
        remote.check_lock()
        final = os.path.join(remote.root, os.path.basename(source))
        with queue.mutex:
            may_replace = self._choice.may_replace(self._tier.root, step)
        started = time.monotonic()
        if self._arrived is None and remote.storage.objects is not None:
            self._arrived = newest(remote, but=step)
        upload = Upload(
            local,
            remote,
            source,
            final,
            step,
            may_replace=may_replace,
            shares=self._shares,
            last=self._arrived,
        )
        num_bytes = upload.run()
        self._arrived = upload.arrived
        is_new = True  # else it was there, and metrics of it are new
        if (info := local.info(step)) is not None:
            old = remote.info(step)
            is_new = old is None or old.time != info.time
            remote.remember(info)
            if old is not None and is_new:
                remote.forget_late_metrics(step)
            late, there = local.recorded(info), remote.recorded(info)
            # The first tier's value takes precedence over one recorded in the tier itself.
            own = {**(info.metrics or {}), **late}
            names = [name for name in own if name in late or name in there]
            if new := {name: own[name] for name in names if lacks(there, name, own[name])}:
                remote.record(step, new)
        remote.update_latest_link()
        if step in queue.deleted:
            remote.delete(step)
            return
        if is_new:
            seconds = max(time.monotonic() - started, 1e-9)
            _log.info(
                "step %d is in %s: %.1f MiB/s", step, remote.root, num_bytes / 2**20 / seconds
            )
            remote.emit("uploaded", step, seconds=seconds, num_bytes=num_bytes)

    def _prune(self, remote: TierSteps, arrived: int) -> None:
        """Removes the steps that the tier's policies do not keep, but never the uploaded one."""
        if not self._tier.keep:
            return
        known = remote.with_late_metrics(look=keep_rules.read_metrics(self._tier.keep))
        now = datetime.datetime.now(datetime.UTC)
        context = KeepContext(now=now)
        doomed = keep_rules.steps_to_prune_after(arrived, self._tier.keep, known, context=context)
        for step, error in remote.prune(doomed).items():
            _log.warning("step %d cannot be removed from %s: %s", step, remote.root, error)
            text = (
                f"Step {arrived} is in {remote.root}, but step {step} cannot be removed from "
                f"there: {error}"
            )
            self._queue.report_once(remote.root, step, text, error)


def _serve(root: str, queue: UploadQueue, worker: weakref.ref[UploadWorker]) -> None:
    """Runs until the end; holds a reference to the worker during an upload, not while it waits."""
    try:
        while queue.wait_for_work(root):
            present = worker()
            if present is None:
                return
            seconds = present.work()
            del present
            if seconds is None:
                return
            queue.sleep(seconds)
    finally:
        queue.leave()


def _nothing() -> None:
    pass
