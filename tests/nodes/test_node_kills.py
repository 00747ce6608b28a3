"""Ranks of two nodes that are killed in each phase of a commit: real processes."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from pathlib import Path

import node_jobs
import pytest
import torch
from full import IS_FULL
from gloo_workers import Workers

import functional_ckpt as fc

_NODES = "aabb"
# Phase, the ranks that are killed, and whether the step is committed after the restart.
_CASES = [
    ("decided", (0,), True),
    ("deciding", (0,), False),
    ("renaming", (2,), True),
    ("voted", (0, 2), False),
]
_MORE = [
    *((phase, (rank,), False) for phase in ("writing", "finalizing") for rank in range(4)),
    *((phase, (rank,), False) for phase in ("before voting", "voted") for rank in (0, 2)),
    *(("renaming", (rank,), True) for rank in (0, 1, 3)),
    *(("renamed", (rank,), True) for rank in range(4)),
    ("writing", (2, 3), False),
    ("voted", (2,), False),
    ("renaming", (0, 1), True),
    ("renaming", (0, 1, 2, 3), False),
]


@pytest.fixture
def workers() -> Generator[Workers]:
    made = Workers()
    yield made
    made.close()


@pytest.mark.parametrize(("phase", "dying", "is_committed"), _CASES + (_MORE if IS_FULL else []))
def test_ranks_that_are_killed_leave_whole_steps(
    tmp_path: Path, workers: Workers, phase: str, dying: tuple[int, ...], is_committed: bool
) -> None:
    args = (str(tmp_path), _NODES, phase, dying)
    left = workers.outcomes(4, node_jobs.save_and_die, *args, may_die=True)
    assert [rank for rank, each in enumerate(left) if each is None] == list(dying)
    assert all(left[rank] for rank in range(4) if rank not in dying), left
    found = workers.run(4, node_jobs.resume, str(tmp_path), _NODES)
    steps = [1, 2] if is_committed else [1]
    assert found == [(steps, steps[-1], True)] * 4
    for node, path in itertools.product("ab", tmp_path.iterdir()):
        assert not list((tmp_path / node).glob("*tmp*")), path


@pytest.mark.parametrize(
    ("phase", "dying"),
    [("receiving", 1), *([("verified", 1), ("sending", 0)] if IS_FULL else [])],
)
def test_a_step_whose_copy_was_interrupted_by_a_kill_is_copied_at_the_next_start(
    tmp_path: Path, workers: Workers, phase: str, dying: int
) -> None:
    def files(node: str) -> set[str]:
        return {path.name for path in (tmp_path / node / "2").rglob("*.safetensors")}

    left = workers.outcomes(
        2, node_jobs.copy_and_die, str(tmp_path), "ab", phase, dying, may_die=True
    )
    assert left[dying] is None and left[1 - dying] == "replicated"
    assert len(files("b")) == 1  # its own
    found = workers.run(2, node_jobs.resume_and_copy, str(tmp_path), "ab")
    assert found == [([1, 2], 2, True, "replicated")] * 2
    assert files("a") == files("b") and len(files("b")) == 2
    assert not list(tmp_path.glob("*/.functional_ckpt/incoming/*"))


@pytest.mark.skipif(not IS_FULL, reason="processes, and seconds without a sign of the killed one")
def test_a_partner_uploads_the_share_of_a_killed_node(tmp_path: Path, workers: Workers) -> None:
    root, far = tmp_path / "nodes", tmp_path / "far"
    assert workers.run(3, node_jobs.save_copied, str(root), "abc") == ["replicated"] * 3
    args = (str(root), "abc", str(far), 1)
    left = workers.outcomes(3, node_jobs.upload_and_die, *args, may_die=True)
    assert left == [True, None, True]
    found = fc.restore(far / "1")["tree"]["w"]
    assert torch.equal(found, node_jobs.values(1))


def test_the_copy_for_a_signal_is_saved_on_all_nodes(tmp_path: Path, workers: Workers) -> None:
    found = workers.run(2, node_jobs.save_copy_for_signal, str(tmp_path), "ab")
    assert found[0] == found[1] and found[0][0] and found[0][1][0] == 3
    assert all((tmp_path / node / "3" / "functional_ckpt.part.json").exists() for node in "ab")
