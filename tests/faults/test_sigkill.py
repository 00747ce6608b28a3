"""Killed at any instant: reported steps are intact bit for bit, no partial step is listed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torture
from full import IS_FULL

import functional_ckpt as fc
from functional_ckpt import testing

NUM_KILLS = 200 if IS_FULL else 60


class Template:
    """The process that forks victims; see `torture`."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, torture.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def kill_one(
        self, root: Path, seed: int, version: int, num_saves: int | None, seconds: float
    ) -> list[tuple[int, int]]:
        """Starts a victim, and kills it some time after a number of reported saves.

        Args:
            root: Where it saves.
            seed: Of its choices.
            version: The first version it saves, less one.
            num_saves: How many reports to wait for; None to count the seconds from the fork.
            seconds: How long to wait then.

        Returns:
            Step and version of every save that it reported.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{root} {seed} {version}\n")
        self._process.stdin.flush()
        word, pid = self._read_until("pid")[-1].split()
        assert word == "pid"
        lines: list[str] = []
        if num_saves is not None:
            lines += self._read_until("opened")
            for _ in range(num_saves):
                lines += self._read_until("saved")
        time.sleep(seconds)
        os.kill(int(pid), signal.SIGKILL)
        lines += self._read_until("dead")
        assert lines[-1] == f"dead {-signal.SIGKILL}", lines
        saved = [line.split()[1:] for line in lines if line.startswith("saved")]
        return [(int(step), int(version)) for step, version in saved]

    def _read_until(self, word: str) -> list[str]:
        lines = [self._read()]
        while not lines[-1].startswith(word):
            assert lines[-1] and not lines[-1].startswith("dead"), lines
            lines.append(self._read())
        return lines

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()


@pytest.fixture
def template() -> Iterator[Template]:
    made = Template()
    yield made
    made.close()


@pytest.mark.slow
def test_kills_at_any_instant_lose_nothing(
    tmp_path: Path, template: Template, figure: Callable[[str], None]
) -> None:
    root = tmp_path / "run"
    choose = random.Random(0)
    reported: dict[int, int] = {}
    live, expected = torture.new_items(), torture.new_items()
    num_checked = num_reported = num_overwritten = 0
    version = 0
    for kill in range(NUM_KILLS):
        # Every fifth is killed while it opens the directory, the others in their first few saves.
        num_saves = choose.randrange(5) if kill % 5 else None
        seconds = choose.uniform(0.0, 0.06)
        for step, reported_version in template.kill_one(root, kill, version, num_saves, seconds):
            num_overwritten += step in reported
            num_reported += 1
            reported[step] = reported_version
        version += 1000  # later than anything this victim can have reached
        if not root.exists():
            continue
        held = check_steps(root, live, expected)
        check_losses(held, reported)
        num_checked += len(held)
        reported = {step: held[step] for step in held}
        if kill % 3:  # every third time the next victim is the next writer, and is killed in turn
            check_next_writer(root, list(held))
    check_next_writer(root, list(check_steps(root, live, expected)))
    assert num_reported > NUM_KILLS and num_overwritten > NUM_KILLS / 10
    figure(
        f"{NUM_KILLS} kills, {num_reported} steps reported ({num_overwritten} overwritten), "
        f"{num_checked} steps checked, 0 losses"
    )


def check_steps(root: Path, live: dict[str, Any], expected: dict[str, Any]) -> dict[int, int]:
    """Restores every step that is listed, compares every bit; returns step -> version."""
    held: dict[int, int] = {}
    with fc.CheckpointManager(root, read_only=True) as manager:
        for step in manager.all_steps():
            restored = manager.restore(step, live)
            version = restored["tree"]["version"]
            torture.fill(expected, step, version)
            assert restored["config"] == {"version": version}
            assert restored.metrics == {"version": version}
            got = _state({**live, "tree": restored["tree"]})
            assert testing.differences(got, _state(expected), f"step {step}") == []
            held[step] = version
    return held


def _state(items: dict[str, Any]) -> dict[str, Any]:
    model, optimizer = items["model"], torture.optimizer_of(items)
    return {
        "model": dict(model.state_dict()),
        "optimizer": [optimizer.state[parameter] for parameter in model.parameters()],
        "lr": optimizer.param_groups[0]["lr"],
        "tree": items["tree"],
    }


def check_losses(held: dict[int, int], reported: dict[int, int]) -> None:
    """A reported step is there as reported or newer, unless enough later ones let it be pruned."""
    for step, version in reported.items():
        if step in held:
            assert held[step] >= version, f"step {step} went back to version {held[step]}"
        else:
            num_later = sum(other > step for other in held)
            assert num_later >= torture.KEEP, f"step {step} is lost; there are {sorted(held)}"


def check_next_writer(root: Path, steps: list[int]) -> None:
    with fc.CheckpointManager(root, keep_policy=fc.policies.LatestN(torture.KEEP)) as manager:
        assert manager.all_steps() == steps
    assert sorted(path.name for path in root.iterdir() if path.name[0] != ".") == sorted(
        map(str, steps)
    )
    hidden = root / ".functional_ckpt"
    assert {path.name for path in hidden.iterdir()} <= {"lock", "trash", "metrics", "history.jsonl"}
    assert not (hidden / "trash").exists() or not list((hidden / "trash").iterdir())
