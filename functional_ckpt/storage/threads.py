"""Work on a few plain threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

__all__ = ["run_in_threads"]

_NUM_THREADS = 2


def run_in_threads(tasks: Sequence[Callable[[], None]], num_threads: int = _NUM_THREADS) -> None:
    """Runs every task; raises the first error after all threads have stopped.

    Plain threads, because executors refuse work while the interpreter shuts down, when the last
    commit of a program may still be under way.
    """
    if len(tasks) < 2:
        for task in tasks:
            task()
        return
    pending: Iterator[Callable[[], None]] = iter(tasks)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        while not failures:
            with lock:
                task = next(pending, None)
            if task is None:
                return
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - handed to the caller below
                failures.append(error)

    threads: list[threading.Thread] = []
    for _ in range(min(num_threads, len(tasks)) - 1):
        thread = threading.Thread(target=work)
        try:
            thread.start()
        except RuntimeError:  # from Python 3.12 on, no thread starts while the interpreter ends
            break
        threads.append(thread)
    work()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
