"""Uploads of committed steps to other tiers: promised, copied, verified, published.

Promises are recorded beside the steps before any is pruned, so that a restart resumes them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Generator, Sequence

from functional_ckpt import errors
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps import promises, writer_lock
from functional_ckpt.steps.promises import Promises
from functional_ckpt.steps.remote_tier import RemoteTier, open_reachable
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.steps.upload_choice import UploadChoice
from functional_ckpt.steps.upload_queue import UploadQueue
from functional_ckpt.steps.upload_shares import Shares
from functional_ckpt.steps.upload_worker import UploadWorker
from functional_ckpt.storage import commit

_log = logging.getLogger("functional_ckpt")


class Uploads:
    """The uploads from a first tier to others; on the primary of a writer.

    Args:
        local: The steps of the first tier.
        tiers: The other tiers.
        overwrite: Whether a step may replace another commit of its number.
        owner: The manager: when it is dropped, the uploads in progress finish, then the tiers are
            unlocked. Other promises are kept by the next manager.
        shares: Of each tier, how other nodes upload parts of the steps; empty on a single node.
    """

    def __init__(
        self,
        local: Steps,
        tiers: Sequence[RemoteTier],
        *,
        overwrite: bool,
        owner: object,
        shares: Sequence[Shares] = (),
    ) -> None:
        self._local = local
        self._tiers = tuple(tiers)
        roots = [tier.root for tier in tiers]
        path = os.path.join(local.hidden, promises.FILE)
        self._queue = UploadQueue(Promises(local.commits, path, roots), roots, local.lock)
        self._choice = UploadChoice(local, tiers, self._queue, overwrite=overwrite)
        self._shares = tuple(shares)
        self._workers = [
            UploadWorker(local, tier, self._queue, self._choice, own)
            for tier, own in itertools.zip_longest(tiers, shares)
        ]
        self._alone = threading.Lock()
        local.first.on_replicated = self._queue.retry
        weakref.finalize(owner, self._queue.abandon).atexit = False

    def begin(self) -> None:
        """Opens the tiers that can be reached, and resumes their uploads."""
        book = self._queue.book
        book.read()
        here = [info.step for info in self._local.infos]
        for tier in self._tiers:
            book.keep_only(tier.root, here)
            tier.acquire = self._take_over
        open_reachable(self._tiers)
        with self._queue.mutex:
            self._choice.write()
        for worker in self._workers:
            worker.start()

    def _take_over(self, tier: RemoteTier, steps: TierSteps) -> None:
        """Becomes the writer of a tier, and decides which steps to upload to it."""
        commit.makedirs_durable(steps.storage, steps.hidden)
        lock = writer_lock.take(steps.storage, os.path.join(steps.hidden, "lock"))
        steps.lock = lock
        try:
            steps.reload_local()
            with self._queue.mutex:
                for info in self._local.infos:
                    self._choice.consider(tier, steps, info)
                promised = self._queue.book.promised[tier.root]
                names = {os.path.basename(self._local.path(step)) for step in promised}
            for line in steps.commits.recover(keep=names):
                _log.warning("%s: %s", steps.root, line)
            steps.reload_local()
            with self._queue.mutex:
                self._choice.promise_metrics_to(tier, steps, self._local.with_late_metrics())
                self._choice.write()
                self._queue.opened(tier.root, lock)
        except BaseException:
            lock.release()
            raise

    def set_on_arrived(self, call: Callable[[], None]) -> None:
        """Calls a function whenever a step was uploaded, on any thread."""
        for worker in self._workers:
            worker.on_arrived = call

    def committed(self, info: StepInfo) -> None:
        """Promises a step that was committed to the tiers that want it."""
        with self._queue.mutex:
            self._choice.committed(info)
            self._choice.write()
            self._queue.retry()  # all nodes have taken part in the commit

    def recorded(self) -> None:
        """Promises metrics that were recorded, by any process, to the tiers that hold the steps."""
        with self._queue.mutex:
            if self._choice.promise_metrics():
                self._choice.write()
                self._queue.mutex.notify_all()

    def withdraw(self, steps: Sequence[int]) -> list[TierSteps]:
        """Withdraws the promises of steps that are being deleted.

        Returns:
            The tiers, all of them open: the steps are to be removed there, too.

        Raises:
            StorageError: A tier cannot be reached.
        """
        opened = [tier.open() for tier in self._tiers]
        with self._queue.mutex:
            self._queue.deleted.update(steps)
            for tier in self._tiers:
                for step in steps:
                    self._queue.book.withdraw(tier.root, step)
            self._choice.write()
        return opened

    @contextlib.contextmanager
    def exclusive(self) -> Generator[set[int]]:
        """Holds exclusive access to the first tier's steps, to remove them or record metrics.

        Yields:
            The steps that must not be removed yet.
        """
        with self._alone:
            with self._queue.mutex:
                pinned = self._choice.pinned()
            yield pinned

    def held_elsewhere(self) -> list[int]:
        """Returns the steps that other tiers hold, confirmed by their stores now."""
        found: set[int] = set()
        for remote in self._local.remote:
            held = {(info.step, info.time) for info in remote.infos}
            steps = [info.step for info in self._local.infos if (info.step, info.time) in held]
            with contextlib.suppress(errors.CheckpointError):  # out of reach
                for step in steps:
                    if remote.commits.is_committed(remote.path(step)):
                        found.add(step)
        return sorted(found)

    def wait(self) -> None:
        """Waits until each promised upload is complete, or there is an error to raise."""
        self.recorded()  # an evaluator beside this process may have
        self._queue.wait_until_idle(self._choice.is_pending, raises=True)

    def raise_error(self) -> None:
        """Raises, once, the error of an upload that is delayed for too long."""
        self._queue.raise_error()

    def close(self) -> None:
        """Waits for the uploads; a failed one resumes when the directory is next opened."""
        self._queue.drain()
        with contextlib.ExitStack() as beating:
            for each in self._shares:
                beating.enter_context(each.beating())  # the other nodes are closing too
            self._queue.wait_until_idle(self._choice.is_pending, raises=False)
        self.release()

    def release(self) -> None:
        """Releases the locks of the tiers."""
        self._queue.stop()
        for each in self._shares:
            each.close()
        for tier in self._tiers:
            tier.release()
        self._queue.release_locks()
