"""`fc.save(overwrite=True)` that is cut at any point: the old checkpoint or the new is read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_bucket import Clock, FakeBucket
from full import IS_FULL

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.storage import requests
from functional_ckpt.storage.buckets import lease
from functional_ckpt.storage.object_store import ObjectStorage

PATH = "fake://bucket/best"


class Cut(BaseException):
    """The process died."""


def items(value: float) -> dict[str, Any]:
    return {"t": {"w": torch.full((40,), value)}}


def ignore(kind: str, key: str) -> None:
    """No request is cut."""
    del kind, key


def value_of(bucket: FakeBucket) -> float:
    return float(fc.restore(PATH, storage=ObjectStorage(bucket))["t"]["w"][0])


def overwritten(clock: Clock, at: int) -> tuple[FakeBucket, bool]:
    """A bucket after an overwrite whose request number `at`, and all later ones, were not sent."""
    bucket, num_requests = FakeBucket(clock), 0
    fc.save(PATH, items(1.0), storage=ObjectStorage(bucket))

    def cut(kind: str, key: str) -> None:
        nonlocal num_requests
        num_requests += 1
        if num_requests > at:
            raise Cut

    bucket.before = cut
    try:
        fc.save(PATH, items(2.0), storage=ObjectStorage(bucket), overwrite=True)
        is_cut = False
    except Cut:
        is_cut = True
    bucket.before = lambda kind, key: None
    return bucket, is_cut


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still, so that requests are numbered: one at a time, no renewals."""
    clock = Clock()
    clock.rule(monkeypatch)
    monkeypatch.setattr(requests, "NUM_REQUESTS", 1)
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 3600.0)
    return clock


def test_a_cut_overwrite_is_completed_or_undone_by_the_next_save(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[float] = set()
    for at in range(0, 1000, 1 if IS_FULL else 7):
        monkeypatch.setattr(lease, "_machine", lambda: "A")
        bucket, is_cut = overwritten(clock, at)
        monkeypatch.setattr(lease, "_machine", lambda: "B")
        clock.sleep(2 * lease.LEASE_SECONDS)
        with pytest.raises(errors.StepExistsError):
            fc.save(PATH, items(3.0), storage=ObjectStorage(bucket))
        found.add(value_of(bucket))
        fc.save(PATH, items(4.0), storage=ObjectStorage(bucket), overwrite=True)
        assert value_of(bucket) == 4.0
        assert all(key.startswith("best/") for key in bucket.keys), bucket.keys
        if not is_cut:
            break
    assert found == {1.0, 2.0}


def test_between_two_renames_the_old_checkpoint_is_read(tmp_path: Path) -> None:
    path, found = tmp_path / "best", set[float]()
    for at in range(40):
        fc.save(path, items(1.0), overwrite=True)
        storage = testing.FaultyStorage(testing.Fault(at=at, mode="crash"), can_exchange=False)
        try:
            fc.save(path, items(2.0), overwrite=True, storage=storage)
            is_cut = False
        except testing.Crash:
            is_cut = True
        found.add(float(fc.restore(path)["t"]["w"][0]))
        if not is_cut:
            break
    assert found == {1.0, 2.0} and not is_cut


def test_readers_see_the_step_whose_overwrite_by_a_manager_was_cut(clock: Clock) -> None:
    found: set[float] = set()
    for at in range(0, 1000, 1 if IS_FULL else 6):
        bucket, num_left = FakeBucket(clock), at
        root, storage = "fake://bucket/run", ObjectStorage(bucket)
        with fc.CheckpointManager(root, storage=storage) as manager:
            manager.save(3, items(1.0))
        is_cut = False
        with fc.CheckpointManager(root, storage=storage, overwrite=True) as manager:

            def cut(kind: str, key: str) -> None:
                nonlocal num_left, is_cut
                num_left -= 1
                if num_left < 0:
                    is_cut = True
                    raise PermissionError(key)

            bucket.before = cut
            with contextlib.suppress(errors.CheckpointError, PermissionError):
                manager.save(3, items(2.0))
                manager.wait_until_finished()
            copy = FakeBucket(clock)
            copy._objects = dict(bucket._objects)
            bucket.before = ignore
        with fc.CheckpointManager(root, storage=ObjectStorage(copy), read_only=True) as reader:
            assert reader.all_steps() == [3] and reader.latest_step() == 3
            restored = reader.restore()
            assert reader.metadata(3).step == restored.step == 3
            found.add(float(restored["t"]["w"][0]))
        found.add(float(fc.restore(f"{root}/3", storage=ObjectStorage(copy))["t"]["w"][0]))
        if not is_cut:
            break
    assert found == {1.0, 2.0} and not is_cut
