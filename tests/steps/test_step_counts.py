"""Requests that do not depend on the number of steps; each step and each late metric read once."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from fake_bucket import FakeBucket

import functional_ckpt as fc
from functional_ckpt import testing
from functional_ckpt.storage.object_store import ObjectStorage

BEST = [fc.policies.LatestN(1000), fc.policies.BestN(1, "late")]
ROOT = "fake://bucket/run"
SIZES = (3, 9, 14)
LATE = "/.functional_ckpt/metrics/"


def commit(manager: fc.CheckpointManager, step: int) -> None:
    handle = manager.save(step, {"state": fc.Json(step)}, metrics={"loss": 1.0})
    assert handle is not None
    handle.result(60)


def fill(manager: fc.CheckpointManager, steps: range) -> None:
    """Saves steps with a metric of their own and a late one, which is best for the first."""
    for step in steps:
        commit(manager, step)
        manager.record_metrics(step, {"late": -step})


def on(bucket: FakeBucket, **options: Any) -> fc.CheckpointManager:
    return fc.CheckpointManager(ROOT, storage=ObjectStorage(bucket), **options)


@functools.cache
def _buckets() -> dict[int, dict[str, Any]]:
    """Returns the objects of runs of several lengths."""
    bucket, found = FakeBucket(time.time), dict[int, dict[str, Any]]()
    for start, end in itertools.pairwise((0, *SIZES)):
        with on(bucket) as manager:
            fill(manager, range(start, end))
        found[end] = dict(bucket._objects)
    return found


def bucket_of(num_steps: int) -> FakeBucket:
    bucket = FakeBucket(time.time)
    bucket._objects = dict(_buckets()[num_steps])
    bucket._num_writes = 10**6
    return bucket


@contextlib.contextmanager
def counting(bucket: FakeBucket) -> Generator[Counter[str]]:
    """Counts requests by kind."""
    found: Counter[str] = Counter()
    bucket.requests.clear()
    yield found
    found.update(kind for kind, _ in bucket.requests)


CALLS: dict[str, Callable[[fc.CheckpointManager, int], object]] = {
    "commit": commit,
    "metadata": lambda manager, n: manager.metadata(n // 2),
    "record": lambda manager, n: manager.record_metrics(n // 2, {"late": 0.5}),
    "best": lambda manager, _: manager.best_step("late"),
}
READS: dict[str, Callable[[fc.CheckpointManager, int], object]] = {
    "latest": lambda manager, _: manager.latest_step(),
    "poll": lambda manager, n: manager.wait_for_new_step(n, timeout=0.0),
    "metadata": CALLS["metadata"],
    "best": CALLS["best"],
}


def requests_of(
    call: Callable[[fc.CheckpointManager, int], object], num_steps: int, **options: Any
) -> Counter[str]:
    """The requests of a call on a manager of a run with this number of steps."""
    bucket = bucket_of(num_steps)
    with on(bucket, **options) as manager, counting(bucket) as count:
        call(manager, num_steps)
    return count


@pytest.mark.parametrize("call", sorted(CALLS))
def test_requests_of_a_writer_do_not_depend_on_the_number_of_steps(call: str) -> None:
    few, many = (requests_of(CALLS[call], n, keep_policy=BEST) for n in (3, 14))
    assert few == many


@pytest.mark.parametrize("call", sorted(READS))
def test_requests_of_a_reader_do_not_depend_on_the_number_of_steps(call: str) -> None:
    few, many = (requests_of(READS[call], n, read_only=True) for n in (9, 14))
    assert few == many


def test_late_metrics_are_read_once_and_only_for_policies_that_need_them() -> None:
    bucket = bucket_of(3)
    for policy in (fc.policies.LatestN(100), BEST):
        with on(bucket, keep_policy=policy) as manager:
            for _ in range(2):
                bucket.requests.clear()
                commit(manager, 1 + max(manager.all_steps()))
                late = Counter(kind for kind, key in bucket.requests if LATE in f"/{key}/")
                assert late == ({} if policy is not BEST else {"list": 1})
    with on(bucket, keep_policy=[fc.policies.BestN(1, "late")]) as manager:
        with on(bucket, read_only=True) as evaluator:
            evaluator.record_metrics(2, {"late": 3})
        bucket.requests.clear()
        commit(manager, 20)
        late = Counter(kind for kind, key in bucket.requests if LATE in f"/{key}/")
        assert late["read"] == 1 and manager.all_steps() == [2, 20]


def test_opening_reads_each_record_once() -> None:
    bucket = bucket_of(3)
    bucket.requests.clear()
    with on(bucket, keep_policy=BEST):
        read = Counter(key for kind, key in bucket.requests if kind == "read")
    assert {n for key, n in read.items() if key.startswith("run/") and key[4].isdigit()} == {1}


def cleared(bucket: FakeBucket) -> FakeBucket:
    """Removes the trace of replacements and removals, as of a writer that does not leave one."""
    with contextlib.suppress(KeyError):
        del bucket._objects["run/.functional_ckpt/changed"]
    return bucket


@pytest.mark.parametrize("is_noted", [True, False])
@pytest.mark.parametrize("by", ["overwrite", "removal"])
def test_a_reader_notices_that_a_name_means_another_commit(by: str, is_noted: bool) -> None:
    bucket = bucket_of(14)
    with on(bucket, read_only=True) as reader:
        assert reader.wait_for_new_step(timeout=0.0) == 13
        with on(bucket, overwrite=True) as manager:
            manager.restore(10)
            if by == "removal":
                manager.delete(12)
            commit(manager, 12)
        if not is_noted:
            cleared(bucket)
        looks = 1 if is_noted else 2
        found = [reader.latest_step() for _ in range(looks)]
        assert found[-1] == 12
        assert reader.metadata(12).generation == 1
        assert reader.wait_for_new_step(13, timeout=0.0) == 12


# ------------------------------------------------------------------------------- a file system


def test_late_metrics_that_others_remove_or_replace_are_forgotten(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        fill(manager, range(2))
        (first, second) = sorted((tmp_path / LATE.strip("/")).iterdir())
        first.unlink()
        assert manager.metadata(0).metrics == {"loss": 1.0}
        old = second.with_name(".".join(second.name.split(".")[:2]) + ".json")
        for value in (5, 6):  # as earlier versions did
            old.with_suffix(".tmp").write_text(f'{{"other": {value}}}')
            old.with_suffix(".tmp").replace(old)
            assert manager.metadata(1).metrics == {"loss": 1.0, "late": -1, "other": value}
        assert manager.best_step("late") == 1 and manager.best_step("other") == 1


def test_a_reader_reads_only_new_steps(tmp_path: Path) -> None:
    store = testing.FaultyStorage()
    with fc.CheckpointManager(tmp_path) as manager:
        fill(manager, range(3))
        with fc.CheckpointManager(tmp_path, read_only=True, storage=store) as reader:
            store.forget()
            assert reader.wait_for_new_step(2, timeout=0.0) is None
            assert [each for each in store.operations if "/0" in each.path] == []
            commit(manager, 3)
            assert reader.wait_for_new_step(2, timeout=0.0) == 3
            read = {each.path for each in store.operations if each.kind == "read"}
            assert {Path(path).relative_to(tmp_path).parts[0] for path in read} <= {
                "3",
                ".functional_ckpt",
            }


def test_pruning_many_steps_lists_once(tmp_path: Path) -> None:
    counts: list[Counter[str]] = []
    for num_steps in (3, 8):
        root, store = tmp_path / str(num_steps), testing.FaultyStorage()
        with fc.CheckpointManager(root) as manager:
            fill(manager, range(num_steps))
        keep = [fc.policies.LatestN(1), fc.policies.BestN(1, "late")]
        with fc.CheckpointManager(root, storage=store, keep_policy=keep) as manager:
            store.forget()
            commit(manager, num_steps)
            counts.append(Counter(each.path for each in store.operations if each.kind == "list"))
            assert manager.all_steps() == [0, num_steps]
        assert [path.name[:2] for path in (root / LATE.strip("/")).iterdir()] == ["0."]
        counts[-1] = Counter({path.removeprefix(str(root)): n for path, n in counts[-1].items()})
    assert counts[0][""] == counts[1][""] and counts[0][LATE[:-1]] == counts[1][LATE[:-1]]


def test_deliveries_look_for_late_metrics_once(tmp_path: Path) -> None:
    store = testing.FaultyStorage()
    near, far = tmp_path / "near", tmp_path / "far"
    with fc.CheckpointManager(near) as manager:
        fill(manager, range(6))
    late = f"{near}{LATE[:-1]}"
    started = time.monotonic()
    with fc.CheckpointManager(near, storage=store, tiers=[far]) as manager:
        manager.wait_until_finished()
        reads = Counter(each.path for each in store.operations if late in each.path)
    assert reads.pop(late) < 6 + (time.monotonic() - started)  # once a second during many
    assert set(reads.values()) == {1} and len(reads) == 6
    with fc.CheckpointManager(far, read_only=True) as manager:
        for step in range(6):
            assert manager.metadata(step).metrics == {"loss": 1.0, "late": -step}
