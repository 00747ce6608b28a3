"""Rounds between ranks over any key-value store: every rank sends a value and gets the result.

Each round is a numbered slot of keys:

    <n>/<rank>     a rank's value, its error, or a mark that it timed out
    <n>/begun      the primary is in the round
    <n>/gathered   every rank has come; the primary does its part
    <n>/outcome    the result, the error, or a mark that the primary skipped to the next slot

Ranks count their rounds by themselves. After a failure one may be behind (it was suspended, and the
others continued), so every entry names the operation: a rank that finds a slot closed for another
operation skips to the next, and one that finds ranks in another operation gets an error. Every wait
ends.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence

from functional_ckpt import errors
from functional_ckpt.distributed import remote_errors
from functional_ckpt.distributed.coordinator import Combine
from functional_ckpt.distributed.key_values import GRACE_SECONDS, KeyValueStore, pauses, wait_for

_LEAVE_SECONDS = 2.0
# Time to publish the reason of a time-out; the store itself may not answer.
_LAST_WORD_SECONDS = 1.0

# One key to look for, however many ranks there are.
_ANY_LEFT = "left/any"
_PHASES = (("begun", "start"), ("gathered", "gather for"), ("outcome", "finish"))
_PHASE_SECONDS = 0.25
_VALUE, _ERROR, _GONE, _SKIPPED = "value", "error", "gone", "skipped"


class Rounds:
    """One rank's side of the rounds."""

    def __init__(
        self, store: KeyValueStore, *, rank: int, num_ranks: int, timeout_seconds: float
    ) -> None:
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout_seconds = timeout_seconds
        self._grace_seconds = GRACE_SECONDS
        self._next = 0
        self._spent: list[str] = []

    @property
    def timeout_seconds(self) -> float:
        """How long to wait for another rank, as last shortened."""
        return self._timeout_seconds

    def shorten_timeout(self, seconds: float) -> None:
        """Waits no longer than this from now on, waits under way included; signal handlers may."""
        self._timeout_seconds = min(self._timeout_seconds, seconds)

    def gather_broadcast(self, what: str, value: bytes | BaseException, combine: Combine) -> bytes:
        """See `Coordinator.gather_broadcast`."""
        while True:
            slot, self._next = self._next, self._next + 1
            if self._rank == 0:
                outcome = self._lead(slot, what, value, combine)
            else:
                outcome = self._follow(slot, what, value)
            if outcome is not None:
                return outcome

    def close(self) -> bool:
        """The last call: the primary, which may host the store, leaves after the others.

        Never fails, and waits a few seconds at most.

        Returns:
            Whether this rank is the primary, and all others have left.
        """
        with contextlib.suppress(errors.CoordinationError):
            if self._rank:
                self._store.set_soon(_ANY_LEFT, b"")
                self._set(f"left/{self._rank}", b"")
                return False
            self._set("left/0", b"")
            others = range(1, self._num_ranks)
            left = [f"left/{rank}" for rank in others]
            if self._wait(left, lambda: min(_LEAVE_SECONDS, self._timeout_seconds)):
                slots = {key.partition("/")[0] for key in self._spent}
                self._spent += ["left/0", _ANY_LEFT, *left] + [
                    f"{slot}/{rank}" for slot in slots for rank in others
                ]
                self._forget([])
                return True
        return False

    # ------------------------------------------------------------------------------ primary

    def _lead(
        self, slot: int, what: str, value: bytes | BaseException, combine: Combine
    ) -> bytes | None:
        """Returns the outcome; None if the slot is a leftover of an operation that timed out."""
        keys = [f"{slot}/begun", f"{slot}/gathered", f"{slot}/outcome"]
        self._spent += keys
        begun, gathered, closed = keys
        try:
            self._store.set_soon(begun, b"")
            if isinstance(value, BaseException) and not isinstance(value, Exception):
                raise value  # an interruption does not wait for the other ranks
            try:
                values = self._gather(slot, what)
            except errors.CoordinationError:
                if isinstance(value, BaseException):
                    raise value  # noqa: B904 - it says more
                raise
            self._store.set_soon(gathered, b"")
            if values is None:
                self._set(closed, _entry(_SKIPPED, what))
                return None
            if isinstance(value, BaseException):
                # Only now: the other ranks may have used the keys that the primary deletes.
                raise value
            outcome = combine([value, *values])
            self._set(closed, _entry(_VALUE, what, outcome))
        except BaseException as error:
            with contextlib.suppress(errors.CoordinationError):  # the store's; `error` says more
                last_word = _entry(_ERROR, what, _describe(error, what))
                self._store.set(closed, last_word, _LAST_WORD_SECONDS)
            raise
        self._forget(keys)
        return outcome

    def _gather(self, slot: int, what: str) -> list[bytes] | None:
        """Returns the other ranks' values; None if they timed out here in another operation."""
        keys = [f"{slot}/{rank}" for rank in range(1, self._num_ranks)]
        ranks = range(1, self._num_ranks)
        absent: list[int] = []
        if not self._wait(keys, self._until_left(keys)):
            absent = [r for r in ranks if not self._store.has([f"{slot}/{r}"], self._limit)]
        here = [rank for rank in ranks if rank not in absent]
        found = self._store.get([f"{slot}/{rank}" for rank in here], self._limit) if here else []
        entries = dict(zip(here, map(_parse, found), strict=True))
        gone = {rank: about for rank, (kind, about, _) in entries.items() if kind == _GONE}
        if any(about != what for about in gone.values()):
            return None
        if gone:
            raise errors.CoordinationError(
                f"Rank 0 reached {what!r} after {named(gone)} timed out waiting for it.", ranks=(0,)
            )
        others = {rank: about for rank, (_, about, _) in entries.items() if about != what}
        if others:
            elsewhere = "; ".join(f"rank {rank} in {about!r}" for rank, about in others.items())
            raise errors.CoordinationError(
                f"Collective mismatch: rank 0 is in {what!r}, {elsewhere}. "
                "All ranks must make the same calls.",
                ranks=others,
            )
        failed = {
            rank: json.loads(payload)
            for rank, (kind, _, payload) in entries.items()
            if kind == _ERROR
        }
        self._raise_missing(what, failed, absent)
        return [payload for _, _, payload in entries.values()]

    def _until_left(self, keys: Sequence[str]) -> Callable[[], float]:
        """Returns how long to wait for the ranks' keys: no longer once one of the ranks has left.

        That is looked at only by those who wait long.
        """
        looked, has_left = time.monotonic(), False

        def seconds() -> float:
            nonlocal looked, has_left
            if not has_left and time.monotonic() - looked >= _PHASE_SECONDS:
                looked = time.monotonic()
                has_left = self._store.has([_ANY_LEFT], self._limit) and any(
                    self._has_left(rank) and not self._store.has([key], self._limit)
                    for rank, key in enumerate(keys, 1)
                )
            return 0.0 if has_left else self._timeout_seconds

        return seconds

    def _has_left(self, rank: int) -> bool:
        return self._store.has([f"left/{rank}"], self._limit)

    def _raise_missing(
        self, what: str, failed: dict[int, remote_errors.Record], absent: Sequence[int]
    ) -> None:
        texts = [f"Rank {rank} failed in {what!r}: {each['text']}" for rank, each in failed.items()]
        if left := [rank for rank in absent if self._has_left(rank)]:
            texts.append(_left(left, what))
            raise errors.CoordinationError(" ".join(texts), ranks=sorted([*failed, *left]))
        if absent:
            texts.append(did_not_reach(absent, what, self._timeout_seconds))
            ranks = sorted([*failed, *absent])
            raise errors.CoordinationTimeoutError(" ".join(texts), ranks=ranks)
        if failed:
            raise remote_errors.rebuild(next(iter(failed.values())), " ".join(texts), list(failed))

    # ------------------------------------------------------------------------------ others

    def _follow(self, slot: int, what: str, value: bytes | BaseException) -> bytes | None:
        own, closed = f"{slot}/{self._rank}", f"{slot}/outcome"
        entry = _entry(_VALUE, what, value) if isinstance(value, bytes) else _failed(what, value)
        if not self._store.set_unless(own, entry, closed, self._limit):
            # The others continued without this rank.
            if _parse(self._store.get([closed], self._limit)[0])[1] != what:
                return None
            if isinstance(value, BaseException):
                raise value
            return self._outcome(closed)
        self._spent.append(own)
        if isinstance(value, BaseException):
            raise value
        try:
            self._await_outcome(slot, what)
        except BaseException:
            with contextlib.suppress(errors.CoordinationError):
                self._store.set(own, _entry(_GONE, what), _LAST_WORD_SECONDS)
            raise
        outcome = self._outcome(closed)
        if outcome is not None:
            self._forget([own])
        return outcome

    def _await_outcome(self, slot: int, what: str) -> None:
        """Waits for the primary: to come, then to gather, then to do its part; as long for each."""
        phase, start = 0, time.monotonic()
        looked = start
        for pause in pauses(self._num_ranks):
            if self._store.has([f"{slot}/outcome"], self._rest(start)):
                return
            # How far the primary is matters only to those who wait long.
            if time.monotonic() - looked >= min(_PHASE_SECONDS, self._rest(start)):
                looked = time.monotonic()
                while phase < 2 and self._store.has(
                    [f"{slot}/{_PHASES[phase][0]}"], self._rest(start)
                ):
                    phase, start = phase + 1, looked
                # In this order: the primary leaves after it has closed its last slot.
                if self._has_left(0) and not self._store.has(
                    [f"{slot}/outcome"], self._rest(start)
                ):
                    raise errors.CoordinationError(_left([0], what), ranks=(0,))
            if time.monotonic() - start >= self._limit:
                raise errors.CoordinationTimeoutError(
                    f"Rank 0 did not {_PHASES[phase][1]} {what!r} within {self._limit:g} s "
                    "(crashed, hung, or without this call?).",
                    ranks=(0,),
                )
            time.sleep(pause)

    def _rest(self, start: float) -> float:
        """Seconds that are left of a wait; some always, for the store to answer."""
        return max(start + self._limit - time.monotonic(), self._grace_seconds)

    def _outcome(self, key: str) -> bytes | None:
        """Returns the result of a closed slot; None if the primary skipped to the next."""
        kind, _, payload = _parse(self._store.get([key], self._limit)[0])
        if kind == _ERROR:
            record = json.loads(payload)
            raise remote_errors.rebuild(record, record["message"], record["ranks"])
        return None if kind == _SKIPPED else payload

    # ------------------------------------------------------------------------------ the store

    @property
    def _limit(self) -> float:
        return self._timeout_seconds + self._grace_seconds

    def _set(self, key: str, value: bytes) -> None:
        self._store.set(key, value, self._limit)

    def _wait(self, keys: Sequence[str], seconds: Callable[[], float]) -> bool:
        return wait_for(self._store, keys, seconds, self._num_ranks)

    def _forget(self, current: list[str]) -> None:
        """Deletes this rank's keys of earlier rounds: no rank that came this far needs them."""
        self._store.delete_soon([key for key in self._spent if key not in current])
        self._spent = list(current)


def _entry(kind: str, what: str, payload: bytes = b"") -> bytes:
    return f"{kind}\0{what}\0".encode() + payload


def _parse(entry: bytes) -> tuple[str, str, bytes]:
    kind, what, payload = entry.split(b"\0", 2)
    return kind.decode(), what.decode(), payload


def _describe(error: BaseException, what: str) -> bytes:
    """Returns the primary's error as the others will raise it."""
    record = remote_errors.to_record(error)
    if record["message"] is None:
        record |= {"message": f"Rank 0 failed in {what!r}: {record['text']}", "ranks": [0]}
    return json.dumps(record).encode()


def _failed(what: str, error: BaseException) -> bytes:
    return _entry(_ERROR, what, json.dumps(remote_errors.to_record(error)).encode())


def did_not_reach(ranks: Sequence[int], what: str, seconds: float) -> str:
    """Returns the message about ranks that did not come in time."""
    return (
        f"{named(ranks).capitalize()} did not reach {what!r} within {seconds:g} s (crashed, hung, "
        "or without this call?)."
    )


def _left(ranks: Sequence[int], what: str) -> str:
    return (
        f"{named(ranks).capitalize()} closed the manager without {what!r}: all ranks must make the "
        "same calls, with the same `force`."
    )


def named(ranks: Sequence[int] | dict[int, str]) -> str:
    """Returns ranks as text: `rank 1`, `ranks 1, 2`."""
    names = [str(rank) for rank in ranks]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names)}"
