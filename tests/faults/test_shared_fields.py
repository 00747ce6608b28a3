"""Fields that several threads share are touched only with their lock held."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from fake_bucket import FakeBucket

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.runtime import progress_bars, threads
from functional_ckpt.steps.remote_tier import RemoteTier
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.storage.buckets.base import Entry
from functional_ckpt.storage.buckets.libcloud import LibcloudBucket
from functional_ckpt.storage.buckets.spool import Spool
from functional_ckpt.storage.object_store import ObjectStorage
from functional_ckpt.storage.requests import Requests

# By class: its lock, the fields that are read and written with it, and those that are only written
# with it (they hold immutable values).
GUARDED: dict[type, tuple[str, set[str], set[str]]] = {
    TierSteps: ("_mutex", {"_being_read", "_table"}, {"_num_changes"}),
    ObjectStorage: ("_mutex", {"_made"}, set()),
    Requests: ("_mutex", {"_leases", "_links"}, set()),
}


class Watch:
    """Notes each access to a guarded field without its lock, and which fields were used."""

    def __init__(self) -> None:
        self.unguarded: set[str] = set()
        self.seen: set[tuple[type, str]] = set()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for cls, (lock, both, written) in GUARDED.items():
            self._install(monkeypatch, cls, lock, both, both | written)

    def _install(
        self, patch: pytest.MonkeyPatch, cls: type, lock: str, read: set[str], written: set[str]
    ) -> None:
        def get(owner: Any, name: str) -> Any:
            if name in read:
                self.note(owner, cls, lock, name)
            return object.__getattribute__(owner, name)

        def put(owner: Any, name: str, value: Any) -> None:
            if name in written:
                self.note(owner, cls, lock, name)
            object.__setattr__(owner, name, value)

        patch.setattr(cls, "__getattribute__", get)
        patch.setattr(cls, "__setattr__", put)

    def note(self, owner: Any, cls: type, lock: str, name: str) -> None:
        caller = sys._getframe(2).f_code.co_name
        if caller in ("__init__", "_begin"):  # no other thread has it yet
            return
        self.seen.add((cls, name))
        if not object.__getattribute__(owner, lock).locked():
            self.unguarded.add(f"{cls.__name__}.{name} in {caller}")


def test_shared_fields_are_touched_with_their_lock_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    watch.install(monkeypatch)
    bucket = FakeBucket(time.time)
    tier = fc.Tier(path="fake://bucket/far", storage=ObjectStorage(bucket))
    items = {"t": {"w": torch.arange(400_000.0), "small": torch.ones(3), "n": 1}}
    keep = fc.policies.LatestN(2)
    with fc.CheckpointManager(tmp_path / "run", tiers=[tier], keep_policy=keep) as manager:
        for step in range(4):
            manager.save(step, items)
        manager.wait_until_finished()
        manager.record_metrics(3, {"late": 1.0})
        manager.restore(3)
        manager.delete(2)
        manager.reload()
        steps = manager._run.steps
        steps.set_infos(steps.infos)  # as the other ranks do
        steps.forget([0])
        steps.forget_missing()
    far = ObjectStorage(bucket)
    with fc.CheckpointManager("fake://bucket/far", storage=far, latest_link="latest") as manager:
        manager.save(7, items)
        manager.restore(7)
    assert watch.unguarded == set()
    expected = {(cls, name) for cls, (_, *names) in GUARDED.items() for name in set.union(*names)}
    assert watch.seen == expected


def test_a_tier_that_two_threads_open_is_connected_once() -> None:
    both, connected = threading.Barrier(2), list[object]()

    class Opened:
        def unlock(self) -> None:
            pass

    def connect() -> Any:
        connected.append(opened := Opened())
        time.sleep(0.05)
        return opened

    tier = RemoteTier("far", connect, rule=None, keep=(), max_delay_seconds=None)
    tier.acquire = lambda tier, steps: None
    found: list[object] = []

    def work() -> None:
        both.wait()
        found.append(tier.open())

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(connected) == 1 and found == [connected[0]] * 2


def test_a_tier_that_opens_after_the_manager_was_closed_is_unlocked() -> None:
    unlocked: list[str] = []

    class Opened:
        def unlock(self) -> None:
            unlocked.append("now")

    tier = RemoteTier("far", lambda: cast("Any", Opened()), rule=None, keep=(), max_delay_seconds=1)
    tier.acquire = lambda tier, steps: tier.release()
    with pytest.raises(errors.ClosedError, match="closed before far was opened"):
        tier.open()
    assert unlocked == ["now"] and tier.steps is None


def test_threads_take_their_tasks_one_at_a_time() -> None:
    done: list[int] = []

    class Slow(list[Callable[[], None]]):
        def __iter__(self) -> Iterator[Callable[[], None]]:
            for number in range(20):
                time.sleep(0.002)  # a generator that two threads enter raises an error
                yield lambda number=number: done.append(number)

    threads.run_in_threads(Slow([lambda: None] * 20), 4)
    assert sorted(done) == list(range(20))


def test_threads_share_one_display_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich import progress

    class Board:
        def __init__(self, *columns: Any, **options: Any) -> None:
            assert progress_bars._mutex.locked()

        def start(self) -> None:
            assert progress_bars._mutex.locked()

        stop = start

    monkeypatch.setattr(progress, "Progress", Board)
    first, second = progress_bars._enter(), progress_bars._enter()
    assert first is second
    progress_bars._leave(first)
    assert progress_bars._enter() is first
    progress_bars._leave(first)
    progress_bars._leave(first)
    third = progress_bars._enter()
    assert third is not first
    progress_bars._leave(third)


def test_a_driver_of_libcloud_makes_one_request_at_a_time() -> None:
    pytest.importorskip("libcloud")
    bucket = object.__new__(LibcloudBucket)
    bucket._mutex = threading.Lock()
    with bucket._clear("key"):
        assert bucket._mutex.locked()
    assert not bucket._mutex.locked()


def test_a_copy_is_fetched_by_one_thread_at_a_time() -> None:
    spool, entries = Spool(), list[str]()

    def download(key: str, path: str) -> None:
        entries.append(key)
        time.sleep(0.05)
        Path(path).touch()

    entry = Entry("a/b", 0, 1, None)
    workers = [threading.Thread(target=spool.fetch, args=(entry, download)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert entries == ["a/b"]
