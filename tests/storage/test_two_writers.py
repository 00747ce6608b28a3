"""A writer that is suspended at any request, and the one that takes over: no reported step is lost.

The suspended one wakes when the other has saved, overwritten and removed steps. It runs on a bucket
in memory, so a pause at every single request costs milliseconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from fake_bucket import Clock, FakeBucket
from full import IS_FULL

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage import requests
from functional_ckpt.storage.buckets import lease
from functional_ckpt.storage.object_store import MARKER, ObjectStorage

_STRIDES = {"overwrite": 5, "save": 2}
RUN = "fake://bucket/run"
_STOPPED = (errors.LockedError, errors.SaveError, errors.StorageError, errors.StepNotFoundError)


def _items(value: float) -> dict[str, Any]:
    return {"t": {"w": torch.full((40,), value)}}


class _World:
    """Two machines, one bucket; only the second's clock is looked at while the first is stopped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, compares_as_it_deletes: bool) -> None:
        self.clock = Clock()
        self.clock.rule(monkeypatch)
        self.machine = "A"
        # One request at a time: a suspended process has no running thread.
        monkeypatch.setattr(requests, "NUM_REQUESTS", 1)
        monkeypatch.setattr(lease, "_machine", lambda: self.machine)
        self.bucket = FakeBucket(self.clock, compares_as_it_deletes=compares_as_it_deletes)
        self.managers: list[fc.CheckpointManager] = []
        self.failure: Exception | None = None

    def open(self, machine: str, **options: Any) -> fc.CheckpointManager:
        self.machine = machine
        storage = ObjectStorage(self.bucket)
        made = fc.CheckpointManager(RUN, storage=storage, overwrite=True, **options)
        self.managers.append(made)
        return made

    def close(self) -> None:
        for manager in reversed(self.managers):
            with contextlib.suppress(errors.CheckpointError):
                manager.close()

    def values(self) -> dict[int, float]:
        """A reader's view: every listed step, by its value."""
        found: dict[int, float] = {}
        storage = ObjectStorage(self.bucket)
        with fc.CheckpointManager(RUN, storage=storage, read_only=True) as reader:
            for step in reader.all_steps():
                tensor = reader.restore(step)["t"]["w"]
                assert float(tensor.min()) == float(tensor.max())
                found[step] = float(tensor[0])
        return found


def _take_over(world: _World) -> dict[int, float]:
    """The second writer's steps: all that it lists and has not removed."""
    manager = world.open("B", keep_policy=fc.policies.LatestN(4))
    reported = world.values()
    assert sorted(reported) == manager.all_steps()
    for step in (1, 3, 5):
        manager.save(step, _items(200.0 + step)).result()
        reported[step] = 200.0 + step
    return {step: reported[step] for step in manager.all_steps()}


_ACTIONS: Mapping[str, Callable[[fc.CheckpointManager], object]] = {
    "save": lambda manager: manager.save(3, _items(103.0)).result(),
    "save_as_only_this_one_does": lambda manager: manager.save(7, _items(107.0)).result(),
    "overwrite": lambda manager: manager.save(1, _items(101.0)).result(),
    "delete": lambda manager: manager.delete(1),
    "metrics": lambda manager: manager.record_metrics(2, {"loss": 1.0}),
}


def _run(
    world: _World, action: str, is_place: Callable[[str, str], bool], at: int, where: str
) -> tuple[bool, bool]:
    """Whether the pause was reached, and whether the action was reported as done."""
    first = world.open("A", keep_policy=fc.policies.LatestN(3))
    for step in (1, 2):
        first.save(step, _items(float(step))).result()
    left, reported = at, {}

    def pause(kind: str, key: str) -> None:
        nonlocal left, reported
        if world.machine != "A" or not is_place(kind, key):
            return
        left -= 1
        if left < 0:
            world.clock.now += 3600
            try:
                reported = _take_over(world)
            except Exception as error:
                world.failure = error

    if where == "request":
        world.bucket.before = pause
    else:
        storage = first._steps.storage
        assert isinstance(storage, ObjectStorage)
        requests = storage._requests
        change = requests.change
        requests.change = lambda kind, path, request: (
            pause(kind, path),
            change(kind, path, request),
        )  # type: ignore[method-assign]
    try:
        _ACTIONS[action](first)
        is_done = True
    except _STOPPED:
        is_done = False
    if left >= 0:
        return False, is_done
    if world.failure is not None:
        raise world.failure
    found = world.values()
    for step, value in reported.items():
        assert found.get(step) == value, (action, at, step)
    if set(found) != set(reported):
        assert is_done or action == "save_as_only_this_one_does", (action, at, found, reported)
    return True, is_done


def _every_pause(
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    is_place: Callable[[str, str], bool],
    where: str,
    *,
    compares_as_it_deletes: bool = True,
) -> int:
    stride = 1 if IS_FULL else _STRIDES.get(action, 1)
    for num_pauses, at in enumerate(range(0, 200, stride)):
        with monkeypatch.context() as patch:
            world = _World(patch, compares_as_it_deletes=compares_as_it_deletes)
            try:
                is_reached, _ = _run(world, action, is_place, at, where)
            finally:
                world.bucket.before = lambda kind, key: None
                world.close()
        if not is_reached:
            return num_pauses
    raise AssertionError("the action does not end")


@pytest.mark.parametrize("compares", [True, False] if IS_FULL else [False])
@pytest.mark.parametrize("action", _ACTIONS)
def test_a_writer_suspended_before_any_change_harms_no_step_of_the_next(
    action: str, compares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_pauses = _every_pause(
        monkeypatch, action, lambda *_: True, "change", compares_as_it_deletes=compares
    )
    assert num_pauses >= (1 if action == "metrics" else 3)


@pytest.mark.parametrize("action", ["save", "save_as_only_this_one_does"])
def test_a_marker_that_arrives_too_late_is_taken_back(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspended when the lease had been looked at and only the request itself was left."""

    def is_place(kind: str, key: str) -> bool:
        return kind == "write" and key.endswith(MARKER)

    assert _every_pause(monkeypatch, action, is_place, "request") == 1


@pytest.mark.parametrize("action", ["save", "save_as_only_this_one_does"])
def test_a_writer_suspended_after_its_marker_reports_what_the_next_one_keeps(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_marked = False

    def is_place(kind: str, key: str) -> bool:
        nonlocal is_marked
        was_marked, is_marked = is_marked, kind == "write" and key.endswith(MARKER)
        return was_marked

    assert _every_pause(monkeypatch, action, is_place, "request") >= 1


def test_a_delete_that_arrives_too_late_removes_nothing_where_the_store_can_compare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_place(kind: str, key: str) -> bool:
        return kind == "delete" and key.startswith("run/1/")

    assert _every_pause(monkeypatch, "delete", is_place, "request") > 3
