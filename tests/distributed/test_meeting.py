"""Ranks that agree on a new name in a store, which may have keys of an earlier attempt."""

from __future__ import annotations

from concurrent import futures

import pytest
from thread_ranks import MemoryStore

from functional_ckpt import errors
from functional_ckpt.distributed import meeting
from functional_ckpt.distributed.meeting import Meeting

_NUM_RANKS = 3


def _next_names(
    store: MemoryStore, meetings: dict[int, Meeting], seconds: float = 20.0
) -> list[str | errors.CoordinationTimeoutError]:
    """The next name of each rank, or its error."""

    def of(rank: int) -> str | errors.CoordinationTimeoutError:
        try:
            return meetings[rank].next_name(store, rank, _NUM_RANKS, seconds)
        except errors.CoordinationTimeoutError as error:
            return error

    with futures.ThreadPoolExecutor(_NUM_RANKS) as pool:
        return list(pool.map(of, meetings))


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "GRACE_SECONDS", 0.2)


def _meetings(*ranks: int) -> dict[int, Meeting]:
    return {rank: Meeting() for rank in ranks}


def test_names_are_equal_on_all_ranks_and_new() -> None:
    store, meetings = MemoryStore(), _meetings(0, 1, 2)
    found = [_next_names(store, meetings) for _ in range(3)]
    found.append(_next_names(store, _meetings(0, 1, 2)))
    assert all(isinstance(names[0], str) and len(set(names)) == 1 for names in found)
    assert len({names[0] for names in found}) == 4


@pytest.mark.parametrize("came", [(1,), (1, 2), (0, 1), (0,)])
def test_keys_of_an_attempt_that_not_all_ranks_reached_mislead_none(came: tuple[int, ...]) -> None:
    store = MemoryStore()
    first = _next_names(store, _meetings(*came), 0.1)
    assert all(isinstance(each, errors.CoordinationTimeoutError) for each in first)
    second = _next_names(store, _meetings(0, 1, 2))
    assert isinstance(second[0], str) and len(set(second)) == 1


def test_a_rank_that_did_not_come_is_named_and_may_come_later() -> None:
    store, meetings = MemoryStore(), _meetings(0, 1, 2)
    early = _next_names(store, {rank: meetings[rank] for rank in (0, 1)}, 0.1)
    assert "Rank 2 did not reach 'the first call of all ranks' within 0.1 s" in str(early[0])
    with pytest.raises(errors.CoordinationTimeoutError, match="Rank 0 did not reach"):
        meetings[2].next_name(store, 2, _NUM_RANKS, 0.1)
    names = _next_names(store, meetings)
    assert isinstance(names[0], str) and len(set(names)) == 1
