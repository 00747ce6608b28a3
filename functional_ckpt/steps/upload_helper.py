"""Uploads the share of a node, on its first rank: see `upload_shares`."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import Board
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.steps.remote_tier import RemoteTier
from functional_ckpt.steps.step_files import holds_file
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.steps.upload_shares import (
    BEAT_SECONDS,
    NUM_FILES,
    SILENT_SECONDS,
    Share,
    State,
    beat_key,
    state_key,
    task_key,
)

_LOOK_SECONDS = 0.25
# A share is withdrawn after `SILENT_SECONDS`: by then nothing is sent without another look.
_FRESH_SECONDS = SILENT_SECONDS / 2
# How long closing waits for a primary that uploads nothing.
_CLOSING_SECONDS = 30.0
_log = logging.getLogger("functional_ckpt")


class UploadHelper:
    """The thread of one tier that uploads this node's shares.

    Args:
        local: The steps of the first tier.
        tier: The tier.
        board: The board of the ranks.
        number: The ordinal number of the tier.
        rank: This rank.
    """

    def __init__(
        self, local: TierSteps, tier: RemoteTier, board: Board, number: int, rank: int
    ) -> None:
        self._local = local
        self._tier = tier
        self._board = board
        self._number = number
        self._state_key = state_key(number, rank)
        self._num_beats = 0
        self._is_closing = threading.Event()
        self._is_stopped = threading.Event()
        look = functools.partial(board.get, task_key(number, rank))
        args = (weakref.ref(self), look, self._is_stopped)
        self._thread = threading.Thread(target=_serve, args=args, name="upload-share", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns at once: the primary waits for all uploads."""

    def close(self) -> None:
        """Returns once the primary uploads nothing more; it may be closing too."""
        self._is_closing.set()
        self._thread.join()

    def stop(self) -> None:
        """Ends the thread after the present share."""
        self._is_stopped.set()

    def closing_sign(self) -> bytes | None:
        """Returns a value that changes while the primary uploads; None unless this rank closes."""
        return self._last_beat() if self._is_closing.is_set() else None

    def _last_beat(self) -> bytes | None:
        return self._board.get(beat_key(self._number))

    def upload(self, share: Share, is_current: Callable[[], bool]) -> None:
        """Sends the files of a share, and reports the progress until then."""
        permit = _Permit(is_current, self._last_beat)
        sent = _Sent()
        thread = threading.Thread(target=self._send, args=(share, permit, sent), daemon=True)
        thread.start()
        while thread.is_alive():
            permit.look()
            self._report(State(number=share.number, sent_bytes=sent.num_bytes))
            thread.join(BEAT_SECONDS)
        permit.is_released = True
        self._report(
            State(number=share.number, sent_bytes=sent.num_bytes, is_over=True, error=sent.error)
        )

    def _report(self, state: State) -> None:
        self._num_beats += 1
        self._board.put(self._state_key, state.to_bytes(self._num_beats))

    def _send(self, share: Share, permit: _Permit, sent: _Sent) -> None:
        try:
            remote = self._tier.open()
            if remote.storage.objects is not None:
                remote.storage.objects.only_with(permit)
            source = os.path.join(self._local.root, share.source)
            target = os.path.join(remote.root, share.target)

            def send(name: str) -> None:
                permit.renew_if_stale()
                path, copy = os.path.join(source, name), os.path.join(target, name)
                if holds_file(self._local.storage, path, share.files[name]):
                    remote.storage.put_file(path, copy)
                    remote.storage.sync(copy)
                    sent.add(share.files[name].size_bytes)
                # Else the primary finds the file missing: another node has it, or it is damaged.

            run_in_threads([functools.partial(send, name) for name in share.files], NUM_FILES)
        except Exception as error:  # noqa: BLE001 - reported to the primary, which sends the rest
            sent.error = f"{type(error).__name__}: {error}"


class _Sent:
    """The outcome of a share so far."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.error = ""
        self._mutex = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._mutex:
            self.num_bytes += num_bytes


class _Permit:
    """The right to send files of a share: while the primary beats, and has not withdrawn it.

    Attributes:
        is_released: Whether it is not needed any more.
    """

    def __init__(self, is_current: Callable[[], bool], beat: Callable[[], bytes | None]) -> None:
        self.is_released = False
        self._is_current = is_current
        self._beat = beat
        self._last: bytes | None = b""
        self._seen = 0.0
        self._is_lost = False
        self.look()

    @property
    def is_fresh(self) -> bool:
        """Whether files may be sent without another look."""
        return not self._is_lost and _clock() - self._seen < _FRESH_SECONDS

    def look(self) -> None:
        """Looks whether the primary has given another sign."""
        now = _clock()
        if not self._is_current():
            self._is_lost = True
        elif (beat := self._beat()) != self._last:
            self._last, self._seen = beat, now

    def renew_if_stale(self) -> None:
        """Raises `LockedError` if nothing may be sent any more; looks first if needed."""
        if not self.is_fresh:
            self.look()
        if not self.is_fresh:
            raise errors.LockedError(
                "The primary has withdrawn this node's share of an upload, or does not answer."
            )


def _clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # continues while a machine is suspended


def _serve(
    helper: weakref.ref[UploadHelper], look: Callable[[], bytes | None], stop: threading.Event
) -> None:
    """Uploads each share; refers to the helper only for moments, since a manager may be dropped."""
    last_number = 0
    last_sign: bytes | None = None
    since = time.monotonic()
    try:
        while not stop.is_set():
            task = look()
            share = None if task is None else Share.parse(task)
            present = helper()
            if present is None or (share is not None and share.is_last):
                return
            if share is not None and share.files and share.number > last_number:
                present.upload(share, lambda task=task: look() == task)
                last_number = share.number
            sign = present.closing_sign()
            if sign is None or sign != last_sign:
                last_sign, since = sign, time.monotonic()
            elif time.monotonic() - since >= _CLOSING_SECONDS:
                return
            del present
            stop.wait(_LOOK_SECONDS)
    except errors.CoordinationError as error:  # the ranks cannot reach each other any more
        _log.debug("This node uploads no shares any more: %s", error)
