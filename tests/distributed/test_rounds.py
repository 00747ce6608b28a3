"""The rounds between ranks, over a store in memory and a thread for each rank."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import MemoryStore

from functional_ckpt import errors
from functional_ckpt.distributed import torch_store
from functional_ckpt.distributed.rounds import Rounds


class Group:
    """Ranks as threads."""

    def __init__(self, num_ranks: int, timeout_seconds: float = 30.0) -> None:
        self.store = MemoryStore()
        self.rounds = [
            Rounds(self.store, rank=rank, num_ranks=num_ranks, timeout_seconds=timeout_seconds)
            for rank in range(num_ranks)
        ]

    def run(self, job: Callable[[int, Rounds], Any], *ranks: int) -> list[Any]:
        """The job's result or error for each of the ranks (none given: all)."""
        chosen = ranks or range(len(self.rounds))
        with futures.ThreadPoolExecutor(len(chosen)) as pool:
            jobs = [pool.submit(job, rank, self.rounds[rank]) for rank in chosen]
        return [each.exception() or each.result() for each in jobs]


def join(values: Sequence[bytes]) -> bytes:
    return b",".join(values)


def test_every_rank_gets_what_the_primary_makes_of_all_values() -> None:
    group = Group(4)
    for number in range(5):
        found = group.run(
            lambda rank, rounds: rounds.gather_broadcast(f"n{number}", b"%d" % rank, join)  # noqa: B023
        )
        assert found == [b"0,1,2,3"] * 4


def test_the_store_holds_one_round_and_after_leaving_none() -> None:
    group = Group(3)
    sizes: list[int] = []
    for number in range(20):
        group.run(lambda rank, rounds: rounds.gather_broadcast(f"round {number}", b"", join))  # noqa: B023
        sizes.append(len(group.store.values))
    assert max(sizes) == sizes[0] == 5
    group.run(lambda rank, rounds: rounds.close())
    assert group.store.values == {}


def test_a_round_costs_each_rank_the_same_few_writes() -> None:
    writes = {}
    for num_ranks in (2, 8):
        group = Group(num_ranks)
        for number in range(10):
            group.run(lambda rank, rounds: rounds.gather_broadcast(f"{number}", bytes(9999), max))  # noqa: B023
        writes[num_ranks] = group.store.num_writes / 10 / num_ranks
    assert writes[8] <= writes[2] <= 4


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_an_error_reaches_all_and_the_next_round_is_as_ever(culprit: int) -> None:
    group = Group(3)
    mine = ValueError("mine")
    found = group.run(
        lambda rank, rounds: rounds.gather_broadcast("it", mine if rank == culprit else b"", join)
    )
    for rank, error in enumerate(found):
        if rank == culprit:
            assert error is mine
        else:
            assert isinstance(error, errors.CoordinationError)
            assert error.ranks == (culprit,)
            assert str(error) == f"Rank {culprit} failed in 'it': ValueError: mine"
    assert (
        group.run(lambda _, rounds: rounds.gather_broadcast("more", b"x", join)) == [b"x,x,x"] * 3
    )


def test_who_does_not_come_is_named() -> None:
    group = Group(4, timeout_seconds=0.1)
    for error in group.run(lambda _, rounds: rounds.gather_broadcast("it", b"", join), 0, 2):
        assert isinstance(error, errors.CoordinationTimeoutError)
        assert error.ranks == (1, 3)
        assert "Ranks 1, 3 did not reach 'it' within 0.1 s" in str(error)


@pytest.mark.parametrize("left", [0, 1])
def test_a_rank_that_closes_is_not_waited_for(left: int) -> None:
    """As at the end of a run in which only one rank passes `force=True`."""
    group = Group(3)

    def job(rank: int, rounds: Rounds) -> object:
        return rounds.close() if rank == left else rounds.gather_broadcast("last", b"", join)

    found = group.run(job)
    errors_found = [each for rank, each in enumerate(found) if rank != left]
    for each in errors_found:
        assert type(each) is errors.CoordinationError
        assert f"Rank {left} closed the manager without 'last'" in str(each)
        assert each.ranks == (left,)


def test_hurry_shortens_a_wait_under_way() -> None:
    group = Group(2, timeout_seconds=600)
    threading.Timer(0.2, group.rounds[0].shorten_timeout, [0.1]).start()
    [error] = group.run(lambda _, rounds: rounds.gather_broadcast("it", b"", join), 0)
    assert isinstance(error, errors.CoordinationTimeoutError)


def test_a_timeout_is_shortened_and_never_lengthened() -> None:
    coordinator = torch_store.StoreCoordinator.__new__(torch_store.StoreCoordinator)
    [coordinator._rounds] = Group(1, timeout_seconds=30).rounds
    coordinator._timeout_seconds = 30.0
    for seconds, expected in ((60.0, 30.0), (5.0, 5.0), (20.0, 5.0)):
        coordinator.shorten_timeout(seconds)
        assert coordinator._timeout_seconds == coordinator._rounds._timeout_seconds == expected


def test_different_calls_are_an_error_that_says_so() -> None:
    group = Group(3)
    found = group.run(lambda rank, rounds: rounds.gather_broadcast(f"call {rank // 2}", b"", join))
    for error in found:
        assert isinstance(error, errors.CoordinationError)
        assert error.ranks == (2,)
        assert "Collective mismatch: rank 0 is in 'call 0', rank 2 in 'call 1'" in str(error)


@settings(max_examples=15)
@given(st.lists(st.sets(st.integers(0, 2), min_size=1, max_size=2), min_size=1, max_size=3))
def test_ranks_that_missed_rounds_meet_again(present: list[set[int]]) -> None:
    group = Group(3, timeout_seconds=0.02)
    for rounds in group.rounds:
        rounds._grace_seconds = 0.05
    for number, ranks in enumerate(present):
        found = group.run(
            lambda _, rounds: rounds.gather_broadcast(f"round {number}", b"", join),  # noqa: B023
            *ranks,
        )
        assert all(isinstance(error, errors.CoordinationError) for error in found)
    for rounds in group.rounds:
        rounds._timeout_seconds = 30.0
    found = group.run(lambda rank, rounds: rounds.gather_broadcast("together", b"%d" % rank, join))
    assert found == [b"0,1,2"] * 3


def test_a_call_that_waits_behind_a_stuck_one_is_never_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_store, "_SECOND_LOOK_SECONDS", 0.01)
    calls, gate, made = torch_store._Calls(), threading.Event(), list[int]()
    stuck = calls.start(gate.wait, (60,))
    with pytest.raises(futures.CancelledError):
        calls.call(made.append, (1,), 0.01)
    gate.set()
    assert stuck.result(60)
    calls.call(made.append, (2,), 60)
    assert made == [2]


@pytest.mark.parametrize("culprit", [1, 2])
def test_rounds_that_fail_leave_nothing_in_the_store(culprit: int) -> None:
    group = Group(3)

    def fail(rank: int, rounds: Rounds) -> bytes:
        return rounds.gather_broadcast("it", ValueError("m") if rank == culprit else b"", join)

    for _ in range(10):
        group.run(fail)
    for _ in range(2):
        group.run(lambda rank, rounds: rounds.gather_broadcast("it", b"", join))
    assert len(group.store.values) <= 5
    group.run(lambda rank, rounds: rounds.close())
    assert group.store.values == {}


def test_the_thread_of_a_group_that_is_dropped_ends() -> None:
    before = set(threading.enumerate())
    calls = torch_store._Calls()
    assert calls.call(max, (1, 2), 20.0) == 2
    (thread,) = set(threading.enumerate()) - before
    del calls
    gc.collect()
    thread.join(20.0)
    assert not thread.is_alive()
