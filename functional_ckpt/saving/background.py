"""The background commit: its thread, its handle, and its error, which is raised once.

The thread is not a daemon. The interpreter waits for it at exit, so the last step of a program is
never lost.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent import futures

from functional_ckpt import errors
from functional_ckpt.saving.calls import NotCopied


class Commit(NotCopied):
    """A handle of a save that is being committed.

    Attributes:
        step: The step being saved.
    """

    def __init__(self, step: int, future: futures.Future[int]) -> None:
        self.step = step
        self._future = future
        self._pid = os.getpid()
        self.is_reported = False
        self.clean_up_error: errors.SaveError | None = None

    def done(self) -> bool:
        """Returns whether the commit is over, successful or not."""
        self._check_process()
        return self._future.done()

    def result(self, timeout: float | None = None) -> int:
        """Waits until the step is durable and returns its number.

        Args:
            timeout: Seconds to wait; None for as long as it takes.

        Raises:
            SaveError: The save failed; the step is not listed.
            TimeoutError: The commit is still running.
            ForkedError: This process was forked from the one that saves.
        """
        self._check_process()
        try:
            step = self._future.result(timeout)
        except errors.CheckpointError:
            self.is_reported = True
            raise
        return step

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits, and returns the error of the save, or None if it succeeded.

        A failure after the commit counts too, such as that of removing an old step. The step is
        durable then, and `result` returns its number.
        """
        self._check_process()
        error = self._future.exception(timeout) or self.clean_up_error
        self.is_reported = self.is_reported or error is not None
        return error

    def _check_process(self) -> None:
        """Raises `ForkedError` in a forked child: the commit thread belongs to the parent."""
        if os.getpid() != self._pid:
            raise errors.ForkedError(
                f"The save of step {self.step} belongs to the parent process, and its outcome is "
                "known only there; wait for it before forking, or start the child with the spawn "
                "method.",
                step=self.step,
            )

    def __repr__(self) -> str:
        if os.getpid() != self._pid:
            return f"<Commit of step {self.step}: of the parent process>"
        state = "under way"
        if self.done():
            state = "committed" if self._future.exception() is None else "failed"
        return f"<Commit of step {self.step}: {state}>"


class CommitThread:
    """Runs one commit at a time and keeps an error until it is reported."""

    def __init__(self) -> None:
        self._commit: Commit | None = None
        self._not_cleaned_up: Commit | None = None
        self._thread: int | None = None

    def is_current(self) -> bool:
        """Returns whether the current thread is the one that commits."""
        return self._thread == threading.get_ident()

    @property
    def is_busy(self) -> bool:
        """Whether a commit is running."""
        return self._commit is not None and not self._commit.done()

    @property
    def step(self) -> int | None:
        """The step that is being committed, or None."""
        return self._commit.step if self._commit is not None and not self._commit.done() else None

    def start(
        self, step: int, work: Callable[[], errors.SaveError | None], cancel: Callable[[], None]
    ) -> Commit:
        """Runs `work` in the background; no other commit may be running.

        Args:
            step: The step to commit.
            work: Commits it; returns the error of the clean-up afterwards, if any.
            cancel: Called if `work` will never run, because Ctrl-C interrupted the caller before
                the thread started.
        """
        future: futures.Future[int] = futures.Future()
        future.set_running_or_notify_cancel()
        # Taken by the thread, which then works, or by its canceller. `pop` is atomic.
        ticket = [step]

        def run() -> None:
            if not _take(ticket):
                return
            self._thread = threading.get_ident()
            try:
                commit.clean_up_error = work()
            except BaseException as error:  # noqa: BLE001 - reported by the next call, whatever it is
                # Reported errors are dropped: their tracebacks refer to the staged state.
                _failed[:] = [*(each for each in _failed if not each.is_reported), commit]
                self._thread = None
                future.set_exception(_as_save_error(step, error))
            else:
                if commit.clean_up_error is not None:
                    _failed[:] = [*(each for each in _failed if not each.is_reported), commit]
                self._thread = None
                future.set_result(step)

        commit = Commit(step, future)
        try:
            self._commit = commit
            thread = threading.Thread(target=run, name=f"commit-{step}", daemon=False)
            try:
                thread.start()
            except RuntimeError:  # from Python 3.12 on, no thread starts while the interpreter ends
                run()
            else:
                _threads.add(thread)
        except BaseException as error:
            if _take(ticket):
                future.set_exception(error)
                self._commit = None
                cancel()
            raise
        return commit

    def wait(self) -> None:
        """Waits for the running commit; `raise_error` raises its error."""
        commit = self._commit
        if commit is not None:
            futures.wait([commit._future])

    def raise_error(self) -> None:
        """Raises the error of a failed commit, once.

        Errors of a clean-up after a commit are raised too.
        """
        error = self.take_error()
        commit, self._not_cleaned_up = self._not_cleaned_up, None
        if error is None and commit is not None and not commit.is_reported:
            commit.is_reported = True
            error = commit.clean_up_error
        if error is not None:
            raise error

    def take_error(self) -> BaseException | None:
        """Returns the error of a failed commit, once, for the caller to raise.

        A failed clean-up after a commit does not prevent the next save: `raise_error` raises it.
        """
        commit = self._commit
        if commit is None or not commit.done():
            return None
        self._commit = None
        if commit.clean_up_error is not None:
            if self._not_cleaned_up is not None:
                self._not_cleaned_up.is_reported = True  # the newer one is raised instead
            self._not_cleaned_up = commit
        error = commit._future.exception()
        if error is None or commit.is_reported:
            return None
        commit.is_reported = True
        return error


def _take(ticket: list[int]) -> bool:
    """Takes the only ticket; returns False if another caller has taken it."""
    try:
        ticket.pop()
    except IndexError:
        return False
    return True


def _as_save_error(step: int, error: BaseException) -> errors.CheckpointError:
    if isinstance(error, errors.SaveError):
        return error
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    fate = "the step is not listed and older steps are intact"
    if isinstance(error, errors.CoordinationTimeoutError) and 0 in error.ranks:
        fate = (
            "whether the primary has committed it yet is not known here, and older steps are intact"
        )
    failure = errors.SaveError(
        f"Saving step {step} failed in the background; {fate}. {type(error).__name__}: {error}",
        step=step,
        path=path,
    )
    failure.__cause__ = error
    return failure


_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_failed: list[Commit] = []


# A forked child has neither the threads nor the failures: the parent reports them.
os.register_at_fork(after_in_child=_threads.clear)
os.register_at_fork(after_in_child=_failed.clear)


@atexit.register
def _report_at_exit() -> None:
    """Prints the errors that no later call could raise.

    The interpreter has waited for the commit threads by now, except for one that an exit handler
    started. It is joined, not only its commit: a thread that still frees tensors when the
    interpreter ends would abort the process.
    """
    for thread in list(_threads):
        thread.join()
    for commit in _failed:
        if not commit.is_reported:
            sys.stderr.write(f"functional_ckpt: {commit.exception()}\n")
