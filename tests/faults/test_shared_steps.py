"""Whatever happens to steps that share files, no other step is lost."""

from __future__ import annotations

import collections
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import hypothesis
import pytest
import shared_steps
from full import IS_FULL
from hypothesis import stateful
from hypothesis import strategies as st

import functional_ckpt as fc
import scripts
from functional_ckpt import errors, testing
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

    def save(
        self,
        root: Path,
        saves: Sequence[tuple[int, int]],
        *,
        kill_at: int = 0,
        errno: int = 0,
        refresh: int = 100,
        far: str = "",
        back_to: int | None = None,
    ) -> list[str]:
        """Returns the reported events; see `shared_steps.save`."""
        task = {"root": str(root), "saves": saves, "kill_at": kill_at, "errno": errno}
        task |= {"refresh": refresh, "far": far, "back_to": back_to}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        reported: list[str] = []
        while not (line := self._read()).startswith("ended"):
            reported.append(line)
        assert int(line.split()[1]) in (0, -signal.SIGKILL), line
        return reported

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()


NUMBERS = st.integers(0, 99)
KILLS = st.just(0) | st.integers(1, 120)


class SharedSteps(stateful.RuleBasedStateMachine):
    """A run, of which every step is somewhere, intact or damaged by its own or a shared file."""

    victims: Victims

    def __init__(self) -> None:
        super().__init__()
        self.top = Path(tempfile.mkdtemp())
        self.root = self.top / "run"
        self.root.mkdir()
        self.paths: dict[int, Path] = {}
        self.versions: dict[int, int] = {}
        self.damaged: set[int] = set()  # inodes
        self.open: list[IO[bytes]] = []  # the damaged files: their numbers are not given to others
        self.first = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.most_links = 0

    def teardown(self) -> None:
        self.check_all()
        for file in self.open:
            file.close()
        shutil.rmtree(self.top)

    def drawn(self, number: int, *, in_run: bool = False) -> int | None:
        """A step that is there."""
        steps = sorted(
            n for n, path in self.paths.items() if path.parent == self.root or not in_run
        )
        return steps[number % len(steps)] if steps else None

    def held(self, step: int) -> set[int]:
        """The inodes of a step."""
        return {each.stat().st_ino for each in self.paths[step].rglob("*")}

    # ------------------------------------------------------------------------------------ saves

    @stateful.rule(
        count=st.integers(1, 3),
        kill_at=KILLS,
        errno=st.sampled_from([0, 0, 0, errno.EMLINK, errno.EPERM, errno.EXDEV]),
        refresh=st.sampled_from([100, 2]),
        has_tier=st.booleans(),
    )
    def save(self, count: int, kill_at: int, errno: int, refresh: int, *, has_tier: bool) -> None:
        self.counts["saves"] += 1
        steps = range(self.first, self.first + count)
        reported = self.victims.save(
            self.root,
            [(step, 0) for step in steps],
            kill_at=kill_at,
            errno=errno,
            refresh=refresh,
            far=str(self.top / "far") if has_tier else "",
        )
        assert kill_at or len(reported) == count
        for step in steps:
            self.born(step, 0, is_reported=f"saved {step}" in reported)
        self.first += count
        self.most_links = max([self.most_links, *map(self.num_links, self.paths.values())])

    def born(self, step: int, version: int, *, is_reported: bool) -> None:
        """A step was saved, or perhaps: it has no file that was damaged before."""
        path = self.root / str(step)
        assert path.exists() or not is_reported
        if path.exists():  # one that was being reported is complete
            self.paths[step], self.versions[step] = path, version
            assert not self.held(step) & self.damaged

    @stateful.rule(number=NUMBERS, kill_at=KILLS)
    def overwrite(self, number: int, kill_at: int) -> None:
        step = self.drawn(number, in_run=True)
        if step is None:
            return
        self.counts["overwrites"] += 1
        old, was_damaged = self.versions[step], bool(self.held(step) & self.damaged)
        reported = self.victims.save(self.root, [(step, old + 1)], kill_at=kill_at)
        assert kill_at or reported
        if was_damaged and self.held(step) & self.damaged:
            assert not reported
            return
        found = fc.restore(self.paths[step])["n"]["version"]
        assert found == old + 1 or (found == old and not reported)
        self.born(step, found, is_reported=bool(reported))

    @stateful.rule(number=NUMBERS, kill_at=KILLS)
    def roll_back(self, number: int, kill_at: int) -> None:
        step = self.drawn(number, in_run=True)
        if step is None:
            return
        self.counts["rollbacks"] += 1
        was_damaged = bool(self.held(step) & self.damaged)
        reported = self.victims.save(self.root, [(self.first, 0)], kill_at=kill_at, back_to=step)
        assert not was_damaged or not reported
        for later in [n for n, path in self.paths.items() if path.parent == self.root and n > step]:
            if "back" in reported:
                assert not self.paths[later].exists()
            if not was_damaged and not self.paths[later].exists():
                del self.paths[later]
        self.born(self.first, 0, is_reported=f"saved {self.first}" in reported)
        self.first += 1

    @stateful.rule()
    def save_beside_a_writer(self) -> None:
        self.counts["second writers"] += 1
        with fc.CheckpointManager(self.root) as manager:
            assert self.victims.save(self.root, [(self.first, 0)]) == ["locked"]
            manager.save(self.first, shared_steps.items_of(self.first))
        self.born(self.first, 0, is_reported=True)
        self.first += 1

    @stateful.rule(at=st.integers(1, 10**6), by=st.sampled_from(["verify", "restore"]))
    def damage_under_a_writer(self, at: int, by: str) -> None:
        """Damage that was found is in no later step, though the writer knows the file."""
        self.counts["damages found while a writer has the file"] += 1
        with fc.CheckpointManager(self.root) as manager:
            for number in range(3):
                step = self.first + number
                manager.save(step, shared_steps.items_of(step))
                manager.wait_until_finished()
                if number == 2:
                    self.born(step, 0, is_reported=True)
                    break
                self.born(step, 0, is_reported=True)
                if number == 1 and self.flip(self.files(step)[-1], at):
                    if by == "verify":
                        self.check_step(step)
                    else:
                        with pytest.raises(errors.CorruptCheckpointError):
                            manager.restore(step)
        self.first += 3

    # ---------------------------------------------------------------------- what happens to steps

    @stateful.rule(number=NUMBERS, by_manager=st.booleans())
    def delete(self, number: int, *, by_manager: bool) -> None:
        step = self.drawn(number)
        if step is None:
            return
        self.counts["deletions"] += 1
        path = self.paths.pop(step)
        if by_manager and path.parent == self.root:
            with fc.CheckpointManager(self.root) as manager:
                manager.delete(step)
        else:
            shutil.rmtree(path)

    @stateful.rule(number=NUMBERS)
    def move(self, number: int) -> None:
        step = self.drawn(number, in_run=True)
        if step is not None:
            self.counts["moves of steps"] += 1
            self.paths[step] = self.paths[step].rename(self.top / f"moved-{step}")

    @stateful.rule()
    def move_the_run(self) -> None:
        self.counts["moves of the run"] += 1
        old, self.root = self.root, self.top / f"run-{self.counts.total()}"
        old.rename(self.root)
        for step, path in self.paths.items():
            if path.parent == old:
                self.paths[step] = self.root / path.name

    @stateful.rule(number=NUMBERS, how=st.sampled_from(["cp -r", "cp -a", "rsync -a", "tar"]))
    def copy(self, number: int, how: str) -> None:
        step = self.drawn(number, in_run=True)
        if step is None or shutil.which(how.split()[0]) is None:
            return
        self.counts[how] += 1
        copied = self.top / "copied"
        copied.mkdir()
        if how == "tar":
            with subprocess.Popen(["tar", "-cC", self.root, "."], stdout=subprocess.PIPE) as tar:
                subprocess.run(["tar", "-xC", copied], stdin=tar.stdout, check=True)
        else:
            subprocess.run([*how.split(), f"{self.root}/.", copied], check=True)
        self.check_at(copied / str(step), step)
        shutil.rmtree(copied)

    @stateful.rule(number=NUMBERS, at=st.integers(1, 10**6), own=st.booleans())
    def damage(self, number: int, at: int, *, own: bool) -> None:
        step = self.drawn(number)
        if step is not None and self.flip(self.files(step)[0 if own else -1], at):
            self.counts["damages"] += 1

    def files(self, step: int) -> list[Path]:
        """The data files of a step, the smallest first."""
        return sorted((self.paths[step] / "model").glob("*.safetensors"), key=os.path.getsize)

    def flip(self, file: Path, at: int) -> bool:
        """Flips a bit as a disk does: no time changes; not if the file is damaged already."""
        before = file.stat()
        if before.st_ino in self.damaged:
            return False  # a second bit could be the same
        with file.open("r+b") as opened:
            opened.seek(-at % before.st_size)
            (byte,) = opened.read(1)
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte ^ 1]))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.damaged.add(before.st_ino)
        self.open.append(file.open("rb"))
        return True

    # ------------------------------------------------------------------------------------ checks

    @stateful.rule(number=NUMBERS)
    def check(self, number: int) -> None:
        step = self.drawn(number)
        if step is not None:
            self.check_step(step)

    def check_all(self) -> None:
        for step in self.paths:
            self.check_step(step)
        far = self.top / "far"
        for path in far.iterdir() if far.exists() else ():
            if path.name.isdigit():
                assert verify(path) == []
                self.check_values(path, int(path.name), fc.restore(path)["n"]["version"])

    def check_step(self, step: int) -> None:
        self.check_at(self.paths[step], step)

    def check_at(self, path: Path, step: int) -> None:
        """The step, or a copy of it, is intact, unless a file of the step is damaged."""
        findings = verify(path)
        assert bool(findings) == bool(self.held(step) & self.damaged), (step, findings)
        if not findings:
            self.check_values(path, step, self.versions[step])

    @staticmethod
    def check_values(path: Path, step: int, version: int) -> None:
        expected = shared_steps.items_of(step, version)
        found = fc.restore(path)
        assert found["n"] == expected["n"]
        state = dict(expected["model"].state_dict())
        assert not testing.differences(state, dict(found["model"]))

    @staticmethod
    def num_links(path: Path) -> int:
        return max(each.stat().st_nlink for each in (path / "model").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(7200 if IS_FULL else 300)
def test_no_step_is_lost_by_what_happens_to_another(figure: Callable[[str], None]) -> None:
    SharedSteps.victims = Victims()
    counts: collections.Counter[str] = collections.Counter()
    links: list[int] = []
    finish = SharedSteps.teardown

    def teardown(self: SharedSteps) -> None:
        counts.update(self.counts)
        links.append(self.most_links)
        finish(self)

    try:
        for seed in itertools.count():
            machine = hypothesis.seed(seed)(type("Machine", (SharedSteps,), {"teardown": teardown}))
            stateful.run_state_machine_as_test(
                machine,
                settings=hypothesis.settings(
                    max_examples=20 if IS_FULL else 2,
                    stateful_step_count=40 if IS_FULL else 10,
                    phases=[hypothesis.Phase.generate],
                    deadline=None,
                    database=None,
                    suppress_health_check=list(hypothesis.HealthCheck),
                ),
            )
            if not IS_FULL or counts.total() >= 1000:
                break
    finally:
        SharedSteps.victims.close()
    if IS_FULL:
        assert max(links) > 1
    text = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    figure(f"{counts.total()} actions: {text}; up to {max(links)} steps shared a file")
