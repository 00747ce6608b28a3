"""State that several threads change is changed under its lock: each change waits for it."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import events
from functional_ckpt.format import index, node_tree, read_direct
from functional_ckpt.saving import stage

Case = tuple[Any, Callable[[], Any]]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[fc.CheckpointManager]:
    with fc.CheckpointManager(tmp_path) as made:
        made.save(1, {"tree": {"w": torch.ones(3)}}).result()  # type: ignore[union-attr]
        yield made


def check_waits(lock: Any, call: Callable[[], Any]) -> None:
    thread = threading.Thread(target=call)
    with lock:
        thread.start()
        thread.join(0.1)
        assert thread.is_alive(), "the call does not take the lock"
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("name", ["remember", "forget", "is_being_read", "reading"])
def test_the_list_of_steps(name: str, manager: fc.CheckpointManager) -> None:
    steps = manager._steps

    def read() -> None:
        with steps.reading(1):
            pass

    now = datetime.datetime.now(datetime.UTC)
    calls: dict[str, Callable[[], Any]] = {
        "remember": lambda: steps.remember(fc.policies.StepInfo(step=2, time=now)),
        "forget": lambda: steps.forget([1]),
        "is_being_read": lambda: steps.is_being_read(1),
        "reading": read,
    }
    check_waits(steps._mutex, calls[name])


def test_upload_progress_counts_complete_files() -> None:
    shown: list[tuple[int, int]] = []
    sent = events.Tally(lambda *numbers: shown.append(numbers), 3, 10)
    check_waits(sent._mutex, lambda: sent.add(4))
    assert shown == [(3, 10), (7, 10)]


def test_live_bytes_still_to_be_written_are_counted() -> None:
    live = stage.LiveMemory(10)
    check_waits(live._lock, lambda: live.count_down(10))
    live.wait()


def test_files_are_opened_once() -> None:
    opened = index.Index(
        "item", node_tree.NodeTree("item", lambda spans: [], None), lambda spans: []
    )
    reader = read_direct.DirectReader(opened)
    check_waits(opened._loading, lambda: opened.load([b"a"]))
    check_waits(reader._opening, lambda: reader.tasks([]))
