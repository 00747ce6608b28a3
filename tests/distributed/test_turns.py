"""Rounds on demand: all ranks make the same ones at the same steps, however they are scheduled."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from doubles import Counting
from full import IS_FULL
from gloo_workers import Workers
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import MemoryStore

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.distributed.torch_store import default_coordinator
from functional_ckpt.distributed.turns import Member, Position, StoreTurns, turn_of_round

# ------------------------------------------------------------------------------------ the model


@dataclass
class Rank:
    """A rank of the model: its loop and its thread, which move one at a time."""

    steps: Sequence[int]
    position: Position = field(default_factory=Position)
    next: int = 0
    in_round: bool = False
    has_signal: bool = False
    rounds: list[tuple[int, int | None]] = field(default_factory=list[tuple[int, int | None]])

    @property
    def has_left(self) -> bool:
        return self.next == len(self.steps) and not self.in_round


class Job:
    """Ranks over a store: keys are (round, name)."""

    def __init__(self, num_ranks: int, steps: Sequence[int]) -> None:
        self.ranks = [Rank(steps) for _ in range(num_ranks)]
        self.store: dict[tuple[int, str], int] = {}

    def move_loop(self, number: int) -> None:
        rank = self.ranks[number]
        if rank.in_round:
            if all(each.in_round for each in self.ranks):
                self.end_round()
            return
        if rank.next == len(rank.steps) or rank.position.must_wait(rank.steps[rank.next]):
            return
        rank.position = rank.position.entered(rank.steps[rank.next])
        rank.next += 1
        rank.in_round = rank.position.is_round_due

    def end_round(self) -> None:
        places = {(rank.position.turn, rank.position.step, rank.next) for rank in self.ranks}
        assert len(places) == 1, "ranks in different rounds"
        for rank in self.ranks:
            rank.rounds.append((rank.position.turn, rank.position.step))
            rank.position = rank.position.finished()
            rank.in_round = False
            rank.has_signal = False  # the round has heard of it

    def move_thread(self, number: int) -> None:
        rank = self.ranks[number]
        at = rank.position.num_rounds
        if rank.position.round_turn is not None:
            return
        if rank.has_left:
            if number:
                self.store[at, f"at/{number}"] = rank.position.turn
            else:
                self.store.setdefault((at, "turn"), turn_of_round([rank.position.turn]))
                self.store[at, "wanted"] = 1
        elif not rank.position.is_held:
            if rank.has_signal or (at, "wanted") in self.store:
                self.store[at, "wanted"] = 1
                rank.position = rank.position.held()
                self.store[at, f"at/{number}"] = rank.position.turn
        elif (at, "turn") in self.store:
            rank.position = rank.position.named(self.store[at, "turn"])
        elif number == 0:
            keys = [(at, f"at/{each}") for each in range(len(self.ranks))]
            if all(key in self.store for key in keys):
                self.store[at, "turn"] = turn_of_round(self.store[key] for key in keys)


STEPS = st.lists(st.integers(0, 6), min_size=1, max_size=12)
MOVES = st.lists(st.tuples(st.sampled_from(["loop", "thread", "signal"]), st.integers(0, 3)))


@settings(max_examples=2000 if IS_FULL else 200, deadline=None)
@given(num_ranks=st.integers(2, 4), steps=STEPS, moves=MOVES)
def test_ranks_make_the_same_rounds_in_any_order_of_events(
    num_ranks: int, steps: list[int], moves: list[tuple[str, int]]
) -> None:
    job = Job(num_ranks, steps)
    for kind, number in moves:
        number %= num_ranks
        if kind == "signal":
            job.ranks[number].has_signal = True
        else:
            getattr(job, f"move_{kind}")(number)
    for _ in range(100):  # then each rank moves in turn: the job ends
        for number in range(num_ranks):
            job.move_loop(number)
            job.move_thread(number)
        if all(rank.has_left for rank in job.ranks):
            break
    else:
        pytest.fail("a rank waits without end")
    assert all(rank.rounds == job.ranks[0].rounds for rank in job.ranks)
    assert job.ranks[0].rounds[0] == (1, steps[0])


@settings(max_examples=50, deadline=None)
@given(
    num_ranks=st.integers(2, 4), ahead=st.lists(st.integers(0, 5), min_size=4), who=st.integers(0)
)
def test_a_signal_is_heard_one_step_after_the_fastest_rank(
    num_ranks: int, ahead: list[int], who: int
) -> None:
    job = Job(num_ranks, range(20))
    while not job.ranks[0].rounds:
        for number in range(num_ranks):
            job.move_loop(number)
    for number in range(num_ranks):
        for _ in range(ahead[number]):
            job.move_loop(number)
    job.ranks[who % num_ranks].has_signal = True
    fastest = max(rank.position.turn for rank in job.ranks)
    for _ in range(3):
        for number in reversed(range(num_ranks)):
            job.move_thread(number)
    for _ in range(30):
        for number in range(num_ranks):
            job.move_loop(number)
    assert job.ranks[0].rounds[1][0] == fastest + 1


# ------------------------------------------------------------------------------------ the threads


class Members:
    """Ranks as threads, with the turns of a job that runs on a store in memory."""

    def __init__(self, num_ranks: int, timeout_seconds: float = 30.0) -> None:
        self.store = MemoryStore()
        self.asking = [False] * num_ranks
        self.turns = [
            StoreTurns(
                Member(
                    self.store,
                    "turns",
                    rank=rank,
                    num_ranks=num_ranks,
                    timeout_seconds=lambda: timeout_seconds,
                    period_seconds=0.01,
                    is_wanted=lambda rank=rank: self.asking[rank],
                )
            )
            for rank in range(num_ranks)
        ]

    def ask(self, rank: int) -> None:
        self.asking[rank] = True
        self.turns[rank].wake()

    def run(self, job: Any, *ranks: int) -> list[Any]:
        chosen = ranks or range(len(self.turns))
        with futures.ThreadPoolExecutor(len(chosen)) as pool:
            jobs = [pool.submit(job, rank, self.turns[rank]) for rank in chosen]
        return [each.exception() or each.result() for each in jobs]

    def close(self) -> None:
        for turns in self.turns:
            turns.close()


def test_threads_name_a_turn_for_all() -> None:
    for seed in range(20 if IS_FULL else 4):
        members = Members(3)

        def job(rank: int, turns: StoreTurns, members: Members = members, seed: int = seed) -> Any:
            draw = random.Random(f"{seed} {rank}")
            rounds: list[int] = []
            for step in range(60):
                if draw.random() < 0.05:
                    members.ask(rank)
                time.sleep(draw.random() * 0.004)
                if turns.enter(step):
                    members.asking[rank] = False
                    rounds.append(step)
                    turns.finish()
            turns.close()
            return rounds

        first, *others = members.run(job)
        assert len(first) >= 2 and first[0] == 0
        assert others == [first, first]
        # Those of the last two rounds, and where the ranks stopped.
        assert len(members.store.values) <= 2 * 4 + 4


@pytest.mark.parametrize("pause_seconds", [0.1, 6.0], ids=["already waiting", "later"])
def test_a_rank_that_does_not_answer_is_named(pause_seconds: float) -> None:
    members = Members(3, timeout_seconds=5.0)
    assert members.run(lambda _, turns: (turns.enter(0), turns.finish())) == [(True, None)] * 3
    members.turns[2]._member.nudges = members.turns[1]._member.nudges  # its thread hears nothing
    members.turns[2]._member._period_seconds = 60.0
    time.sleep(0.05)  # the last look by the old period
    members.ask(0)
    time.sleep(pause_seconds)
    for error in members.run(lambda _, turns: turns.enter(1), 0, 1):
        assert isinstance(error, errors.CoordinationTimeoutError)
        assert error.ranks == (2,)
        assert "2 did not report its step within 5 s" in str(error)
    members.close()


def test_ranks_behind_a_primary_that_leaves_finish_without_it() -> None:
    members = Members(2)
    members.run(lambda _, turns: (turns.enter(0), turns.finish()))
    assert not any(members.turns[0].enter(step) for step in range(1, 5))
    members.turns[0].close()
    time.sleep(0.1)
    members.ask(1)
    assert not any(members.turns[1].enter(step) for step in range(1, 5))
    assert members.turns[1].enter(5), "beyond the last step of the primary"
    members.close()


# ------------------------------------------------------------------------------------ processes


def train(directory: Path, seed: int, victims: Sequence[int], on_busy: Any) -> dict[str, Any]:
    """A loop in which every rank has its own pace; victims get SIGTERM at a step."""
    rank = dist.get_rank()
    draw = random.Random(f"{seed} {rank}")
    shared = random.Random(seed)
    signal_at = shared.randrange(20) + (draw.randrange(3) if len(victims) > 1 else 0)
    asks_first, forced = shared.random() < 0.5, shared.randrange(40)
    rounds: list[tuple[str, int]] = []
    saved: list[int] = []
    stopped = None
    policies = [fc.policies.every("90m"), fc.policies.every(25), fc.policies.Preemption()]
    with fc.CheckpointManager(
        directory,
        save_policy=policies,
        overwrite=True,
        on_busy=on_busy,
        coordinator=Counting(default_coordinator(timeout_seconds=60.0), rounds),
    ) as manager:
        step = 0
        for count in range(2_000):
            step += shared.choice((1, 1, 1, 7))
            if count == 12:
                manager.wait_until_finished()
                step = manager.restore().next_step
            time.sleep(draw.random() * 0.01)
            if rank in victims and count == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if asks_first:
                manager.reached_preemption(step)
            if manager.save(step, {"tree": {"x": torch.ones(2)}}, force=count in (0, forced)):
                saved.append(step)
            if manager.reached_preemption(step):
                stopped = step
                break
        manager.wait_until_finished()
        latest = manager.latest_step()
    asked = [name for name, _ in rounds if name.startswith("whether to save")]
    return {"saved": saved, "stopped": stopped, "latest": latest, "rounds": asked}


@pytest.mark.parametrize("victims", [(0,), (2,), (0, 1, 2)], ids=["primary", "other", "all"])
@pytest.mark.parametrize("seed", range(6 if IS_FULL else 1))
def test_a_signal_at_any_time_stops_all_ranks_at_one_saved_step(
    victims: tuple[int, ...], seed: int, workers: Workers, tmp_path: Path
) -> None:
    on_busy = "skip" if len(victims) > 1 else "wait"
    first, *others = workers.run(3, train, tmp_path, seed, victims, on_busy)
    assert others == [first, first]
    assert first["stopped"] == first["latest"] == first["saved"][-1]
    # The first step, and one round that has heard of the signal or two if that came during one.
    assert 2 <= len(first["rounds"]) <= 3


def refuse(directory: Path, policies: Sequence[Any], num_steps: int) -> dict[str, Any]:
    rounds: list[tuple[str, int]] = []
    coordinator = Counting(default_coordinator(), rounds)
    with fc.CheckpointManager(directory, save_policy=policies, coordinator=coordinator) as manager:
        assert manager.save(0, {"x": 1}) is None
        rounds.clear()
        start = time.monotonic()
        for step in range(1, num_steps):
            assert manager.save(step, {"x": 1}) is None
            assert not manager.reached_preemption(step)
        return {"rounds": len(rounds), "seconds": time.monotonic() - start}


@pytest.mark.parametrize("policy", ["90m", "signal"])
def test_refused_saves_need_no_round(policy: str, workers: Workers, tmp_path: Path) -> None:
    preemption = fc.policies.Preemption()
    clock = [fc.policies.every("90m"), preemption]
    policies = clock if policy == "90m" else [fc.policies.SpecificSteps([]), preemption]
    found = workers.run(4, refuse, tmp_path, policies, 1_000)
    assert [each["rounds"] for each in found] == [0] * 4


def save_by_clock(directory: Path) -> tuple[list[int], int]:
    rounds: list[tuple[str, int]] = []
    saved: list[int] = []
    coordinator = Counting(default_coordinator(), rounds)
    with fc.CheckpointManager(directory, save_policy="1s", coordinator=coordinator) as manager:
        for step in range(1_000):
            time.sleep(0.005 + 0.001 * dist.get_rank())
            if manager.reached_preemption(step) or manager.save(step, {"x": 1}):
                saved.append(step)
            if len(saved) == 2:
                break
    return saved, sum(name.startswith("whether") for name, _ in rounds)


def test_the_clock_saves_on_all_ranks_in_one_round_each(workers: Workers, tmp_path: Path) -> None:
    first, *others = workers.run(2, save_by_clock, tmp_path)
    assert others == [first]
    saved, num_rounds = first
    assert len(saved) == 2 and num_rounds <= 5
