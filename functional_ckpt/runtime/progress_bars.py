"""Progress bars on a terminal or in a notebook: bytes, rate and remaining time."""

from __future__ import annotations

import contextlib
import html
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
    """Shows a bar during the work, on standard error if that is a terminal, or in a notebook.

    Bars of several threads share one display on a terminal.
    """
    if _is_notebook():
        with _notebook_bar(title) as shown:
            yield shown
        return
    if sys.stderr is None or not sys.stderr.isatty():  # pyright: ignore[reportUnnecessaryComparison]
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


def _is_notebook() -> bool:
    found = sys.modules.get("IPython")
    return found is not None and hasattr(found.get_ipython(), "kernel")


@contextlib.contextmanager
def _notebook_bar(title: str) -> Generator[Shown]:
    """Shows a bar as HTML, which needs no widgets; it is updated for each per cent."""
    from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

    percent = 0
    handle = display(HTML(_html(title, 0)), display_id=True)

    def show(done: int, total: int) -> None:
        nonlocal percent
        now = 100 * done // max(1, total)
        if now != percent:
            percent = now
            handle.update(HTML(_html(title, percent)))

    try:
        yield show
    finally:
        handle.update(HTML(""))


def _html(title: str, percent: int) -> str:
    return f"{html.escape(title)} <progress max=100 value={percent}></progress> {percent} %"


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
