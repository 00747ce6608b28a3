"""Committed steps on their way to other tiers: promised, copied, verified, published.

Pending uploads are recorded next to the steps before anything is pruned, so that a restart resumes
them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence

from functional_ckpt import errors
from functional_ckpt.policies import lines, rules
from functional_ckpt.policies.base import KeepContext, SaveContext, StepInfo
from functional_ckpt.steps.directory import Steps
from functional_ckpt.steps.promises import Promises, lacks, lacks_metrics
from functional_ckpt.steps.remote_tier import RemoteTier, open_reachable
from functional_ckpt.steps.upload_step import Upload
from functional_ckpt.storage import commit
from functional_ckpt.storage.base import Lock

__all__ = ["Uploads"]

_STATE = "uploads.json"
_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 1.0, 60.0
_log = logging.getLogger("functional_ckpt")


class Uploads:
    """The uploads from a first tier to others; on the primary of a writer.

    Args:
        local: The steps of the first tier.
        remote: The others.
        overwrite: Whether a step may replace another commit of its number.

    Attributes:
        on_arrived: Called when a step has arrived, on any thread.
    """

    def __init__(self, local: Steps, remote: Sequence[RemoteTier], *, overwrite: bool) -> None:
        self._local = local
        self._remote = tuple(remote)
        self._overwrite = overwrite
        self.on_arrived: Callable[[], None] = lambda: None
        self._mutex = threading.Condition(threading.RLock())
        self._alone = threading.Lock()
        path = os.path.join(local.hidden, _STATE)
        self._book = Promises(local.commits, path, [each.root for each in remote])
        self._failed: set[str] = set()
        self._error: errors.CheckpointError | None = None
        self._reported: set[tuple[str, int | None]] = set()
        # By tier: promised steps that cannot go there as long as this process lives.
        self._refused: dict[str, set[int]] = {each.root: set() for each in remote}
        self._deleted: set[int] = set()
        self._num_arriving = 0  # uploaded steps with outstanding later actions
        self._closing = self._is_released = False

    # ---------------------------------------------------------------------------- the caller's

    def begin(self) -> None:
        """Takes over the reachable tiers, and resumes pending uploads."""
        self._book.read()
        here = [info.step for info in self._local.infos]
        for tier in self._remote:
            self._book.keep_only(tier.root, here)
            tier.acquire = self._take_over
        open_reachable(self._remote)
        with self._mutex:
            self._write_down()
        for tier in self._remote:
            work = functools.partial(self._work, tier)
            threading.Thread(target=work, name="upload", daemon=True).start()

    def committed(self, info: StepInfo) -> None:
        """The first tier holds a step: promises it to those that want it."""
        with self._mutex:
            self._deleted.discard(info.step)
            for tier in self._remote:
                decided = self._book.decided[tier.root]
                if info.step in decided:  # it was overwritten
                    decided.remove(info.step)
                self._refused[tier.root].discard(info.step)
                if self._overwrite and info.step not in self._book.replacing[tier.root]:
                    self._book.replacing[tier.root].append(info.step)
                self._consider(tier, tier.steps, info)
            self._promise_metrics()
            self._write_down()
            self._mutex.notify_all()

    def recorded(self) -> None:
        """Metrics were recorded, by whatever process: they go where their steps are."""
        with self._mutex:
            if self._promise_metrics():
                self._write_down()
                self._mutex.notify_all()

    def withdraw(self, steps: Sequence[int]) -> list[Steps]:
        """Lets steps that are being deleted not come to the other tiers again by themselves.

        Returns:
            The tiers, all of which are open: the steps are to be removed there, too.

        Raises:
            StorageError: A tier cannot be reached.
        """
        remote = [tier.open() for tier in self._remote]
        with self._mutex:
            self._deleted.update(steps)
            for tier in self._remote:
                for step in steps:
                    self._book.withdraw(tier.root, step)
            self._write_down()
        return remote

    @contextlib.contextmanager
    def exclusive(self) -> Generator[set[int]]:
        """Exclusive access to the first tier's steps, for removals and late metrics.

        Yields:
            The steps that must not be removed yet.
        """
        with self._alone:
            with self._mutex:
                promised = {step for steps in self._book.promised.values() for step in steps}
                for tier in self._remote:
                    promised.update(self._undecided(tier))
            yield promised

    def held_elsewhere(self) -> list[int]:
        """The steps that other tiers hold, and say so now."""
        found: set[int] = set()
        for remote in self._local.remote:
            held = {(info.step, info.time) for info in remote.infos}
            steps = [info.step for info in self._local.infos if (info.step, info.time) in held]
            with contextlib.suppress(errors.CheckpointError):  # it cannot be asked now
                for step in steps:
                    if remote.commits.is_committed(remote.path(step)):
                        found.add(step)
        return sorted(found)

    def wait(self) -> None:
        """Waits until everything promised has arrived, or something has failed for good."""
        self.recorded()  # an evaluator beside this process may have
        with self._mutex:
            while self._error is None and not self._is_idle():
                self._mutex.wait(0.5)

    def raise_error(self) -> None:
        """Raises, once, why a tier has waited for longer than it may."""
        with self._mutex:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for running uploads; failed ones resume when the directory is next opened."""
        with self._mutex:
            self._closing = True
            self._mutex.notify_all()
            while not self._is_idle():
                self._mutex.wait(0.5)
        self.release()

    def release(self) -> None:
        """Lets other writers into the tiers."""
        with self._mutex:
            self._closing = self._is_released = True
            self._mutex.notify_all()
        for tier in self._remote:
            tier.release()

    def _is_idle(self) -> bool:
        return not self._num_arriving and all(
            not self._pending(tier) or (self._closing and tier.root in self._failed)
            for tier in self._remote
        )

    # ---------------------------------------------------------------------------- promises

    def _take_over(self, tier: RemoteTier, steps: Steps) -> Lock:
        """Becomes the tier's writer, and decides on its steps."""
        commit.makedirs_durable(steps.storage, steps.hidden)
        lock = steps.storage.lock(os.path.join(steps.hidden, "lock"))
        try:
            steps.reload()
            with self._mutex:
                for info in self._local.infos:
                    self._consider(tier, steps, info)
                promised = self._book.promised[tier.root]
                names = {os.path.basename(self._local.path(step)) for step in promised}
            for line in steps.commits.recover(keep=names):
                _log.warning("%s: %s", steps.root, line)
            steps.reload()
            with self._mutex:
                self._promise_metrics_to(tier, steps, self._local.with_late_metrics())
                self._write_down()
                self._mutex.notify_all()
        except BaseException:
            lock.release()
            raise
        return lock

    def _consider(self, tier: RemoteTier, steps: Steps | None, info: StepInfo) -> None:
        """Decides whether a tier gets a step; later, if only the reachable tier can decide."""
        if info.step in self._book.decided[tier.root]:
            return
        wanted = True if tier.rule is None else tier.rule.decide_step(info.step)
        if wanted is None and self._book.was_damaged:
            wanted = True  # it may have been promised
        if wanted is None and steps is None:
            return
        if wanted is None and steps is not None and tier.rule is not None:
            wanted = self._is_wanted(tier.root, tier.rule, steps, info)
        self._book.decided[tier.root].append(info.step)
        if wanted:
            self._book.promise(tier.root, info.step)

    def _is_wanted(self, root: str, rule: rules.SaveRule, steps: Steps, info: StepInfo) -> bool:
        promised = self._book.promised[root]
        known = {each.step: each for each in self._local.infos if each.step in promised}
        known |= {each.step: each for each in steps.infos}
        known.pop(info.step, None)
        line = lines.line_of(info)
        history = [known[step] for step in sorted(known) if line.holds(known[step])]
        return rules.decide_save(rule, info, history, context=SaveContext()) is not None

    def _promise_metrics(self) -> bool:
        """Promises steps again whose metrics are not where their copies are; whether there are."""
        infos = self._local.with_late_metrics()
        found = [
            self._promise_metrics_to(tier, tier.steps, infos)
            for tier in self._remote
            if tier.steps is not None
        ]
        return any(found)

    def _promise_metrics_to(
        self, tier: RemoteTier, steps: Steps, infos: Sequence[StepInfo]
    ) -> bool:
        held = {(info.step, info.time): info for info in steps.infos}
        found = False
        for info in infos:
            copy = held.get((info.step, info.time))
            if copy is not None and lacks_metrics(copy, info):
                found = self._book.promise(tier.root, info.step) or found
        return found

    def _undecided(self, tier: RemoteTier) -> set[int]:
        """Steps that a tier may want, which could not be asked yet."""
        decided = self._book.decided[tier.root]
        return {info.step for info in self._local.infos if info.step not in decided}

    def _pending(self, tier: RemoteTier) -> set[int]:
        """The pending steps of a tier."""
        promised = set(self._book.promised[tier.root]) - self._refused[tier.root]
        return promised | (self._undecided(tier) if tier.steps is None else set())

    @contextlib.contextmanager
    def _reporting(self) -> Generator[None]:
        """In an upload's thread: the manager's next call raises what fails here.

        If the record cannot be written, it lists too many pending steps: an uploaded step is
            checked again.
        """
        try:
            yield
        except errors.CheckpointError as error:
            _log.warning("%s: after an upload: %s", self._local.root, error)
            self._error = errors.SaveError(
                f"A step was copied, but a later action failed: {error}", path=self._local.root
            )
            self._error.__cause__ = error

    def _write_down(self) -> None:
        self._book.write(info.step for info in self._local.infos)

    # ---------------------------------------------------------------------------- the work

    def _work(self, tier: RemoteTier) -> None:
        """Uploads the pending steps of one tier, the oldest first, until the end."""
        wait, since = _FIRST_WAIT_SECONDS, None
        while True:
            step: int | None = None
            commit_time: datetime.datetime | None = None
            try:
                steps = tier.open()
                if (step := self._next(tier)) is None:
                    return
                commit_time = self._commit_time(step)
                self._deliver(tier, steps, step)
            except Exception as error:  # noqa: BLE001 - a warning, or raised when it is too late
                since = since or time.monotonic()
                if step is None or self._commit_time(step) == commit_time:
                    self._fail(tier, step, error, time.monotonic() - since)
                if self._closing:
                    return
                self._sleep(wait)
                wait = min(2 * wait, _LAST_WAIT_SECONDS)
            else:
                wait, since = _FIRST_WAIT_SECONDS, None
                with self._mutex:
                    if self._commit_time(step) == commit_time:  # it was not overwritten
                        self._book.withdraw(tier.root, step)
                    with self._reporting():
                        self._promise_metrics()  # recorded while it was on its way
                        self._write_down()
                    self._num_arriving += 1
                try:
                    with self._reporting():
                        self.on_arrived()
                finally:
                    with self._mutex:
                        self._num_arriving -= 1
                        self._mutex.notify_all()

    def _commit_time(self, step: int) -> datetime.datetime | None:
        """Which commit of a step the first tier holds."""
        return next((each.time for each in self._local.infos if each.step == step), None)

    def _sleep(self, seconds: float) -> None:
        """Waits before the next attempt; no longer than until the manager is closed."""
        deadline = time.monotonic() + seconds
        with self._mutex:
            while not self._closing and (left := deadline - time.monotonic()) > 0:
                self._mutex.wait(left)

    def _next(self, tier: RemoteTier) -> int | None:
        with self._mutex:
            while not self._is_released:
                refused = self._refused[tier.root]
                for step in self._book.promised[tier.root]:
                    if step not in refused:
                        return step
                if self._closing:
                    return None
                self._mutex.wait()
            return None

    def _fail(
        self, tier: RemoteTier, step: int | None, error: Exception, late_seconds: float
    ) -> None:
        root = tier.root
        with self._mutex:
            if self._closing:
                self._failed.add(root)
            if isinstance(error, errors.ClosedError):
                return
            what = "it" if step is None else f"step {step}"
            _log.warning("Upload of %s to %s failed, retrying: %s", what, root, error)
            if self._closing:
                _log.warning("%s: the upload will resume when the manager is next opened", root)
            is_damaged = isinstance(error, errors.CorruptCheckpointError)
            is_refused = isinstance(error, errors.StepExistsError)
            if is_damaged and step is not None:
                self._book.withdraw(root, step)  # never, and others are waiting behind it
                with self._reporting():
                    self._write_down()
            if is_refused and step is not None:
                self._refused[root].add(step)  # it stays promised, so it is not pruned
            is_late = tier.max_delay_seconds is not None and late_seconds >= tier.max_delay_seconds
            is_final = is_damaged or is_refused or is_late or isinstance(error, errors.LockedError)
            if is_final and (root, step) not in self._reported:
                self._reported.add((root, step))
                text = "Steps" if step is None else f"Step {step}"
                self._error = errors.SaveError(
                    f"{text} cannot be copied to {root}: {error}", step=step, path=root
                )
                self._error.__cause__ = error
            self._mutex.notify_all()

    def _deliver(self, tier: RemoteTier, remote: Steps, step: int) -> None:
        source = self._local.path(step)
        if not self._local.commits.is_committed(source):
            return  # deleted by the user in the meantime
        final = os.path.join(remote.root, os.path.basename(source))
        with self._mutex:
            may_replace = self._overwrite or step in self._book.replacing[tier.root]
        started = time.monotonic()
        upload = Upload(self._local, remote, source, final, step, may_replace=may_replace)
        num_bytes = upload.run()
        is_new = True  # else it was there, and metrics of it are new
        for info in (each for each in self._local.infos if each.step == step):
            is_new = all((each.step, each.time) != (step, info.time) for each in remote.infos)
            remote.remember(info)
            remote.forget_late_metrics(step)
            late, there = self._local.recorded(step), remote.recorded(step)
            if new := {name: late[name] for name in late if lacks(there, name, late[name])}:
                remote.record(step, new)
            if late:
                known = {**(info.metrics or {}), **there, **late}
                remote.remember(dataclasses.replace(info, metrics=known))
        remote.update_latest_link()
        if step in self._deleted:
            remote.delete(step)
            return
        if is_new:
            _report(remote, step, max(time.monotonic() - started, 1e-9), num_bytes)
        self._prune(tier, remote, step)

    def _prune(self, tier: RemoteTier, remote: Steps, arrived: int) -> None:
        """Prunes the tier by its policies; never the step that was just uploaded."""
        if not tier.keep:
            return
        known, now = remote.with_late_metrics(), datetime.datetime.now(datetime.UTC)
        context = KeepContext(now=now)
        doomed = rules.steps_to_prune_after(arrived, tier.keep, known, context=context)
        for step, error in remote.prune(doomed).items():
            _log.warning("step %d cannot be removed from %s: %s", step, remote.root, error)
            with self._mutex:
                if (remote.root, step) not in self._reported:
                    self._reported.add((remote.root, step))
                    self._error = errors.SaveError(
                        f"Step {arrived} is in {remote.root}, but step {step} cannot be removed "
                        f"from there: {error}",
                        step=step,
                        path=remote.root,
                    )
                    self._error.__cause__ = error


def _report(remote: Steps, step: int, seconds: float, num_bytes: int) -> None:
    rate = num_bytes / 2**20 / seconds
    _log.info("step %d is in %s: %.1f MiB/s", step, remote.root, rate)
    remote.emit("uploaded", step, seconds=seconds, num_bytes=num_bytes)
