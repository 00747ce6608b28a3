"""Copies of the state in host memory, saved on SIGTERM if no save comes; `policies.Preemption`.

The main thread makes the copies, at steps that `save` declines. Python calls signal handlers on the
main thread only, between two of its instructions: not within a compilation or a long call of C. So
the system wakes a thread, which saves the copy once the grace period is over.

With many ranks these threads agree on that in rounds of their own, until all of them hold a copy of
one step and none has started the commit of a newer one. A rank stages and starts commits under its
`turn`. A thread takes part with the turn in hand, or reports that it is taken, since a rank may not
wait for others with it. So all ranks start the same commits in the same order.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import Board, Coordinator
from functional_ckpt.policies.save import Preemption
from functional_ckpt.saving import background, publishing, stage
from functional_ckpt.saving.finalize import CheckpointInfo
from functional_ckpt.saving.lower import LoweredItem
from functional_ckpt.saving.options import Eager
from functional_ckpt.saving.plan import SavePlan
from functional_ckpt.steps.preemption import SignalPipe

_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 0.1
# The states of a rank, beside the number of the step that it holds; the last is of all ranks.
_NONE, _BUSY, _SAVE = b"none", b"busy", b"save"
_log = logging.getLogger("functional_ckpt")


class Snapshots:
    """The copies of one rank.

    Args:
        policy: When to copy; None for no copies.
        committer: The thread that commits.
        coordinator: The ranks, for the thread that waits for signals.
        start: Starts the commit of a copy.

    Attributes:
        turn: Held by a thread that stages a save and starts its commit.
    """

    def __init__(
        self,
        policy: Preemption | None,
        committer: background.CommitThread,
        coordinator: Coordinator,
        start: Callable[[publishing.Save], background.Commit],
    ) -> None:
        self.turn = threading.Lock()
        self._stager = stage.Stager(Eager())
        self._policy = policy
        self._committer = committer
        self._coordinator = coordinator
        self._start = start
        self._held: publishing.Save | None = None
        self._covered: publishing.Save | None = None
        self._own: background.Commit | None = None
        self._pipe: SignalPipe | None = None
        self._stop = threading.Event()

    def is_due(self, step: int) -> bool:
        """Returns whether to copy the state at a step."""
        every = None if self._policy is None else self._policy.snapshot_every
        return every is not None and step % every == 0 and step != self.saved_step

    @property
    def saved_step(self) -> int | None:
        """The step of the copy that was saved last."""
        return None if self._own is None else self._own.step

    def serve(self, pipe: SignalPipe) -> None:
        """Starts the thread that waits for SIGTERM to this rank, or to another one."""
        board = self._coordinator.board("preemption") if self._coordinator.num_ranks > 1 else None
        self._pipe = pipe
        args = (weakref.ref(self), pipe, board, self._stop)
        threading.Thread(target=_serve, args=args, name="preemption", daemon=True).start()

    def hold(self, items: Sequence[LoweredItem], plan: SavePlan, info: CheckpointInfo) -> None:
        """Makes a copy, instead of the last one."""
        step = info.step or 0
        if self._pipe is not None:
            self._pipe.install()  # another owner may have replaced it
        with self.turn:
            if self._own is not None and not self._own.done():
                self._committer.wait()  # it reads the memory of the last copy
            self._held = None
            staged = self._stager.stage(items, plan, step)
            self._held = publishing.Save(step=step, staged=staged, info=info, is_repeat=True)

    def cover(self) -> Callable[[], None]:
        """Notes, with the turn, that the commit of a newer save starts.

        Returns:
            A function to call once it is durable.
        """
        held = self._covered = self._held
        return lambda: self._forget(held)

    def close(self, *, saves: bool) -> None:
        """Ends the thread.

        Args:
            saves: Whether a process that is alone saves its copy now.
        """
        self._stop.set()
        if saves and self._coordinator.num_ranks == 1:
            self._committer.wait()
            self._attempt()
        with self.turn:
            self._held = None
        self._stager.release()

    def save_after_grace(self) -> None:
        """Saves the copy if no newer save becomes durable."""
        self._stop.wait(0.0 if self._policy is None else self._policy.grace_seconds)
        while not self._stop.is_set() and not self._attempt():
            self._stop.wait(_AGAIN_SECONDS)

    def _attempt(self) -> bool:
        """Saves the copy if all ranks can; returns whether nothing is left to save."""
        has_turn = self.turn.acquire(blocking=False)
        handle: background.Commit | None = None
        try:
            state = self._state() if has_turn else _BUSY
            what = "whether to save a copy after SIGTERM"
            verdict = self._coordinator.gather_broadcast(what, state, _agree)
            if verdict == _SAVE and self._held is not None:
                self._committer.wait()  # an older save
                _log.warning("SIGTERM: saving the copy of step %d", self._held.step)
                handle = self._own = self._start(self._held)
        finally:
            if has_turn:
                self.turn.release()
        if handle is not None and (error := handle.exception()) is not None:
            _log.error("The copy of step %d is not saved: %s", handle.step, error)
            self._held = None
        return verdict != _BUSY

    def _state(self) -> bytes:
        if self._held is None:
            return _NONE
        if self._committer.is_busy and self._covered is self._held:
            return _BUSY
        return b"%d" % self._held.step

    def _forget(self, copy: publishing.Save | None) -> None:
        if self._held is copy:
            self._held = None


def _agree(states: Sequence[bytes]) -> bytes:
    """Returns whether all ranks save their copies, have none, or must be asked again."""
    if len(set(states)) > 1 or states[0] == _BUSY:
        return _BUSY
    return _NONE if states[0] == _NONE else _SAVE


def _serve(
    snapshots: weakref.ref[Snapshots], pipe: SignalPipe, board: Board | None, stop: threading.Event
) -> None:
    """Waits for signals; refers to the copies only after one."""
    number = 0
    try:
        while not stop.is_set():
            is_reached = pipe.wait(_LOOK_SECONDS)
            if is_reached and board is not None:
                board.put(str(number), b"")
            if not is_reached and (board is None or board.get(str(number)) is None):
                continue
            if (present := snapshots()) is None:
                return
            present.save_after_grace()
            number += 1
            del present
    except errors.CoordinationError as error:
        _log.warning("Copies of this rank are not saved after SIGTERM: %s", error)
    finally:
        pipe.end()
