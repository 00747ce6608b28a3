"""Progress bars on a terminal or in a notebook: bytes, rate and remaining time."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.progress import Progress

Shown: TypeAlias = Callable[[int, int], None]
"""Bytes that are done, and bytes in all."""


@contextlib.contextmanager
def bar(title: str) -> Generator[Shown]:
    """Shows a bar on standard error during the work, if that is a terminal.

    Bars of several threads share one display.
    """
    if not _is_seen():
        yield _ignore
        return
    board = _enter()
    task = board.add_task(title, total=None)
    try:
        yield lambda done, total: board.update(task, completed=done, total=total)
    finally:
        try:
            board.refresh()
            board.remove_task(task)
        finally:
            _leave(board)


def _is_seen() -> bool:
    if "ipykernel" in sys.modules:  # standard error of a notebook is no terminal
        return True
    return sys.stderr is not None and sys.stderr.isatty()  # pyright: ignore[reportUnnecessaryComparison]


def _ignore(done: int, total: int) -> None:
    """No-op progress callback."""


_mutex = threading.Lock()
_board: Progress | None = None
_num_bars = 0


def _enter() -> Progress:
    global _board, _num_bars
    from rich import progress
    from rich.console import Console

    with _mutex:
        if _board is None:
            columns = (
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.DownloadColumn(binary_units=True),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
            )
            board = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            board.start()
            _board = board
        _num_bars += 1
        return _board


def _leave(board: Progress) -> None:
    global _board, _num_bars
    with _mutex:
        _num_bars -= 1
        if _num_bars == 0:
            _board = None  # also if its terminal is gone
            board.stop()
