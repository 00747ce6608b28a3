"""Requests to an S3 server for runs of few and of many steps, each with late metrics."""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
from full import IS_FULL

import functional_ckpt as fc
from functional_ckpt.core.records import orbax, records
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.storage.buckets import s3 as s3_bucket
from functional_ckpt.storage.open import connect

SIZES = (10, 900)
KEEP = [fc.policies.LatestN(10**6), fc.policies.BestN(1, "acc")]
METHODS = ("read", "head", "list", "names", "write", "copy", "delete", "upload", "download")


def make_run(uri: str, num_steps: int) -> None:
    """Makes a run by copying its first step, with late metrics of this and of earlier versions."""
    with fc.CheckpointManager(uri) as manager:
        commit(manager, 0)
    storage, root = connect(uri)
    names = sorted(storage.walk(f"{root}/0"))
    first = {name: storage.read(f"{root}/0/{name}") for name in names}
    marker = storage.read(f"{root}/0/{orbax.COMMIT_FILE}")
    record = records.parse_step(first[records.EXTENSION_FILE], "0")
    metadata: dict[str, Any] = json.loads(first[orbax.CHECKPOINT_METADATA_FILE])
    start_ns = metadata["commit_timestamp_nsecs"]

    def copy(step: int) -> None:
        time_ns = start_ns - (num_steps - step) * 10**9
        data = json.dumps({**metadata, "commit_timestamp_nsecs": time_ns}).encode()
        file = records.FileRecord(len(data), records.digest_hex(data))
        files = {**record.files, orbax.CHECKPOINT_METADATA_FILE: file}
        own = {
            orbax.CHECKPOINT_METADATA_FILE: data,
            records.EXTENSION_FILE: records.StepRecord(
                step=step, items=record.items, files=files
            ).to_json(),
            orbax.COMMIT_FILE: marker,
        }
        for name, content in {**first, **own}.items():
            storage.write(f"{root}/{step}/{name}", content)
        metrics = {"format": "functional_ckpt", "version": 1, "time_ns": 1, "metrics": {"acc": 1}}
        late, content = f"{step}.{time_ns // 1000}", b'{"acc": 1}'
        if step % 2:
            late, content = f"{late}.{step:032x}", records.with_checksum(metrics, allow_nan=True)
        storage.write(f"{root}/.functional_ckpt/metrics/{late}.json", content)

    run_in_threads([functools.partial(copy, step) for step in range(1, num_steps)], 8)


def commit(manager: fc.CheckpointManager, step: int) -> None:
    handle = manager.save(step, {"state": fc.Json(step)}, metrics={"loss": 1.0})
    assert handle is not None
    handle.result(60)


@pytest.mark.skipif(not IS_FULL, reason="minutes; tests/steps/test_step_counts.py is the part")
@pytest.mark.timeout(1800)
def test_requests_do_not_depend_on_the_number_of_steps(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count: collections.Counter[str] = collections.Counter()

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            if "/.functional_ckpt/lock" not in str(arguments[:1]):  # the lease is renewed by time
                count[name] += 1
            return method(self, *arguments, **options)

        return call

    for name in METHODS:
        method = getattr(s3_bucket.ObstoreBucket, name)
        monkeypatch.setattr(s3_bucket.ObstoreBucket, name, counted(name, method))
    found: dict[str, list[int]] = collections.defaultdict(list)

    def measure(name: str, call: Callable[[], object]) -> None:
        count.clear()
        call()
        found[name].append(sum(count.values()))

    for num_steps in SIZES:
        uri = f"{s3}/{num_steps}"
        make_run(uri, num_steps)
        with fc.CheckpointManager(uri, keep_policy=KEEP) as writer:
            assert len(writer.all_steps()) == num_steps
            measure("commit", functools.partial(commit, writer, num_steps))
            measure("record", functools.partial(writer.record_metrics, num_steps, {"acc": 0.5}))
            measure("metadata", functools.partial(writer.metadata, num_steps // 2))
        with fc.CheckpointManager(uri, read_only=True) as reader:
            measure("poll", lambda: reader.wait_for_new_step(10**9, timeout=0.0))
            measure("latest", reader.latest_step)
            measure("best", lambda: reader.best_step("acc"))
    assert all(few == many for few, many in found.values()), dict(found)
