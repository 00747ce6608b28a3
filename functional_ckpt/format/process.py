"""Which process uses this package: after a fork, TensorStore would abort a child."""

from __future__ import annotations

import os

from functional_ckpt import errors

_user_pid: int | None = None


def check_process() -> None:
    """Refuses to save or restore in a forked process, whose threads are gone.

    Raises:
        ForkedError: This process was forked from one that had saved or restored.
    """
    global _user_pid
    if _user_pid is None:
        _user_pid = os.getpid()
    if _user_pid != os.getpid():
        raise errors.ForkedError(
            "This process was forked from one that had saved or restored a checkpoint, and cannot "
            "do so itself; start it with the spawn method, or save and restore in the parent."
        )
