"""A tier's steps are not lost or replaced without overwrite; pending steps are not pruned."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_bucket import FakeBucket
from full import IS_FULL

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.core.records import records
from functional_ckpt.steps import promises, remote_tier, tiers, upload_worker
from functional_ckpt.storage import commit
from functional_ckpt.storage.base import Stat, Storage
from functional_ckpt.storage.buckets import base as buckets
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.object_store import MARKER, ObjectStorage
from functional_ckpt.testing import FaultyStorage
from functional_ckpt.verify import checkpoint

_LATEST = fc.policies.LatestN


def _items(value: float) -> dict[str, Any]:
    return {"t": {"w": torch.full((50,), float(value))}, "j": fc.Json({"v": value})}


def _local_steps(path: Path) -> list[int]:
    return sorted(int(name) for name in os.listdir(path) if name.isdigit())


class Outage(FaultyStorage):
    """A file system that a test can unplug."""

    def __init__(self) -> None:
        super().__init__()
        self.is_down = False
        self.num_refused = 0

    def operation(self, kind: str, path: str) -> None:
        if self.is_down:
            self.num_refused += 1
            raise errors.StorageError("the network is down", errno=errno.EIO, path=path)

    def stat(self, path: str, *, follow: bool = False) -> Stat | None:
        if not follow:
            self.operation("stat", path)
        return super().stat(path, follow=follow)


class Far:
    """A tier of either kind, with a way to look into it and to unplug it."""

    def __init__(self, kind: str, tmp_path: Path) -> None:
        self.bucket = FakeBucket(time.time)
        self.outage = Outage()
        self.is_local = kind == "local"
        self.path = str(tmp_path / "far") if self.is_local else "fake://bucket/far"

    def storage(self) -> Storage:
        return self.outage if self.is_local else ObjectStorage(self.bucket)

    def tier(self, **options: Any) -> fc.Tier:
        return fc.Tier(path=self.path, storage=self.storage(), **options)

    def set_down(self, is_down: bool) -> None:
        def refuse(kind: str, key: str) -> None:
            self.outage.num_refused += 1
            raise buckets.TransientError("the network is down")

        self.outage.is_down = is_down
        self.bucket.before = refuse if is_down else lambda kind, key: None

    def holds(self, step: int) -> bool:
        """Whether a step is listed there, whatever the network does."""
        if self.is_local:
            return (Path(self.path) / str(step)).is_dir()
        return f"far/{step}/{MARKER}" in self.bucket.keys

    def values(self) -> dict[int, float]:
        """Every step that a reader finds, verified, by its value."""
        storage = LocalStorage() if self.is_local else ObjectStorage(self.bucket)
        found: dict[int, float] = {}
        with fc.CheckpointManager(self.path, storage=storage, read_only=True) as reader:
            for step in reader.all_steps():
                assert checkpoint.verify_checkpoint(storage, f"{self.path}/{step}", step) == []
                found[step] = float(reader.restore(step)["t"]["w"][0])
        return found


@pytest.fixture(params=["local", "objects"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> Far:
    return Far(request.param, tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_MAX_SECONDS", 0.05)
    monkeypatch.setattr(upload_worker, "_FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(upload_worker, "_LAST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(tiers, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(tiers, "_LOOK_SECONDS", 0.05)


def _fill(path: Path, far: Far, steps: Iterator[int] | range) -> None:
    with fc.CheckpointManager(path, tiers=[far.tier()]) as manager:
        for step in steps:
            manager.save(step, _items(step))


# ------------------------------------------------------------------------------------ overwrite


def test_a_step_of_the_tier_is_not_saved_again_without_overwrite(far: Far, tmp_path: Path) -> None:
    _fill(tmp_path / "old", far, range(1, 4))
    with fc.CheckpointManager(tmp_path / "new", tiers=[far.tier()]) as manager:
        assert manager.all_steps() == [1, 2, 3]
        with pytest.raises(errors.StepExistsError, match="exists in the tier"):
            manager.save(2, _items(222))
        with pytest.raises(errors.StepExistsError):
            manager.check_start(2)
        manager.save(4, _items(4))
    assert far.values() == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}


def test_steps_of_another_run_are_not_replaced_by_a_tier_that_is_added_later(
    far: Far, tmp_path: Path
) -> None:
    _fill(tmp_path / "old", far, range(1, 3))
    with fc.CheckpointManager(tmp_path / "new") as manager:
        for step in (2, 3):
            manager.save(step, _items(200 + step))
    new = tmp_path / "new"
    manager = fc.CheckpointManager(new, keep_policy=_LATEST(1), tiers=[far.tier()])
    with pytest.raises(errors.SaveError, match="another commit of step 2"):
        manager.wait_until_finished()
    manager.wait_until_finished()  # it is said once, and the others have arrived
    manager.close()
    assert far.values() == {1: 1.0, 2: 2.0, 3: 203.0}
    assert _local_steps(new) == [2, 3]  # steps without another copy are not pruned
    with fc.CheckpointManager(new, overwrite=True, tiers=[far.tier()]) as manager:
        manager.wait_until_finished()
    assert far.values() == {1: 1.0, 2: 202.0, 3: 203.0}


def test_old_copy_stays_until_the_new_one_is_complete(far: Far, tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "near", overwrite=True, tiers=[far.tier()]) as manager:
        for step in (1, 2):
            manager.save(step, _items(step))
        manager.wait_until_finished()
        far.set_down(True)
        manager.save(2, _items(22)).result()
        time.sleep(0.2)
        assert far.holds(2)
        far.set_down(False)
        manager.wait_until_finished()
    assert far.values() == {1: 1.0, 2: 22.0}


def test_an_overwrite_that_was_not_copied_yet_is_copied_by_a_manager_without_overwrite(
    far: Far, tmp_path: Path
) -> None:
    near = tmp_path / "near"
    with fc.CheckpointManager(near, overwrite=True, tiers=[far.tier()]) as manager:
        manager.save(2, _items(2))
        manager.wait_until_finished()
        far.set_down(True)
        manager.save(2, _items(22)).result()
    far.set_down(False)
    with fc.CheckpointManager(near, tiers=[far.tier()]) as manager:
        manager.wait_until_finished()
    assert far.values() == {2: 22.0}


def test_an_upload_cut_at_any_request_leaves_the_old_copy_or_the_new(tmp_path: Path) -> None:
    """The store fails at its k-th change, for every k; then the manager dies, and is made again."""
    near, far = tmp_path / "near", Far("objects", tmp_path)
    with fc.CheckpointManager(near, overwrite=True, tiers=[far.tier()]) as manager:
        manager.save(1, _items(1))
    for at in range(0, 1000, 1 if IS_FULL else 5):
        left = at

        def fail(kind: str, key: str) -> None:
            nonlocal left
            if kind not in ("write", "delete", "copy", "upload") or key.endswith("lock"):
                return
            left -= 1
            if left < 0:
                raise buckets.PermanentError(key, errno.EACCES)

        value = 100.0 + at
        manager = fc.CheckpointManager(near, overwrite=True, tiers=[far.tier()])
        manager.wait_until_finished()
        before = far.values()[1]
        far.bucket.before = fail
        manager.save(1, _items(value)).result()
        with contextlib.suppress(errors.SaveError):
            manager.close()
        far.bucket.before = lambda kind, key: None
        found = far.values()
        assert found.get(1, before) in (before, value)
        with fc.CheckpointManager(near, read_only=True) as reader:
            assert float(reader.restore(1)["t"]["w"][0]) == value
        if left >= 0:
            break
        with fc.CheckpointManager(tmp_path / "other", tiers=[far.tier()]) as other:
            # Another machine, which has nothing but the tier.
            assert float(other.restore(1)["t"]["w"][0]) in (before, value)
    assert at >= 5
    assert far.values() == {1: value}


def test_a_step_overwritten_while_it_is_copied_arrives_as_it_is_now(
    tmp_path: Path,
) -> None:
    gate, entered = threading.Event(), threading.Event()

    class Slow(LocalStorage):
        def put_file(self, source: str, path: str) -> None:
            entered.set()
            gate.wait(30)
            super().put_file(source, path)

    far = tmp_path / "far"
    tier = fc.Tier(path=far, storage=Slow())
    with fc.CheckpointManager(tmp_path / "near", overwrite=True, tiers=[tier]) as manager:
        manager.save(1, _items(1)).result()
        entered.wait(30)
        manager.save(1, _items(11)).result()
        gate.set()
        manager.wait_until_finished()
        assert float(fc.restore(far / "1")["t"]["w"][0]) == 11.0


# ------------------------------------------------------------------------------------ pruning


@pytest.mark.parametrize("num_kept", [0, 1])
def test_the_first_tier_is_pruned_when_an_upload_has_arrived(
    num_kept: int, far: Far, tmp_path: Path
) -> None:
    near, kept = tmp_path / "near", [[], [5]][num_kept]
    far.set_down(False)
    options = {"keep_policy": _LATEST(num_kept), "latest_link": "latest"}
    with fc.CheckpointManager(near, tiers=[far.tier()], **options) as manager:
        far.set_down(True)
        for step in range(1, 6):
            manager.save(step, _items(step)).result()
        assert _local_steps(near) == [1, 2, 3, 4, 5]
        far.set_down(False)
        manager.wait_until_finished()
        deadline = time.monotonic() + 10
        while _local_steps(near) != kept and time.monotonic() < deadline:
            time.sleep(0.02)
        assert _local_steps(near) == kept
        assert manager.all_steps() == [1, 2, 3, 4, 5] and manager.latest_step() == 5
        assert float(manager.restore()["t"]["w"][0]) == 5.0
    assert list(far.values()) == [1, 2, 3, 4, 5]


def test_the_first_tier_is_pruned_when_it_is_closed_and_when_it_is_opened(
    far: Far, tmp_path: Path
) -> None:
    near = tmp_path / "near"
    with fc.CheckpointManager(near, tiers=[far.tier()]) as manager:
        for step in range(1, 4):
            manager.save(step, _items(step))
    assert _local_steps(near) == [1, 2, 3]
    with fc.CheckpointManager(near, keep_policy=_LATEST(1), tiers=[far.tier()]) as manager:
        assert _local_steps(near) == [3]
        far.set_down(True)
        manager.save(4, _items(4)).result()
        assert _local_steps(near) == [3, 4] or _local_steps(near) == [4]
        far.set_down(False)
    assert _local_steps(near) == [4]


def test_opening_prunes_no_step_without_another_copy(tmp_path: Path) -> None:
    near, far = tmp_path / "near", Far("local", tmp_path)
    with fc.CheckpointManager(near) as manager:
        for step in range(1, 5):
            manager.save(step, _items(step))
    tier = far.tier(save=fc.policies.every(2))
    with fc.CheckpointManager(near, keep_policy=_LATEST(1), tiers=[tier]) as manager:
        manager.wait_until_finished()
        assert set(_local_steps(near)) >= {1, 3, 4}
    assert list(far.values()) == [2, 4]


def test_keeping_none_needs_another_tier(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match=r"LatestN\(0\).*tiers="):
        fc.CheckpointManager(tmp_path / "near", keep_policy=_LATEST(0))
    far = Far("local", tmp_path)
    with pytest.raises(errors.UsageError, match="LatestN"):
        fc.CheckpointManager(
            tmp_path / "near", keep_policy=_LATEST(1), tiers=[far.tier(keep=[_LATEST(0)])]
        )
    with fc.CheckpointManager(tmp_path / "near") as manager:  # nothing is left locked
        manager.save(1, _items(1))


def test_step_stays_complete_while_it_is_read_and_uploaded(tmp_path: Path) -> None:
    far = Far("local", tmp_path)
    near = tmp_path / "near"
    with fc.CheckpointManager(near, keep_policy=_LATEST(0), tiers=[far.tier()]) as manager:
        far.set_down(True)
        manager.save(1, _items(1)).result()
        with manager._steps.reading(1):
            far.set_down(False)
            manager.wait_until_finished()
            time.sleep(0.1)
            assert _local_steps(near) == [1]
        manager.save(2, _items(2)).result()
    assert _local_steps(near) == []


# ------------------------------------------------------------------------------------ outages


def test_a_tier_that_is_down_does_not_delay_the_manager(far: Far, tmp_path: Path) -> None:
    near = tmp_path / "near"
    _fill(near, far, range(1, 3))
    far.set_down(True)
    started = time.monotonic()
    with fc.CheckpointManager(near, keep_policy=_LATEST(1), tiers=[far.tier()]) as manager:
        assert float(manager.restore()["t"]["w"][0]) == 2.0
        manager.save(3, _items(3)).result()
        assert time.monotonic() - started < 20
        assert set(_local_steps(near)) >= {3}
        far.set_down(False)
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 2, 3]
    assert far.values() == {1: 1.0, 2: 2.0, 3: 3.0}


def test_a_store_that_never_answers_does_not_delay_the_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_tier, "_REACH_SECONDS", 0.2)
    far, near, gate = Far("objects", tmp_path), tmp_path / "near", threading.Event()
    _fill(near, far, range(1, 3))
    plain = far.tier()

    class Hole(ObjectStorage):
        def stat(self, path: str, *, follow: bool = False) -> Stat | None:
            gate.wait(30)
            return super().stat(path, follow=follow)

    tier = fc.Tier(path=plain.path, storage=Hole(far.bucket))
    started = time.monotonic()
    with fc.CheckpointManager(near, tiers=[tier]) as manager:
        manager.save(3, _items(3)).result()
        assert manager.latest_step() == 3 and time.monotonic() - started < 25
        gate.set()
        manager.wait_until_finished()
    assert list(far.values()) == [1, 2, 3]


def test_run_does_not_start_from_scratch_while_its_tier_is_down(far: Far, tmp_path: Path) -> None:
    _fill(tmp_path / "old", far, range(1, 3))
    far.set_down(True)
    with fc.CheckpointManager(tmp_path / "new", tiers=[far.tier()]) as manager:
        for look in (
            manager.all_steps,
            manager.latest_step,
            lambda: manager.restore_or(_items(0)),
            lambda: manager.restore(2),
        ):
            with pytest.raises(errors.StorageError):
                look()
        far.set_down(False)
        assert manager.latest_step() == 2
        assert float(manager.restore_or(_items(0))["t"]["w"][0]) == 2.0


def test_no_save_waits_for_a_tier_that_is_down(
    far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "_PATIENCE_SECONDS", 3600.0)
    far.set_down(True)
    near = tmp_path / "near"
    with fc.CheckpointManager(near, keep_policy=_LATEST(0), tiers=[far.tier()]) as manager:
        for step in (1, 2):
            manager.save(step, _items(step)).result()
        assert manager.all_steps() == [1, 2]
        far.set_down(False)
        manager.wait_until_finished()
        assert _local_steps(near) == []
        manager.save(3, _items(3)).result()
    assert list(far.values()) == [1, 2, 3]


def test_steps_are_not_pruned_before_an_unreachable_tier_decides(far: Far, tmp_path: Path) -> None:
    """Its policy depends on its steps, which are unknown while it is down."""
    near = tmp_path / "near"

    class EverySecondOfItsOwn:
        def should_save(self, step: fc.StepInfo, previous: Any, *, context: Any) -> bool:
            return not previous or step.step - previous[-1].step >= 2

    tier = {"save": EverySecondOfItsOwn()}
    with fc.CheckpointManager(near, tiers=[far.tier(**tier)]) as manager:
        manager.save(1, _items(1))
    far.set_down(True)
    with fc.CheckpointManager(near, keep_policy=_LATEST(1), tiers=[far.tier(**tier)]) as manager:
        for step in (2, 3, 4, 5):
            manager.save(step, _items(step)).result()
        assert set(_local_steps(near)) >= {2, 3, 4, 5}
        far.set_down(False)
        manager.wait_until_finished()
    assert list(far.values()) == [1, 3, 5]


def test_attempts_are_made_less_and_less_often(
    far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_worker, "_FIRST_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(upload_worker, "_LAST_WAIT_SECONDS", 60.0)
    with fc.CheckpointManager(tmp_path / "near", tiers=[far.tier()]) as manager:
        far.set_down(True)
        manager.save(1, _items(1)).result()
        time.sleep(1.0)
        assert 1 <= far.outage.num_refused < 20
        far.set_down(False)
        started = time.monotonic()
    assert time.monotonic() - started < 30  # closing waits for no back-off
    assert list(far.values()) == [1]


def test_a_refusal_is_raised_when_the_manager_is_made(tmp_path: Path) -> None:
    far = Far("objects", tmp_path)

    def refuse(kind: str, key: str) -> None:
        raise buckets.PermanentError("permission denied", errno.EACCES)

    far.bucket.before = refuse
    with pytest.raises(errors.StorageError, match="permission denied"):
        fc.CheckpointManager(tmp_path / "near", tiers=[far.tier()])
    with fc.CheckpointManager(tmp_path / "near"):
        pass


# ------------------------------------------------------------------------------------ one writer


def test_a_tier_has_one_writer(far: Far, tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "one", tiers=[far.tier()]):
        with pytest.raises(errors.LockedError):
            fc.CheckpointManager(tmp_path / "two", tiers=[far.tier()])
        with fc.CheckpointManager(tmp_path / "two"):
            pass  # its own directory is free again
    with fc.CheckpointManager(tmp_path / "two", tiers=[far.tier()]):
        pass


@pytest.mark.parametrize("inner", ["", "9", ".functional_ckpt", "9.orbax-checkpoint-tmp/x"])
def test_a_tier_is_apart_from_the_others(inner: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for first, second in ((run, run / inner), (run / inner, run)):
        with pytest.raises(errors.UsageError, match="its own directory"):
            fc.CheckpointManager(first, tiers=[fc.Tier(path=second)])
    with pytest.raises(errors.UsageError, match="its own directory"):
        fc.CheckpointManager(
            tmp_path / "near", tiers=[fc.Tier(path=run), fc.Tier(path=run / inner)]
        )


def test_deleting_removes_a_step_from_every_tier(far: Far, tmp_path: Path) -> None:
    near = tmp_path / "near"
    with fc.CheckpointManager(near, keep_policy=_LATEST(1), tiers=[far.tier()]) as manager:
        for step in (1, 2, 3):
            manager.save(step, _items(step))
            manager.wait_until_finished()
        manager.delete(1)  # only the tier has it
        manager.delete(3)
        assert manager.all_steps() == [2]
        with pytest.raises(errors.StepNotFoundError):
            manager.delete(1)
        far.set_down(True)
        manager.save(4, _items(4)).result()
        far.set_down(False)
    assert list(far.values()) == [2, 4]


# ------------------------------------------------------------------------------------ arrival


def test_a_file_that_arrives_in_part_is_sent_again_before_the_step_counts(tmp_path: Path) -> None:
    class Lossy(LocalStorage):
        num_losses = 4

        def put_file(self, source: str, path: str) -> None:
            super().put_file(source, path)
            if Lossy.num_losses and path.endswith(("_METADATA", ".ocdbt", ".safetensors")):
                Lossy.num_losses -= 1
                data = Path(path).read_bytes()
                Path(path).write_bytes(data[:-1] if Lossy.num_losses % 2 else data[:-1] + b"\0")

    far = tmp_path / "far"
    seen: list[int] = []

    def watch(event: fc.Event) -> None:
        if event.kind == "uploaded":
            seen.append(event.step)

    tier = fc.Tier(path=far, storage=Lossy())
    with fc.CheckpointManager(tmp_path / "near", tiers=[tier], on_event=watch) as manager:
        manager.save(1, _items(1))
        manager.wait_until_finished()
    assert Lossy.num_losses == 0 and seen == [1]
    assert checkpoint.verify_checkpoint(LocalStorage(), str(far / "1"), 1) == []


def test_a_listing_that_lacks_a_file_leaves_no_hole_in_the_copy(far: Far, tmp_path: Path) -> None:
    class Forgetful(LocalStorage):
        def walk(self, path: str) -> dict[str, Stat]:
            return {name: found for name, found in super().walk(path).items() if "/d" not in name}

    near = tmp_path / "near"
    with fc.CheckpointManager(near) as manager:
        manager.save(1, _items(1))
    with fc.CheckpointManager(near, storage=Forgetful(), tiers=[far.tier()]) as manager:
        manager.wait_until_finished()
    assert far.values() == {1: 1.0}


def test_a_copy_is_durable_before_it_counts(tmp_path: Path) -> None:
    storage, far = FaultyStorage(), tmp_path / "far"
    with fc.CheckpointManager(tmp_path / "near", tiers=[fc.Tier(path=far, storage=storage)]) as m:
        storage.forget()
        m.save(1, _items(1))
        m.wait_until_finished()
        done = [(each.kind, each.path) for each in storage.operations]
    published = done.index(("rename", str(far / "1")))
    synced = {path for kind, path in done[:published] if kind == "sync"}
    (tmp,) = {
        path
        for path in synced
        if path.startswith(f"{far}/1.") and "/" not in path[len(f"{far}/") :]
    }
    for name in LocalStorage().walk(str(far / "1")):
        assert os.path.join(tmp, name) in synced
        assert os.path.dirname(os.path.join(tmp, name)) in synced
    assert ("sync", str(far)) in done[published:]


def test_late_metrics_of_several_writers_all_arrive(far: Far, tmp_path: Path) -> None:
    near, names = tmp_path / "near", [f"m{i}" for i in range(12)]

    def record(mine: list[str]) -> None:
        with fc.CheckpointManager(near, read_only=True) as evaluator:
            for name in mine:
                evaluator.record_metrics(1, {name: 1.0, "shared": 2.0})

    with fc.CheckpointManager(near, tiers=[far.tier()]) as manager:
        manager.save(1, _items(1)).result()
        threads = [threading.Thread(target=record, args=(names[i::3],)) for i in range(3)]
        for thread in threads:
            thread.start()
        for name in ("a", "b", "c"):
            manager.record_metrics(1, {name: 3.0})
        for thread in threads:
            thread.join()
        manager.wait_until_finished()
        remote = manager._steps.remote[0]
        num_records = len(remote.storage.list(f"{remote.hidden}/metrics"))
        manager.record_metrics(1, {"last": 4.0})
        manager.wait_until_finished()
        assert len(remote.storage.list(f"{remote.hidden}/metrics")) == num_records + 1
    storage = LocalStorage() if far.is_local else ObjectStorage(far.bucket)
    with fc.CheckpointManager(far.path, storage=storage, read_only=True) as reader:
        assert set(reader.metadata(1).metrics or {}) == {*names, "shared", "a", "b", "c", "last"}


# ------------------------------------------------------------------------------------ the record


def _flips(data: bytes) -> Iterator[bytes]:
    for place in range(len(data)):
        for bit in (0, 4):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            yield bytes(changed)


def test_a_record_of_promises_with_a_flipped_bit_loses_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from functional_ckpt.steps.promises import Promises

    path = str(tmp_path / "uploads.json")
    book = Promises(commit.protocol(LocalStorage(), str(tmp_path)), path, ["far"])
    book.promise("far", 12)
    book.decided["far"][12] = None
    book.write([12])
    data = Path(path).read_bytes()
    assert records.digest_hex(b"") not in data.decode()
    for changed in _flips(data):
        Path(path).write_bytes(changed)
        read = Promises(commit.protocol(LocalStorage(), str(tmp_path)), path, ["far"])
        read.read()
        assert read.was_damaged or list(read.promised["far"]) == [12]
    assert "recomputing which steps" in caplog.text


def test_a_damaged_record_of_promises_sends_what_is_in_doubt(far: Far, tmp_path: Path) -> None:
    near = tmp_path / "near"
    with fc.CheckpointManager(near, tiers=[far.tier()]) as manager:
        far.set_down(True)
        for step in (1, 2):
            manager.save(step, _items(step)).result()
    far.set_down(False)
    file = near / ".functional_ckpt" / "uploads.json"
    text = file.read_bytes()
    assert b"[1, 2]" in text
    file.write_bytes(text.replace(b"[1, 2]", b"[3, 2]", 1))
    with fc.CheckpointManager(near, keep_policy=_LATEST(1), tiers=[far.tier()]) as manager:
        manager.save(3, _items(3))
    assert list(far.values()) == [1, 2, 3]


def test_failure_after_an_upload_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = promises.Promises.write

    def write(self: promises.Promises, held: Any) -> None:
        if threading.current_thread().name == "upload":
            raise fc.errors.StorageError("No space left.", errno=errno.ENOSPC)
        real(self, held)

    monkeypatch.setattr(promises.Promises, "write", write)
    with fc.CheckpointManager(tmp_path / "near", tiers=[tmp_path / "far"]) as manager:
        manager.save(1, _items(1))
        with pytest.raises(fc.errors.SaveError, match="a later action failed: No space left"):
            manager.wait_until_finished()
        manager.save(2, _items(2))  # the thread continues
        with pytest.raises(fc.errors.SaveError, match="a later action failed"):
            manager.wait_until_finished()
    with fc.CheckpointManager(tmp_path / "far", read_only=True) as manager:
        assert manager.all_steps() == [1, 2]
