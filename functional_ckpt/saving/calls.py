"""Serializes the calls of a manager: other threads wait, and nested calls are refused.

A manager has one staging memory, one running commit and one sequence of collectives. Two concurrent
saves would mix their steps.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Generator
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

from functional_ckpt import errors

_P = ParamSpec("_P")
_T = TypeVar("_T")


class NotCopied:
    """An object that cannot be copied or pickled, since it has locks and threads."""

    def __reduce__(self) -> NoReturn:
        """Raises `UsageError`."""
        raise errors.UsageError(
            f"A {type(self).__name__} cannot be copied or pickled: it belongs to its process."
        )


class Calls:
    """The running call of a manager, and the checks before each call.

    Args:
        path: The manager's directory, for messages.
        is_background: Returns whether the current thread runs a commit or a listener of the
            manager.
    """

    def __init__(self, path: str, is_background: Callable[[], bool]) -> None:
        self._path = path
        self._is_background = is_background
        self._pid = os.getpid()
        self._is_closed = False
        # Reentrant: a signal handler may run between taking it and setting `_thread`, and its call
        # then comes before the interrupted one.
        self._turn = threading.RLock()
        self._thread: int | None = None
        self._name = ""

    @property
    def is_over(self) -> bool:
        """Whether the manager was closed, or belongs to another process."""
        return self._is_closed or os.getpid() != self._pid

    def close(self) -> None:
        """Refuses all later calls."""
        self._is_closed = True

    def check_process(self) -> None:
        """Raises `ForkedError` in a forked child."""
        if os.getpid() != self._pid:
            raise errors.ForkedError(
                "This CheckpointManager belongs to the parent process; make one in the child "
                "(start it with the spawn method), or save from the parent.",
                path=self._path,
            )

    def check_usable(self) -> None:
        """Raises `ForkedError` in a forked child and `ClosedError` after `close`."""
        self.check_process()
        if self._is_closed:
            raise errors.ClosedError("This CheckpointManager was closed.", path=self._path)

    def check_not_within(self, name: str) -> None:
        """Raises `UsageError` for a nested call, which would wait for itself."""
        if self._thread == threading.get_ident():
            raise errors.UsageError(
                f"CheckpointManager.{name} was called while {self._name} of the same manager was "
                "running on the same thread: by a signal handler, a listener (on_event) or a "
                "state_dict method. Set a flag there, and make the call from the training loop.",
                path=self._path,
            )
        if self._is_background():
            raise errors.UsageError(
                f"CheckpointManager.{name} was called by a listener (on_event) or a policy of the "
                "same manager, on the thread that commits: it would wait for itself. Set a flag "
                "there, and make the call from the training loop.",
                path=self._path,
            )

    @contextlib.contextmanager
    def turn(self, name: str) -> Generator[None]:
        """Runs one call; calls of other threads wait.

        Raises:
            UsageError: It was made within another call of the same manager.
        """
        self.check_not_within(name)
        with self._turn:
            self._thread, self._name = threading.get_ident(), name
            try:
                yield
            finally:
                self._thread = None


def exclusive(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorates a manager's method: it runs alone, and only while the manager is usable."""

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        calls: Calls = cast("Any", args[0])._calls
        calls.check_usable()
        with calls.turn(cast("Any", method).__name__):
            calls.check_usable()  # it may have been closed meanwhile
            return method(*args, **kwargs)

    return call
