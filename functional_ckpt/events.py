"""Events: one record per change of a step, for listeners.

A listener is any callable that takes an `Event`. It is called at once, in the thread in which the
step got that far: it must be quick, may be called from several threads at a time, and must not call
the manager, which may be waiting for it. Its errors are logged; a save never fails for them.
`KeyboardInterrupt` and `SystemExit` are raised by `save` where they come at `staged`, once the
commit has started.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import datetime
import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, get_args

from functional_ckpt import errors

__all__ = ["Event", "Events", "Kind", "Listener", "Listeners", "ShowsBars"]

Shown: TypeAlias = Callable[[int, int], None]
"""Shows progress: bytes that are done, and bytes in all."""
Kind: TypeAlias = Literal[
    "staged",
    "written",
    "committed",
    "replicated",
    "unreplicated",
    "uploaded",
    "pruned",
    "skipped",
    "restored",
]

_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A change of a step.

    Attributes:
        kind: `staged`: this rank's part was copied, and `save` is about to return; `written`: this
            rank's part is in storage; `committed`: the step is complete and durable; `replicated`:
            other nodes hold verified copies of it; `unreplicated`: they could not get them, so the
            loss of a node may lose it; `uploaded`: a remote tier has it; `pruned`: it was removed,
            because no policy keeps it or to free space; `skipped`: it is damaged, and `restore_or`
            tried an older one; `restored`: the ranks have restored it from a node-local tier. Only
            the primary emits the kinds from `committed` on.
        step: Its number.
        directory: The directory of the manager, or of a remote tier.
        rank: The rank that emits the event, within the group that saves together.
        seconds: The duration; of `committed`, since `save` was called. None: not measured.
        num_bytes: Bytes of arrays staged or written by this rank, or bytes sent. None: not
            measured.
        path: The directory of the step; None before it is committed.
        metrics: The metrics saved with a `committed` step, or None.
        sources: Of `restored`, the bytes that all ranks got together, by where they were read:
            `own`, on the own node; `others`, on other nodes; `tiers`, in remote tiers.
        time: The end of the change, UTC.
    """

    kind: Kind
    step: int
    directory: str
    rank: int = 0
    seconds: float | None = None
    num_bytes: int | None = None
    path: str | None = None
    metrics: Mapping[str, Any] | None = None
    sources: Mapping[str, int] | None = None
    time: datetime.datetime = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC)
    )

    def __post_init__(self) -> None:
        """Raises UsageError for an unknown kind, and for negative amounts."""
        if self.kind not in get_args(Kind):
            raise errors.UsageError(f"kind must be one of {get_args(Kind)}; got {self.kind!r}.")
        for name in ("seconds", "num_bytes"):
            amount = getattr(self, name)
            if amount is not None and not amount >= 0:
                raise errors.UsageError(f"{name} must be None or >= 0; got {amount!r}.")

    def __repr__(self) -> str:
        return f"<Event: {self}>"

    def __str__(self) -> str:
        """Returns the event as a line of a log."""
        ends = {"pruned": "from", "restored": "from", "uploaded": "to", "written": "to"}
        where = ends.get(self.kind, "in")
        text = f"step {self.step} {self.kind}"
        if self.kind != "staged":
            text += f" {where} {self.directory}"
        if self.num_bytes is not None:
            power = min(3, max(0, self.num_bytes.bit_length() - 1) // 10)
            unit = ("B", "KiB", "MiB", "GiB")[power]
            text += f", {self.num_bytes / 2 ** (10 * power):.{min(1, power)}f} {unit}"
        if self.seconds is not None:
            text += f", {self.seconds:.3f} s"
        return text


class Tally:
    """Adds up the bytes of several threads, and shows each per cent of the progress.

    Args:
        show: Shows it, if there is a bar.
        done_bytes: Bytes that were done before.
        total_bytes: Bytes in all.
    """

    def __init__(self, show: Shown | None, done_bytes: int, total_bytes: int) -> None:
        self._show = show
        self._done_bytes, self._total_bytes = done_bytes, total_bytes
        self._percent = -1
        self._mutex = threading.Lock()
        self.add(0)

    def add(self, num_bytes: int) -> None:
        """Adds bytes that are done; any thread may call it."""
        if self._show is None:
            return
        with self._mutex:
            self._done_bytes += num_bytes
            percent = 100 * self._done_bytes // max(1, self._total_bytes)
            if percent > self._percent:
                self._percent = percent
                self._show(self._done_bytes, self._total_bytes)


class Listener(Protocol):
    """An event listener."""

    def __call__(self, event: Event, /) -> object:
        """Takes note of it, quickly; may be called from several threads at a time."""
        ...


class ShowsBars(abc.ABC):
    """A listener that shows a progress bar for each save, restore and upload in progress."""

    @abc.abstractmethod
    def bar(self, title: str) -> contextlib.AbstractContextManager[Shown]:
        """Returns a bar that is there while the work lasts."""

    @abc.abstractmethod
    def __call__(self, event: Event, /) -> object:
        """Takes an event, as every listener does."""


Listeners: TypeAlias = Listener | Sequence[Listener]


class Events:
    """Notifies listeners of events.

    Args:
        listeners: One or several; None for none.

    Attributes:
        rank: Of this process, among those that save together.

    Raises:
        UsageError: One of them cannot be called.
    """

    def __init__(self, listeners: Listeners | None = None) -> None:
        several = isinstance(listeners, Sequence)
        self._listeners: tuple[Listener, ...] = (
            () if listeners is None else tuple(listeners) if several else (listeners,)
        )
        self.rank = 0
        self._threads: set[int] = set()
        for each in self._listeners:
            if not callable(each):
                raise errors.UsageError(
                    "on_event must be a callable taking an Event, or a list of callables; "
                    f"got {each!r:.80}."
                )

    def notify(
        self,
        kind: Kind,
        step: int,
        directory: str,
        *,
        seconds: float | None = None,
        num_bytes: int | None = None,
        path: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        sources: Mapping[str, int] | None = None,
    ) -> None:
        """Notifies every listener, and logs their errors.

        Raises:
            BaseException: A listener was interrupted (Ctrl-C, `sys.exit`) at `staged`, which is on
                the caller's own thread.
        """
        if not self._listeners:
            return
        event = Event(
            kind=kind,
            step=step,
            directory=directory,
            rank=self.rank,
            seconds=None if seconds is None else max(0.0, seconds),
            num_bytes=num_bytes,
            path=path,
            metrics=metrics,
            sources=sources,
        )
        interruption = self._call_all(event)
        if interruption is not None and kind == "staged":
            raise interruption

    @contextlib.contextmanager
    def bar(self, title: str) -> Generator[Shown | None]:
        """Shows a progress bar, on the primary, if a listener shows some; else yields None.

        Errors of the bar, such as a terminal that is gone, are logged and end it.
        """
        shows = [each for each in self._listeners if isinstance(each, ShowsBars)]
        if not shows or self.rank:
            yield None
            return
        shown: list[Shown] = []

        def show(done: int, total: int) -> None:
            with _logged(title, shown):
                for each in shown:
                    each(done, total)

        bar = contextlib.ExitStack()
        with _logged(title, shown):
            shown.append(bar.enter_context(shows[0].bar(title)))
        try:
            yield show
        finally:
            with _logged(title, shown):
                bar.close()

    def is_telling(self) -> bool:
        """Returns whether the current thread is calling a listener."""
        return threading.get_ident() in self._threads

    def _call_all(self, event: Event) -> BaseException | None:
        """Calls every listener; returns the exception that interrupted one, if any."""
        interruption: BaseException | None = None
        thread = threading.get_ident()
        is_outermost = thread not in self._threads
        self._threads.add(thread)
        try:
            for each in self._listeners:
                try:
                    each(event)
                except Exception:  # noqa: BLE001 - logged: no save fails for its listeners
                    _log.exception("a listener of on_event failed at: %s", event)
                except BaseException as error:  # noqa: BLE001 - raised where the caller is
                    _log.warning("a listener of on_event was interrupted at: %s", event)
                    interruption = interruption or error
        finally:
            if is_outermost:
                self._threads.discard(thread)
        return interruption


@contextlib.contextmanager
def _logged(title: str, shown: list[Shown]) -> Generator[None]:
    """Logs an error of a progress bar, which shows nothing more."""
    try:
        yield
    except Exception:  # noqa: BLE001 - logged: no save fails for its listeners
        shown.clear()
        _log.exception("the progress bar failed: %s", title)
