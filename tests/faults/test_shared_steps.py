"""Deletions, kills, moves and damage over steps that share files: no other step is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import shared_steps
from full import IS_FULL
from hypothesis import stateful
from hypothesis import strategies as st

import functional_ckpt as fc
import scripts
from functional_ckpt import testing
from functional_ckpt.verify import verify


class Victims:
    """The process that forks those that save; one for all examples."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, shared_steps.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=scripts.environment(),
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def save(self, root: Path, first: int, count: int, kill_at: int) -> list[int]:
        """Returns the steps that were reported as saved."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{root} {first} {count} {kill_at}\n")
        self._process.stdin.flush()
        reported: list[int] = []
        while (line := self._read().split())[0] == "saved":
            reported.append(int(line[1]))
        assert line[0] == "ended" and int(line[1]) in (0, -signal.SIGKILL), line
        return reported

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()


class SharedSteps(stateful.RuleBasedStateMachine):
    """A run, of which every step is somewhere, intact or damaged by its own or a shared file."""

    victims: Victims

    def __init__(self) -> None:
        super().__init__()
        self.top = Path(tempfile.mkdtemp())
        self.root = self.top / "run"
        self.root.mkdir()
        self.paths: dict[int, Path] = {}
        self.damaged: set[int] = set()  # inodes
        self.first = 0
        self.num_actions = self.most_links = 0

    def teardown(self) -> None:
        self.check_all()
        shutil.rmtree(self.top)

    def drawn(self, number: int) -> int | None:
        """A step that is there."""
        steps = sorted(self.paths)
        return steps[number % len(steps)] if steps else None

    @stateful.rule(count=st.integers(1, 3), kill_at=st.just(0) | st.integers(1, 120))
    def save(self, count: int, kill_at: int) -> None:
        self.num_actions += 1
        reported = self.victims.save(self.root, self.first, count, kill_at)
        assert kill_at or len(reported) == count
        for step in range(self.first, self.first + count):
            path = self.root / str(step)
            assert path.exists() or step not in reported
            if path.exists():  # one that was being reported is complete
                self.paths[step] = path
        self.first += count
        self.most_links = max([self.most_links, *map(self.num_links, self.paths.values())])

    @stateful.rule(number=st.integers(0, 99), by_manager=st.booleans())
    def delete(self, number: int, *, by_manager: bool) -> None:
        step = self.drawn(number)
        if step is None:
            return
        self.num_actions += 1
        path = self.paths.pop(step)
        inodes = {each.stat().st_ino for each in path.rglob("*") if each.stat().st_nlink == 1}
        if by_manager and path.parent == self.root:
            with fc.CheckpointManager(self.root) as manager:
                manager.delete(step)
        else:
            shutil.rmtree(path)
        self.damaged -= inodes  # the numbers are given to other files

    @stateful.rule(number=st.integers(0, 99))
    def move(self, number: int) -> None:
        step = self.drawn(number)
        if step is not None and self.paths[step].parent == self.root:
            self.num_actions += 1
            self.paths[step] = self.paths[step].rename(self.top / f"moved-{step}")

    @stateful.rule(number=st.integers(0, 99), at=st.integers(1, 10**6), own=st.booleans())
    def damage(self, number: int, at: int, *, own: bool) -> None:
        step = self.drawn(number)
        if step is None:
            return
        files = sorted((self.paths[step] / "model").glob("*.safetensors"), key=os.path.getsize)
        file = files[0 if own else -1]
        before = file.stat()
        if before.st_ino in self.damaged:
            return  # a second bit could be the same
        with file.open("r+b") as opened:
            opened.seek(-at % before.st_size)
            (byte,) = opened.read(1)
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte ^ 1]))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.damaged.add(before.st_ino)
        self.num_actions += 1

    @stateful.rule(number=st.integers(0, 99))
    def check(self, number: int) -> None:
        step = self.drawn(number)
        if step is not None:
            self.check_step(step)

    def check_all(self) -> None:
        for step in self.paths:
            self.check_step(step)

    def check_step(self, step: int) -> None:
        path = self.paths[step]
        held = {each.stat().st_ino for each in path.rglob("*")}
        findings = verify(path)
        assert bool(findings) == bool(held & self.damaged), (step, findings)
        if not findings:
            expected = shared_steps.items_of(step)
            found = fc.restore(path)
            assert found["n"] == expected["n"]
            state = dict(expected["model"].state_dict())
            assert not testing.differences(state, dict(found["model"]))

    @staticmethod
    def num_links(path: Path) -> int:
        return max(each.stat().st_nlink for each in (path / "model").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800 if IS_FULL else 300)
def test_no_step_is_lost_by_what_happens_to_another(figure: Callable[[str], None]) -> None:
    SharedSteps.victims = Victims()
    most: list[tuple[int, int]] = []
    finish = SharedSteps.teardown

    def teardown(self: SharedSteps) -> None:
        most.append((self.num_actions, self.most_links))
        finish(self)

    machine = type("Machine", (SharedSteps,), {"teardown": teardown})
    try:
        stateful.run_state_machine_as_test(
            machine,
            settings=hypothesis.settings(
                max_examples=80 if IS_FULL else 2,
                stateful_step_count=40 if IS_FULL else 10,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            ),
        )
    finally:
        SharedSteps.victims.close()
    links = max(links for _, links in most)
    assert links > 1
    num_actions = sum(count for count, _ in most)
    figure(f"{num_actions} saves, deletions, moves and damages; up to {links} steps shared a file")
