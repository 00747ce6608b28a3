"""Stores that TensorStore has no driver for: arrays are read in place, by ranges."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage.buckets.base import PreconditionFailed, TransientError
from functional_ckpt.storage.buckets.fsspec import FsspecBucket
from functional_ckpt.storage.open import connect
from functional_ckpt.testing import differences
from functional_ckpt.verify import checkpoint, verify


@pytest.mark.parametrize("kind", ["fsspec", "libcloud"])
def test_a_run_in_a_spooled_store_saves_prunes_and_locks(
    kind: str, request: pytest.FixtureRequest
) -> None:
    top = (
        f"memory://bucket-{uuid.uuid4().hex[:8]}"
        if kind == "fsspec"
        else request.getfixturevalue("libcloud")
    )
    run = f"{top}/run"
    state = {"w": torch.randn(200, 300), "tied": torch.arange(10), "n": 3}
    with fc.CheckpointManager(run, keep_policy=[fc.policies.LatestN(2)], overwrite=True) as manager:
        for step in range(3):
            manager.save(step, {"state": {**state, "n": step}}, metrics={"a": step}).result()
        manager.save(2, {"state": state}).result()
        assert manager.all_steps() == [1, 2]
        with pytest.raises(errors.LockedError):
            fc.CheckpointManager(run)
    store = connect(run)[0]  # another, which has no copies
    assert checkpoint.verify_checkpoint(store, f"{run}/2", 2) == []
    assert not differences(fc.restore(f"{run}/2")["state"], state)


def test_providers_and_protocols_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.UsageError, match="PROVIDER:CONTAINER"):
        fc.restore("libcloud://bucket/run")
    with pytest.raises(errors.UsageError, match="no provider"):
        fc.restore("libcloud://nobody:bucket/run")
    with pytest.raises(errors.UsageError, match="unknown protocol nothing://"):
        fc.restore("nothing://bucket/run")


def test_an_upload_that_did_not_arrive_whole_is_an_error(tmp_path: Path) -> None:
    class Broken(MemoryFileSystem):
        cachable = False

        def put_file(self, *arguments: Any, **options: Any) -> None:
            self.pipe_file(arguments[1], b"0123456x89")

    (tmp_path / "file").write_bytes(b"0123456789")
    bucket = FsspecBucket("memory://top", Broken(), "top")
    with pytest.raises(TransientError, match="differs after the upload"):
        bucket.upload(str(tmp_path / "file"), "key")


def test_libcloud_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libcloud.storage", None)
    with pytest.raises(errors.UsageError, match=r"functional-ckpt\[libcloud\]"):
        fc.restore("libcloud://local:bucket/run")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository behind hf://, whose files are those of memory://."""
    monkeypatch.setattr(fsspec, "filesystem", lambda *_: MemoryFileSystem())
    return f"user-{uuid.uuid4().hex[:8]}/repository"


def test_a_restore_requests_its_ranges_and_no_copy(
    hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"large": torch.randn(1000, 1000), "small": torch.arange(10)}
    fc.save(f"memory://{hub}/step", {"state": state})
    read: list[int] = []
    cat = MemoryFileSystem.cat_file

    def counted(self: MemoryFileSystem, *arguments: Any, **options: Any) -> bytes:
        data = cat(self, *arguments, **options)
        read.append(len(data))
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    monkeypatch.setattr(FsspecBucket, "download", None)
    found = fc.restore(f"hf://{hub}/step", only=["state.small"])["state"]
    assert torch.equal(found["small"], state["small"])
    assert sum(read) < 200_000
    assert not differences(fc.restore(f"hf://{hub}/step")["state"], state)
    assert verify(f"hf://{hub}/step") == []


def test_a_protocol_that_cannot_publish_is_refused_by_the_constructor(hub: str) -> None:
    for write in (
        lambda: fc.CheckpointManager(f"hf://{hub}/run"),
        lambda: fc.save(f"hf://{hub}/step", {"x": torch.ones(1)}),
    ):
        with pytest.raises(errors.StorageError, match=r"commit of every file.*hf upload"):
            write()


def test_an_object_is_created_on_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = FsspecBucket("memory://top", MemoryFileSystem(), f"top-{uuid.uuid4().hex[:8]}")
    monkeypatch.setattr(bucket, "check_version", lambda *_: None)  # the other writes after it
    bucket.write("key", b"first", replacing="")
    with pytest.raises(PreconditionFailed):
        bucket.write("key", b"second", replacing="")
    assert bucket.read("key") == b"first"
