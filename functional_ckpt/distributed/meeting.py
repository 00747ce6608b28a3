"""How ranks agree on a fresh name in a store that may have keys of processes that were killed.

A launcher may keep one store for all attempts to run a job: torchrun does. A rank cannot see of
which attempt a key is, so it relies only on values that were not known before this attempt.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Sequence

from functional_ckpt import errors
from functional_ckpt.distributed.key_values import GRACE_SECONDS, KeyValueStore, pauses, wait_for
from functional_ckpt.distributed.rounds import did_not_reach

_WHAT = "the first call of all ranks"


class Meeting:
    """The meeting of the ranks of one process group, as one of them sees it."""

    def __init__(self) -> None:
        self._word = uuid.uuid4().hex
        self._name = ""
        self._num_names = 0
        self._mutex = threading.Lock()

    def next_name(
        self, store: KeyValueStore, rank: int, num_ranks: int, timeout_seconds: float
    ) -> str:
        """Returns a new name, equal on all ranks if they call this equally often.

        At the first call every rank asks with a word of its own. The primary answers each word that
        it finds, also old ones that no rank waits for, until all ranks have confirmed the answer.

        Raises:
            CoordinationTimeoutError: A rank did not come in time. It may come later: the next call
                continues.
        """
        with self._mutex:
            self._num_names += 1
            if not self._name:
                if rank:
                    self._name = _ask(store, rank, num_ranks, self._word, timeout_seconds)
                else:
                    _answer(store, num_ranks, self._word, timeout_seconds)
                    self._name = self._word
            return f"{self._name}/{self._num_names}"


def _answer(store: KeyValueStore, num_ranks: int, name: str, timeout_seconds: float) -> None:
    others = range(1, num_ranks)
    asked, confirmed = [_asks(each) for each in others], [_confirms(name, each) for each in others]
    start = time.monotonic()
    if not wait_for(store, asked, lambda: timeout_seconds, num_ranks):
        raise _timed_out(store, asked, timeout_seconds)
    answered: dict[int, bytes] = {}
    for pause in pauses(num_ranks):
        words = store.get(asked, timeout_seconds)
        for each, word in zip(others, words, strict=True):
            if answered.get(each) != word:
                answered[each] = word
                store.set_soon(_answers(word.decode()), name.encode())
        if store.has(confirmed, timeout_seconds):
            break
        if time.monotonic() - start > timeout_seconds:
            raise _timed_out(store, confirmed, timeout_seconds)
        time.sleep(pause)
    store.delete_soon([*confirmed, *(_answers(word.decode()) for word in answered.values())])


def _ask(store: KeyValueStore, rank: int, num_ranks: int, word: str, timeout_seconds: float) -> str:
    store.set(_asks(rank), word.encode(), timeout_seconds)
    limit = timeout_seconds + GRACE_SECONDS
    if not wait_for(store, [_answers(word)], lambda: limit, num_ranks):
        raise errors.CoordinationTimeoutError(did_not_reach([0], _WHAT, limit), ranks=(0,))
    name = store.get([_answers(word)], timeout_seconds)[0].decode()
    store.set(_confirms(name, rank), b"here", timeout_seconds)
    return name


def _timed_out(
    store: KeyValueStore, keys: Sequence[str], timeout_seconds: float
) -> errors.CoordinationTimeoutError:
    absent = [rank for rank, key in enumerate(keys, 1) if not store.has([key], GRACE_SECONDS)]
    return errors.CoordinationTimeoutError(
        did_not_reach(absent, _WHAT, timeout_seconds), ranks=tuple(absent)
    )


def _asks(rank: int) -> str:
    return f"functional_ckpt/meeting/{rank}"


def _answers(word: str) -> str:
    return f"functional_ckpt/meeting/{word}"


def _confirms(name: str, rank: int) -> str:
    return f"functional_ckpt/meeting/{name}/{rank}"
