"""One of several ranks fails, in every way, at every point: none hangs, no step is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import full
import pytest
from ranks import KINDS, PATIENCE_SECONDS, POINTS, TIMEOUT_SECONDS, put, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_RANKS = 3
# A rank waits its timeout, and two seconds more for the primary's word; the rest is a busy machine.
LONGEST_SECONDS = TIMEOUT_SECONDS + 2 + 4
NUM_AT_ONCE = 8


class Launcher:
    """Forks ranks from a template, and hosts their store as torchrun does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mutex = threading.Lock()
        self._numbers = itertools.count()
        script = Path(__file__).with_name("ranks.py")
        self._template = subprocess.Popen(
            [sys.executable, "-W", "error", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A store asks DNS for the names of those who connect, and answers no one meanwhile: not
            # for the five seconds, please, that a lost packet costs.
            env=os.environ | {"RES_OPTIONS": "timeout:1 attempts:1"},
        )
        assert self._line() == "ready"
        self._port = 0
        self._host = self.start("host", num_ranks=1, host="none")
        self._port = int(wait_for(self._host.folder / "port"))

    def start(self, job: str, *, num_ranks: int = NUM_RANKS, **request: Any) -> Job:
        """Starts a job; its directory is its own unless `root` is given."""
        number = next(self._numbers)
        folder = self._folder / f"{number}-{job}"
        folder.mkdir()
        request = {
            "job": job,
            "id": f"job-{number}",
            "folder": str(folder),
            "root": str(folder / "root"),
            "num_ranks": num_ranks,
            "host": "launcher",
            "port": self._port,
        } | request
        pids = [self._fork(request | {"rank": rank}) for rank in range(num_ranks)]
        return Job(folder, request["root"], pids)

    def run(self, job: str, **request: Any) -> Job:
        """Starts a job and waits until all of its ranks are done."""
        started = self.start(job, **request)
        started.finish(*range(len(started.pids)))
        return started

    def close(self) -> None:
        self._host.kill()
        assert self._template.stdin is not None
        self._template.stdin.close()
        self._template.wait(10)
        assert self._template.stdout is not None
        self._template.stdout.close()

    def _fork(self, request: dict[str, Any]) -> int:
        with self._mutex:
            assert self._template.stdin is not None
            self._template.stdin.write(json.dumps(request) + "\n")
            self._template.stdin.flush()
            return int(self._line())

    def _line(self) -> str:
        assert self._template.stdout is not None
        return self._template.stdout.readline().strip()


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    folder: Path
    root: str
    pids: list[int]

    def events(self, rank: int) -> list[dict[str, Any]]:
        path = self.folder / f"{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait(self, rank: int, event: str) -> dict[str, Any]:
        """The rank's first event of that name; fails when the rank broke or hangs."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            found = self.events(rank)
            for each in found:
                if each["event"] == event:
                    return each
                if each["event"] == "broken":
                    self.kill()
                    raise AssertionError(f"{self.folder.name}: rank {rank}: {each['text']}")
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"{self.folder.name}: rank {rank} hangs; it reported {found}")

    def finish(self, *ranks: int) -> None:
        """Waits until the ranks are done and have left the interpreter in peace."""
        for rank in ranks:
            self.wait(rank, "done")
            code = wait_for(self.folder / f"exit-{rank}")
            assert code == "0", f"{self.folder.name}: rank {rank} exited with {code}"

    def all(self, event: str) -> list[dict[str, Any]]:
        """Every rank's event of that name."""
        return [self.wait(rank, event) for rank in range(len(self.pids))]

    def kill(self, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGKILL)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    made = Launcher(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


# ---------------------------------------------------------------------------- the matrix


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    kind: str
    point: str
    victim: int
    host: str = "launcher"

    def __str__(self) -> str:
        host = "" if self.host == "launcher" else "-that-hosts-the-store"
        return f"{self.kind}-{self.point}-rank-{self.victim}{host}"

    @property
    def is_remote(self) -> bool:
        """Whether the victim is struck while the primary works without the others."""
        return self.victim != 0 and self.point in ("merging", "renamed")

    @property
    def may_be_saved(self) -> bool:
        """Whether step 1 may be complete on disk."""
        if self.kind == "stall" and self.victim == 0 and self.host == "first":
            # The others could not leave word that they had given up: when the primary wakes, it
            # finds all that they wrote.
            return self.point == "writing"
        is_late = self.point in ("merging", "renamed")
        return is_late and (self.is_remote or self.point == "renamed" or self.kind == "stall")

    @property
    def must_be_saved(self) -> bool:
        """Whether step 1 was reported by a rank."""
        return self.is_remote


ALL_CELLS = [Cell(kind, point, victim) for kind in KINDS for point in POINTS for victim in (0, 1)]
ALL_CELLS += [Cell("kill", point, 0, host="first") for point in POINTS]
ALL_CELLS += [Cell("stall", point, 0, host="first") for point in ("writing", "before-staging")]
CELLS = full.drawn(ALL_CELLS, 2)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    cell: Cell
    root: str
    failed: dict[int, dict[str, Any]]
    """Rank -> the first error after the fault; every rank that lives has one."""
    went_on: dict[int, dict[str, Any]]
    """Rank -> the outcome of a later save of the same processes."""


def play(launcher: Launcher, cell: Cell) -> Outcome:
    """Runs one cell of the matrix."""
    job = launcher.start(
        "matrix", kind=cell.kind, point=cell.point, victim=cell.victim, host=cell.host
    )
    living = [rank for rank in range(NUM_RANKS) if cell.kind == "raise" or rank != cell.victim]
    failed = {rank: job.wait(rank, "failed") for rank in living}
    went_on: dict[int, dict[str, Any]] = {}
    if cell.kind == "stall":
        os.kill(job.pids[cell.victim], signal.SIGCONT)
        failed[cell.victim] = job.wait(cell.victim, "failed")
        living.append(cell.victim)
    put(job.folder / "go", "leave" if cell.kind == "kill" else "on")
    if cell.kind != "kill":
        went_on = {rank: job.wait(rank, "went-on") for rank in living}
    job.finish(*living)
    return Outcome(cell, job.root, failed, went_on)


@pytest.fixture(scope="module")
def outcomes(launcher: Launcher, request: pytest.FixtureRequest) -> dict[Cell, Outcome | Exception]:
    """Every cell that a test asks for, several at a time: they mostly wait."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cells = list(dict.fromkeys(params["cell"] for params in asked if "cell" in params))

    def guarded(cell: Cell) -> Outcome | Exception:
        try:
            return play(launcher, cell)
        except (AssertionError, OSError) as error:
            return error

    with futures.ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        return dict(zip(cells, pool.map(guarded, cells), strict=True))


@pytest.fixture(scope="module")
def aftermath(launcher: Launcher, outcomes: dict[Cell, Outcome | Exception]) -> dict[str, Any]:
    """The findings of the next run, of two ranks, in each directory."""
    roots = [outcome.root for outcome in outcomes.values() if isinstance(outcome, Outcome)]
    job = launcher.start("aftermath", num_ranks=2, roots=roots)
    job.finish(0, 1)
    return {each["root"]: each for each in job.events(0) if each["event"] == "looked"}


def outcome_of(outcomes: dict[Cell, Outcome | Exception], cell: Cell) -> Outcome:
    outcome = outcomes[cell]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_surviving_ranks_learn_the_failed_rank_in_time(
    cell: Cell, outcomes: dict[Cell, Outcome | Exception]
) -> None:
    outcome = outcome_of(outcomes, cell)
    for rank, found in outcome.failed.items():
        assert found["error"], f"rank {rank} noticed nothing"
        assert "CheckpointError" in found["kinds"] or rank == cell.victim, found
        if rank == cell.victim:
            continue  # whatever it raises when it wakes up, or raised itself
        assert found["seconds"] < LONGEST_SECONDS, found
        assert found["ranks"] == [cell.victim], found
        assert f"rank {cell.victim}" in found["text"].lower(), found
        assert found["step"] == (2 if cell.is_remote else 1), found


@pytest.mark.parametrize("cell", [c for c in CELLS if c.kind != "kill"], ids=str)
def test_processes_continue_once_the_rank_is_back(
    cell: Cell, outcomes: dict[Cell, Outcome | Exception]
) -> None:
    outcome = outcome_of(outcomes, cell)
    assert sorted(outcome.went_on) == list(range(NUM_RANKS))
    for found in outcome.went_on.values():
        assert found["error"] is None, found


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_next_run_finds_every_step_and_no_remains(
    cell: Cell, outcomes: dict[Cell, Outcome | Exception], aftermath: dict[str, Any]
) -> None:
    found = aftermath[outcome_of(outcomes, cell).root]
    assert found["left"] == []
    assert found["restored"] == found["steps"]
    expected = {0} | ({10} if cell.kind != "kill" else set())
    assert set(found["steps"]) - {1} == expected
    if 1 in found["steps"]:
        assert cell.may_be_saved
    else:
        assert not cell.must_be_saved


# ---------------------------------------------------------------------------- other failures


def names_rank(found: dict[str, Any], rank: int) -> bool:
    return found["ranks"] == [rank] and f"rank {rank}" in found["text"].lower()


def test_a_rank_that_sees_another_directory(launcher: Launcher) -> None:
    job = launcher.run("elsewhere")
    for found in job.all("opened"):
        assert names_rank(found, 1)
        assert "All ranks must use the same directory" in found["text"]
    assert not os.path.exists(job.root + "-of-another-machine")
    assert sorted(os.listdir(job.root)) == [".functional_ckpt", "1"]
    assert sorted(os.listdir(Path(job.root, ".functional_ckpt"))) == ["history.jsonl", "lock"]


def test_a_directory_that_changes_under_one_rank(launcher: Launcher) -> None:
    job = launcher.run("unmounted")
    for found in job.all("saved"):
        assert "All ranks must use the same directory" in found["text"]
        assert names_rank(found, 1)


def test_different_calls_raise_a_collective_mismatch(launcher: Launcher) -> None:
    job = launcher.run("disagree")
    for event in ("steps", "items", "calls"):
        for found in job.all(event):
            assert names_rank(found, 1), (event, found)
            assert "the same calls" in found["text"]
            assert found["seconds"] < PATIENCE_SECONDS / 3  # the timeout is not waited for
    for found in job.all("restores"):
        assert found["error"] == "StepNotFoundError"


def test_background_failure_is_reported_once_on_every_rank(launcher: Launcher) -> None:
    job = launcher.run("background")
    for rank in range(NUM_RANKS):
        told = [each for each in job.events(rank) if each["event"] == "failed"]
        assert len(told) == 2
        for each in told:
            assert each["first"]["error"] in ("SaveError", "CoordinationError"), each
            assert "step 1" in each["first"]["text"]
            assert "injected" in each["first"]["text"]
            assert each["again"]["error"] is None, each
            assert each["steps"] == [0, 3]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_without_memory_to_stage(victim: int, launcher: Launcher) -> None:
    job = launcher.run("unsaveable", victim=victim)
    for rank, found in enumerate(job.all("saved")):
        assert "MemoryError" in found["kinds"] if rank == victim else names_rank(found, victim)
        assert found["seconds"] < PATIENCE_SECONDS / 3  # the timeout is not waited for


def test_mismatch_of_one_rank_is_raised_on_all(launcher: Launcher) -> None:
    job = launcher.run("restore_fails")
    own = {
        "mismatch": "MismatchError",
        "lift": "ValueError",
        "data": "CorruptCheckpointError",
        "record": "CorruptCheckpointError",
        "absent": "StepNotFoundError",
    }
    num_told = 0
    for rank in range(NUM_RANKS):
        for found in job.events(rank)[:-1]:
            num_told += 1
            if rank == found["victim"]:
                assert found["error"] == own[found["event"]], found
            else:
                assert names_rank(found, found["victim"]), found
            assert found["seconds"] < PATIENCE_SECONDS / 3
    assert num_told == NUM_RANKS * 9


@pytest.mark.parametrize(
    ("victim", "interval", "calls"),
    [(0, 1000, "save-all"), (2, 1000, "save-all"), (1, 1, "save-all"), (2, 1000, "save-some")],
)
def test_a_signal_to_one_rank_makes_all_save_the_same_step(
    victim: int, interval: int, calls: str, launcher: Launcher
) -> None:
    job = launcher.start("preempted", interval=interval, calls=calls, preempted_seconds=1.0)
    job.all("running")
    os.kill(job.pids[victim], signal.SIGTERM)
    stopped = job.all("stopped")
    assert len({found["step"] for found in stopped}) == 1
    assert all(found["latest"] == found["step"] for found in stopped)
    for rank in (0, 2):  # rank 1 is dead by now; the timeout was ten minutes before the signal
        found = job.wait(rank, "bounded")
        assert names_rank(found, 1), found
        assert found["seconds"] < 1 + 2 + 4
    job.finish(0, 2)


@pytest.mark.parametrize("connection", ["own", "shared"])
def test_managers_beside_and_after_each_other_leave_nothing_in_the_store(
    connection: str, launcher: Launcher
) -> None:
    job = launcher.run("many_managers", connection=connection)
    for found in job.all("keys"):
        counts: Sequence[int] = found["counts"]
        # A rank may still delete keys of its last rounds; a key a step would be ten more.
        assert max(counts[10:]) < max(counts[:10]) + 10, counts


def test_the_host_of_the_store_leaves_last(launcher: Launcher) -> None:
    jobs = [launcher.start("last_words", host="first") for _ in range(4)]
    for job in jobs:
        job.finish(*range(NUM_RANKS))
