"""Rounds that run only when a rank requests one, at a step that no rank has passed.

The ranks ask about the same steps in the same order, each in its own time; every new step is a
turn. In most turns they exchange nothing. A thread of each rank looks into the ranks' store for a
request, and the primary names the turn of the next round:

    <n>/wanted       a rank asks for round n
    <n>/at/<rank>    the turn of a rank, which enters no other one before it knows the name
    <n>/turn         the turn of round n: one after the last that any rank has entered

Round 0 is in turn 1. A primary that leaves names the turn after its last one: ranks that are behind
finish without a round, and a rank that continues beyond fails in one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from functional_ckpt import errors
from functional_ckpt.distributed import remote_errors
from functional_ckpt.distributed.key_values import GRACE_SECONDS, KeyValueStore, wait_for
from functional_ckpt.distributed.rounds import named

_LAST_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """How far a rank is.

    Attributes:
        turn: The number of turns that it has entered.
        step: The step of the last one.
        num_rounds: The number of rounds that it has finished.
        is_held: Whether the next round is asked for: no turn is entered before it has a name.
        round_turn: The turn of the next round, once named.
    """

    turn: int = 0
    step: int | None = None
    num_rounds: int = 0
    is_held: bool = True
    round_turn: int | None = 1

    def must_wait(self, step: int) -> bool:
        """Returns whether the step is a new turn, and the turn of the next round is not known."""
        return self.is_held and self.round_turn is None and step != self.step

    @property
    def is_round_due(self) -> bool:
        """Whether the next round is in this turn."""
        return self.round_turn is not None and self.turn >= self.round_turn

    def entered(self, step: int) -> Position:
        """Returns the position at a step: a new turn, unless it is the step of this one."""
        if step == self.step:
            return self
        return dataclasses.replace(self, turn=self.turn + 1, step=step)

    def held(self) -> Position:
        """Returns the position once the next round was asked for."""
        return dataclasses.replace(self, is_held=True)

    def named(self, turn: int) -> Position:
        """Returns the position once the primary has named the turn of the next round."""
        return dataclasses.replace(self, is_held=True, round_turn=turn)

    def finished(self) -> Position:
        """Returns the position after the round."""
        rounds = self.num_rounds + 1
        return dataclasses.replace(self, num_rounds=rounds, is_held=False, round_turn=None)


def turn_of_round(turns: Iterable[int]) -> int:
    """Returns the turn of the next round, given those of all ranks while they are held."""
    return max(turns) + 1


class StoreTurns:
    """One rank's turns; see `Turns`. It starts a thread.

    Args:
        member: The state that the caller and the thread share.
    """

    def __init__(self, member: Member) -> None:
        self._member = member
        self._thread = threading.Thread(target=self._member.serve, name="turns", daemon=True)
        self._thread.start()
        # The thread ends with a manager that is dropped.
        weakref.finalize(self, self._member.leave).atexit = False

    def enter(self, step: int) -> bool:
        """See `Turns.enter`."""
        return self._member.enter(step)

    def finish(self) -> None:
        """See `Turns.finish`."""
        self._member.finish()

    def wake(self) -> None:
        """See `Turns.wake`."""
        self._member.nudges.put(None)

    def close(self) -> None:
        """See `Turns.close`."""
        self._member.leave()
        self._thread.join(_LAST_SECONDS)

    def last_keys(self) -> list[str]:
        """Returns the keys that may be in the store once all ranks have closed."""
        return self._member.last_keys()


class Member:
    """The state that a rank's caller and its thread share; it does not keep `StoreTurns` alive.

    `timeout_seconds` returns how long to wait for another rank; `is_wanted`, called in a thread
    every `period_seconds`, whether this rank asks for a round.

    Attributes:
        nudges: The thread looks at once when something is put here.
    """

    def __init__(
        self,
        store: KeyValueStore,
        prefix: str,
        *,
        rank: int,
        num_ranks: int,
        timeout_seconds: Callable[[], float],
        period_seconds: float,
        is_wanted: Callable[[], bool],
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout_seconds = timeout_seconds
        self._period_seconds = period_seconds
        self._is_wanted = is_wanted
        self._position = Position()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._is_leaving = False
        # A simple queue, since a signal handler may put into it at any time.
        self.nudges: queue.SimpleQueue[None] = queue.SimpleQueue()

    # ------------------------------------------------------------------------------ the caller

    def enter(self, step: int) -> bool:
        """See `Turns.enter`."""
        with self._changed:
            while self._position.must_wait(step) and self._error is None:
                self._changed.wait()
            if self._error is not None and step != self._position.step:
                raise self._error
            self._position = self._position.entered(step)
            return self._position.is_round_due

    def finish(self) -> None:
        """See `Turns.finish`."""
        with self._changed:
            number = self._position.num_rounds
            self._position = self._position.finished()
        self.nudges.put(None)
        # Those of the round before: a rank that was suspended may still need the last name.
        ends = (f"at/{self._rank}",) if self._rank else ("wanted", "turn")
        self._store.delete_soon([self._key(end, number - 1) for end in ends])

    def leave(self) -> None:
        """Has the thread publish where this rank stopped, and end."""
        self._is_leaving = True
        self.nudges.put(None)

    def last_keys(self) -> list[str]:
        """See `StoreTurns.last_keys`."""
        last = self._position.num_rounds
        ends = ("wanted", "turn", *(f"at/{rank}" for rank in range(1, self._num_ranks)))
        return [self._key(end, number) for number in (last - 1, last) for end in ends]

    # ------------------------------------------------------------------------------ the thread

    def serve(self) -> None:
        """Looks for requests until the rank leaves."""
        try:
            while not self._is_leaving:
                if self._position.round_turn is not None:
                    self.nudges.get()
                    continue
                with contextlib.suppress(queue.Empty):
                    self.nudges.get(timeout=self._period_seconds)
                if not self._is_leaving and self._is_round_wanted():
                    self._agree()
        except BaseException as error:  # noqa: BLE001 - raised by the next `enter`
            with self._changed:
                self._error = error
                self._changed.notify_all()
            self._publish_last(error)
        else:
            self._publish_last(None)

    def _is_round_wanted(self) -> bool:
        wanted = self._key("wanted")
        try:
            asks = self._is_wanted()
        except Exception:  # noqa: BLE001 - the round raises it, on all ranks
            asks = True
        if asks:
            self._store.set(wanted, b"", self._limit)
            return True
        return self._store.has([wanted], self._limit)

    def _agree(self) -> None:
        """Holds the caller until the turn of the round is known."""
        with self._changed:
            self._position = self._position.held()
        if self._rank == 0:
            if (turns := self._gather()) is None:
                return
            turn = turn_of_round(turns)
            self._store.set(self._key("turn"), _entry({"turn": turn}), self._limit)
        else:
            self._publish_position(self._limit)
            if (found := self._await_name()) is None:
                return
            turn = found
        with self._changed:
            self._position = self._position.named(turn)
            self._changed.notify_all()

    def _gather(self) -> list[int] | None:
        """On the primary: the turns of all ranks; None if it leaves."""
        ranks = range(1, self._num_ranks)
        keys = [self._key(f"at/{rank}") for rank in ranks]
        if not wait_for(self._store, keys, self._patience, self._num_ranks):
            if self._is_leaving:
                return None
            absent = [r for r in ranks if not self._store.has([self._key(f"at/{r}")], self._limit)]
            if absent:
                raise errors.CoordinationTimeoutError(
                    f"{named(absent).capitalize()} did not report its step within "
                    f"{self._timeout_seconds():g} s (crashed or hung?).",
                    ranks=absent,
                )
        return [self._position.turn, *map(int, self._store.get(keys, self._limit))]

    def _await_name(self) -> int | None:
        """On other ranks: the turn of the round; None if this rank leaves."""
        key = self._key("turn")
        if not wait_for(self._store, [key], lambda: self._patience(GRACE_SECONDS), self._num_ranks):
            if self._is_leaving:
                return None
            raise errors.CoordinationTimeoutError(
                f"Rank 0 did not name a step within {self._limit:g} s (crashed or hung?).",
                ranks=(0,),
            )
        found: dict[str, Any] = json.loads(self._store.get([key], self._limit)[0])
        if (record := found.get("error")) is not None:
            raise remote_errors.rebuild(
                record, record["message"] or record["text"], record["ranks"]
            )
        return found["turn"]

    def _publish_position(self, seconds: float) -> None:
        turn = self._position.turn  # the caller is held, or has left
        self._store.set(self._key(f"at/{self._rank}"), b"%d" % turn, seconds)

    def _publish_last(self, error: BaseException | None) -> None:
        """The last entry of a rank: where it stopped, so that no rank waits for its answer."""
        if self._position.round_turn is not None:
            return  # all ranks know of the round
        with contextlib.suppress(errors.CoordinationError):
            if self._rank:
                self._publish_position(_LAST_SECONDS)
                return
            last = {"turn": turn_of_round([self._position.turn])}
            about = last if error is None else {"error": remote_errors.to_record(error)}
            self._store.set(self._key("turn"), _entry(about), _LAST_SECONDS)
            self._store.set(self._key("wanted"), b"", _LAST_SECONDS)

    def _key(self, end: str, number: int | None = None) -> str:
        """Returns a key of a round; None for the next one."""
        return f"{self._prefix}/{self._position.num_rounds if number is None else number}/{end}"

    def _patience(self, more: float = 0.0) -> float:
        """Seconds to wait for another rank; none if this one leaves."""
        return 0.0 if self._is_leaving else self._timeout_seconds() + more

    @property
    def _limit(self) -> float:
        return self._timeout_seconds() + GRACE_SECONDS


def _entry(about: object) -> bytes:
    return json.dumps(about).encode()
