"""Work on a few plain threads, and on many small records."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

_NUM_THREADS = 2
_LOOK_SECONDS = 0.002


def num_spare_cores() -> int:
    """Returns the number of cores left by a program that computes on one; at least one."""
    return max(1, (os.cpu_count() or 1) - 1)


def run_in_threads(tasks: Sequence[Callable[[], None]], num_threads: int = _NUM_THREADS) -> None:
    """Runs every task; raises the first error after all threads have stopped.

    Plain threads, because executors refuse work while the interpreter shuts down, when the last
    commit of a program may still be under way. An interruption (Ctrl-C) is raised after them too:
    their memory may be the caller's, or used again by the next save.
    """
    if len(tasks) < 2:
        for task in tasks:
            task()
        return
    pending: Iterator[Callable[[], None]] = iter(tasks)
    lock = threading.Lock()
    failures: list[BaseException] = []
    busy: set[int] = set()  # threads that run a task

    def work() -> None:
        thread = threading.get_ident()
        while True:
            with lock:
                task = None if failures else next(pending, None)
                if task is None:
                    return
                busy.add(thread)
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - handed to the caller below
                failures.append(error)
            finally:
                busy.discard(thread)

    try:
        threads: list[threading.Thread] = []
        for _ in range(min(num_threads, len(tasks)) - 1):
            thread = threading.Thread(target=work)
            try:
                thread.start()
            except RuntimeError:  # from Python 3.12 on, none starts while the interpreter ends
                break
            threads.append(thread)
        work()
        for thread in threads:
            thread.join()
    except BaseException as error:  # noqa: BLE001 - an interruption, raised below
        failures.append(error)
    if failures:
        _wait_for_tasks(lock, busy, failures)
        raise failures[0]


def _wait_for_tasks(lock: threading.Lock, busy: set[int], failures: list[BaseException]) -> None:
    """Waits for the tasks that other threads run, however often that is interrupted.

    A `join` that was interrupted takes a thread for ended that is not.
    """
    while True:
        try:
            with lock:  # threads that take a task from now on see the failure
                others = busy - {threading.get_ident()}
            if not others:
                return
            time.sleep(_LOOK_SECONDS)
        except BaseException as error:  # noqa: BLE001 - an interruption, for the caller to raise
            failures.append(error)


def run_apart(call: Callable[[], None]) -> None:
    """Runs a call in a thread of its own. The program ends after it."""
    try:
        threading.Thread(target=call).start()
    except RuntimeError:  # from Python 3.12 on, no thread starts while the interpreter ends
        call()


class BackgroundWriter:
    """Makes calls in a separate thread, one after the other, without blocking the caller.

    Use it from one thread, and close it.

    Args:
        max_calls: How many may be under way: one that is being made, and others that wait for it.
    """

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._num_under_way = 0
        self._thread: threading.Thread | None = threading.Thread(target=self._work)
        try:
            self._thread.start()
        except RuntimeError:  # from Python 3.12 on, no thread starts while the interpreter ends
            self._thread = None

    def run(self, call: Callable[[], None]) -> None:
        """Enqueues a call, waiting while the queue is full; raises the error of an earlier call."""
        if self._thread is None:
            call()
            return
        while self._num_under_way >= self._max_calls:
            self._wait_for_one()
        self._num_under_way += 1
        self._calls.put(call)

    def wait(self) -> None:
        """Waits for the last call; raises the error of a call."""
        while self._num_under_way:
            self._wait_for_one()

    def _wait_for_one(self) -> None:
        self._num_under_way -= 1
        failure = self._results.get()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Ends the thread after the current call, whose errors are dropped."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException as failure:  # noqa: BLE001 - raised where it is waited for
                self._results.put(failure)
            else:
                self._results.put(None)


_pausing = threading.Lock()
_num_pauses = 0
_was_enabled = False


@contextlib.contextmanager
def gc_paused() -> Generator[None]:
    """Pauses Python's cycle collector while tens of thousands of records are made.

    None of the records is garbage, but each collection scans every object of the program: up to
    half of the time of a save of many small leaves. For work of milliseconds only.
    """
    global _num_pauses, _was_enabled
    with _pausing:
        if _num_pauses == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _num_pauses += 1
    try:
        yield
    finally:
        with _pausing:
            _num_pauses -= 1
            if _num_pauses == 0 and _was_enabled:
                gc.enable()
