"""The shared state of a run's upload threads: promises, failures, and the end of the run.

It has no reference to steps or listeners. The threads hold it while they wait, and must not keep a
manager alive that the program has dropped.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Generator, Iterable

from functional_ckpt import errors
from functional_ckpt.steps.promises import Promises
from functional_ckpt.steps.writer_lock import WriterLock


class _Phase(enum.IntEnum):
    """How long the threads continue."""

    RUNNING = 0
    DRAINING = 1
    """Until everything promised was uploaded, or failed once."""
    STOPPING = 2
    """Until the present upload is over."""


class UploadQueue:
    """The shared state of the upload threads. Safe to use from any thread.

    The threads write in the first tier too, under `local_lock`.

    Attributes:
        mutex: Guards the promises and this object; notified of every change.
        locks: The locks of the tiers that were opened.
        deleted: Steps that the user deletes.
        refused: By tier: promised steps that cannot be uploaded while this process lives.
        waiting: By tier: promised steps with a file that no node can send; see `retry`.
    """

    def __init__(self, book: Promises, roots: Iterable[str], local_lock: WriterLock | None) -> None:
        self.mutex = threading.Condition(threading.RLock())
        self.book = book
        self.locks: list[WriterLock] = []
        self.deleted: set[int] = set()
        self.refused: dict[str, set[int]] = {root: set() for root in roots}
        self.waiting: dict[str, set[int]] = {root: set() for root in self.refused}
        self._local_lock = local_lock
        self._token = None if local_lock is None else local_lock.enter()
        self._unopened = set(self.refused)
        self._failed: set[str] = set()
        self._reported: set[tuple[str, int | None]] = set()
        self._error: errors.CheckpointError | None = None
        self._num_threads = 0
        self._num_arriving = 0  # uploads whose consequences are still under way
        self._phase = _Phase.RUNNING

    # ---------------------------------------------------------------------------- the threads'

    def start(self, serve: Callable[[], None]) -> None:
        """Starts an upload thread, which calls `leave` at its end."""
        with self.mutex:
            self._num_threads += 1
        try:
            threading.Thread(target=serve, name="upload", daemon=True).start()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Ends a thread; the last one of a dropped manager releases the locks."""
        with self.mutex:
            self._num_threads -= 1
            is_over = not self._num_threads and self._phase is _Phase.STOPPING
        if is_over:
            self.release_locks()

    def opened(self, root: str, lock: WriterLock) -> None:
        """Registers the lock of a tier that was opened."""
        with self.mutex:
            self.locks.append(lock)
            self._unopened.discard(root)
            self.mutex.notify_all()

    def wait_for_work(self, root: str) -> bool:
        """Waits until a tier must be opened or a step uploaded; returns False at the end."""
        with self.mutex:
            while self._phase is not _Phase.STOPPING:
                if root in self._unopened or self.next(root) is not None:
                    return True
                if self._phase is _Phase.DRAINING:
                    return False
                self.mutex.wait()
            return False

    def next(self, root: str, *, but: int | None = None) -> int | None:
        """Returns the oldest promised step that can be uploaded, apart from one."""
        with self.mutex:
            skipped = self.refused[root] | self.waiting[root]
            steps = self.book.promised[root]
            return next((step for step in steps if step not in skipped and step != but), None)

    def retry(self, _: int = 0) -> None:
        """Tries steps again that no node could send: other files may be on the nodes now."""
        with self.mutex:
            for steps in self.waiting.values():
                steps.clear()
            self.mutex.notify_all()

    def sleep(self, seconds: float) -> None:
        """Waits before the next attempt, or until the run ends."""
        deadline = time.monotonic() + seconds
        with self.mutex:
            while not self.is_closing and (left := deadline - time.monotonic()) > 0:
                self.mutex.wait(left)

    @contextlib.contextmanager
    def arriving(self) -> Generator[None]:
        """Delays `wait` until the actions after an upload are complete."""
        with self.mutex:
            self._num_arriving += 1
        try:
            yield
        finally:
            with self.mutex:
                self._num_arriving -= 1
                self.mutex.notify_all()

    # ---------------------------------------------------------------------------- failures

    def fail(self, root: str) -> bool:
        """Counts a failed attempt; returns whether it was the last one because the run ends."""
        with self.mutex:
            if self.is_closing:
                self._failed.add(root)
            self.mutex.notify_all()
            return self.is_closing

    def report(self, error: errors.CheckpointError, cause: BaseException) -> None:
        """Keeps an error for the manager's next call to raise."""
        error.__cause__ = cause
        with self.mutex:
            self._error = error
            self.mutex.notify_all()

    def report_once(self, root: str, step: int | None, message: str, cause: BaseException) -> None:
        """As `report`, once for a step of a tier."""
        with self.mutex:
            if (root, step) not in self._reported:
                self._reported.add((root, step))
                self.report(errors.SaveError(message, step=step, path=root), cause)

    def raise_error(self) -> None:
        """Raises a reported error, once."""
        with self.mutex:
            error, self._error = self._error, None
        if error is not None:
            raise error

    # ---------------------------------------------------------------------------- the end

    @property
    def is_closing(self) -> bool:
        """Whether the run ends."""
        return self._phase is not _Phase.RUNNING

    def wait_until_idle(self, is_pending: Callable[[str], bool], *, raises: bool) -> None:
        """Waits until nothing is pending.

        Args:
            is_pending: Returns whether a tier still waits for a step.
            raises: Whether to return once there is an error to raise.
        """
        with self.mutex:
            while not (raises and self._error is not None) and (
                self._num_arriving
                or any(
                    is_pending(root) and not (self.is_closing and root in self._failed)
                    for root in self.refused
                )
            ):
                self.mutex.wait(0.5)

    def drain(self) -> None:
        """Ends the threads once each promised upload is complete or has failed."""
        self._advance(_Phase.DRAINING)

    def stop(self) -> None:
        """Ends the threads after the present uploads."""
        self._advance(_Phase.STOPPING)
        if not self._num_threads:
            self.release_locks()

    def _advance(self, phase: _Phase) -> None:
        with self.mutex:
            self._phase = max(self._phase, phase)
            self.mutex.notify_all()

    def abandon(self) -> None:
        """Stops for a manager that was dropped; its finalizer calls this, and may not wait."""
        if self._phase is _Phase.STOPPING:
            return
        for lock in list(self.locks):
            lock.is_abandoned = True
        # At the end of the interpreter no thread starts, and the kernel releases the locks.
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self.stop, name="stop-uploads", daemon=True).start()

    def release_locks(self) -> None:
        """Lets other writers into the tiers; safe to call twice."""
        for lock in list(self.locks):
            lock.release()
        if self._local_lock is not None and self._token is not None:
            self._local_lock.leave(self._token)
