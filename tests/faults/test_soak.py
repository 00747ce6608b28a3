"""The short form of `scripts/soak`, and its judge: the state implied by a journal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soak
import soak_journal


def write(name: str, value: str, **more: Any) -> dict[str, Any]:
    return {"kind": "begin", "what": "write", "key": "k", "name": name, "digest": value} | {
        "version": value,
        **more,
    }


def other(what: str, name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "begin", "what": what, "key": "k", "name": name, **more}


def end(name: str, is_reported: bool = True, **more: Any) -> dict[str, Any]:
    return {"kind": "end", "name": name, "is_reported": is_reported, **more}


def dead(pid: int) -> dict[str, Any]:
    return {"kind": "dead", "of": pid}


@pytest.mark.parametrize(
    ("lines", "values", "may_be_absent"),
    [
        ([write("1.1", "a")], "a", True),
        ([write("1.1", "a"), end("1.1")], "a", False),
        ([write("1.1", "a"), end("1.1"), write("1.2", "b")], "ab", False),
        ([write("1.1", "a"), end("1.1"), write("1.2", "b"), end("1.2")], "b", False),
        ([write("1.1", "a"), write("2.1", "b"), end("1.1"), end("2.1")], "ab", False),
        ([write("1.1", "a"), end("1.1", False), write("2.1", "b"), end("2.1")], "b", False),
        ([write("1.1", "a"), dead(1), write("2.1", "b"), end("2.1")], "b", False),
        ([write("1.1", "a"), write("2.1", "b"), end("2.1")], "ab", False),
        ([write("1.1", "a"), end("1.1"), other("delete", "1.2")], "a", True),
        ([write("1.1", "a"), end("1.1"), other("delete", "1.2"), dead(1)], "a", True),
        (
            [
                *(write("1.1", "a"), other("delete", "2.1"), end("2.1"), end("1.1")),
                *(write("1.2", "b"), end("1.2")),
            ],
            "b",
            False,
        ),
        ([write("1.1", "a"), end("1.1"), write("1.2", "b", may_prune=["k"])], "ab", True),
    ],
)
def test_what_may_be_found(lines: list[dict[str, Any]], values: str, may_be_absent: bool) -> None:
    register = soak_journal.registers(lines)["k"]
    assert set(register.digests) == set(values)
    assert register.may_be_absent == may_be_absent


SAVED_TWICE = [write("1.1", "a"), end("1.1"), write("1.2", "b"), end("1.2")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*SAVED_TWICE, other("read", "2.1"), end("2.1", digest="b")], None),
        ([*SAVED_TWICE, other("read", "2.1"), end("2.1", digest="a")], "was replaced"),
        ([*SAVED_TWICE, other("read", "2.1"), end("2.1", digest="c")], "never saved"),
        ([*SAVED_TWICE, other("read", "2.1"), end("2.1", False, error="Corrupt")], "got the error"),
        (
            [
                *(*SAVED_TWICE[:2], other("read", "2.1"), *SAVED_TWICE[2:]),
                end("2.1", False, error="Corrupt"),
            ],
            None,
        ),
        (
            [
                *(*SAVED_TWICE, other("damage", "0.1"), end("0.1"), other("read", "2.1")),
                end("2.1", False, error="Corrupt"),
            ],
            None,
        ),
    ],
)
def test_what_may_be_read(lines: list[dict[str, Any]], message: str | None) -> None:
    (found,) = [*soak_journal.registers(lines)["k"].wrong_reads()] or [None]
    assert found is None if message is None else message in (found or "")


@pytest.mark.slow
def test_nothing_is_lost_in_a_short_soak(tmp_path: Path, figure: Callable[[str], None]) -> None:
    # In a process of its own: it forks writers, which a process with threads must not.
    arguments = ["--seconds", "8", "--seed", "1", "--rounds", "3", "--no-store", "--folder"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", soak.__file__, *arguments, str(tmp_path / "soak")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses: 0" in done.stdout
    figure(next(line for line in done.stdout.splitlines() if line.startswith("operations")))
