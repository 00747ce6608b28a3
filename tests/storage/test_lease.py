"""A lease: one writer holds it, renews it, and notices before its next request that it was lost."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from fake_bucket import Clock, FakeBucket

from functional_ckpt import errors
from functional_ckpt.storage import queries
from functional_ckpt.storage.buckets import base, lease
from functional_ckpt.storage.buckets.base import SpooledBucket, TransientError
from functional_ckpt.storage.buckets.lease import Lease
from functional_ckpt.storage.object_store import ObjectStorage
from functional_ckpt.storage.open import connect
from functional_ckpt.storage.requests import Requests

KEY = "run/.functional_ckpt/lock"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.rule(monkeypatch)
    return clock


@pytest.fixture
def bucket(clock: Clock) -> FakeBucket:
    return FakeBucket(clock)


def _record(bucket: FakeBucket) -> dict[str, Any]:
    return json.loads(bucket.read(KEY))


def _hold(bucket: FakeBucket, **fields: object) -> None:
    """Another machine's lease, written now."""
    record = {"pid": 1, "host": "other", "machine": "other", "lease": uuid.uuid4().hex, **fields}
    bucket.write(KEY, json.dumps(record).encode())


def test_a_free_lease_is_taken_and_released(bucket: FakeBucket) -> None:
    held = lease.take(bucket, KEY)
    assert _record(bucket)["lease"] == held._token
    held.check()
    held.release()
    held.release()
    assert list(bucket.list("")) == []


def test_a_live_process_of_this_machine_is_not_waited_for(bucket: FakeBucket, clock: Clock) -> None:
    held = lease.take(bucket, KEY)
    before = clock.now
    with pytest.raises(errors.LockedError, match="Another live writer"):
        lease.take(bucket, KEY)
    assert clock.now == before
    held.release()


def test_another_machine_s_lease_is_taken_once_it_has_run_out(
    bucket: FakeBucket, clock: Clock
) -> None:
    _hold(bucket)
    before = clock.now
    held = lease.take(bucket, KEY)
    assert clock.now - before >= lease.LEASE_SECONDS
    assert _record(bucket)["lease"] == held._token
    assert [entry.key for entry in bucket.list("")] == [KEY]  # the object for the clock is gone
    held.release()


def test_an_old_lease_is_taken_at_once(bucket: FakeBucket, clock: Clock) -> None:
    _hold(bucket)
    clock.now += lease.LEASE_SECONDS
    before = clock.now
    lease.take(bucket, KEY).release()
    assert clock.now == before


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"pid": 1, "host": "a copied lock"}'])
def test_a_damaged_lease_runs_out_too(text: bytes, bucket: FakeBucket, clock: Clock) -> None:
    bucket.write(KEY, text)
    before = clock.now
    held = lease.take(bucket, KEY)
    assert clock.now - before >= lease.LEASE_SECONDS
    held.release()


def test_a_lease_that_is_renewed_is_not_taken(
    bucket: FakeBucket, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hold(bucket, lease="the same")

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        _hold(bucket, lease="the same", renewed=clock.now)

    monkeypatch.setattr(lease.time, "sleep", sleep)
    with pytest.raises(errors.LockedError, match='"host": "other"'):
        lease.take(bucket, KEY)


def test_of_two_that_take_it_at_once_one_gets_it(bucket: FakeBucket, clock: Clock) -> None:
    def other_is_faster(kind: str, key: str) -> None:
        if kind == "write" and key == KEY:
            bucket.before = lambda kind, key: None
            _hold(bucket)

    bucket.before = other_is_faster
    before = clock.now
    held = lease.take(bucket, KEY)  # the other then lets it run out
    assert clock.now - before >= lease.LEASE_SECONDS
    held.release()


def test_a_lost_answer_is_no_lost_lease(bucket: FakeBucket, clock: Clock) -> None:
    bucket.lost_answers = ["write"]
    held = lease.take(bucket, KEY)
    for _ in range(3):
        bucket.lost_answers = ["write"]
        with pytest.raises(TransientError):
            held._renew_now(is_due=True)
        clock.now += lease.LEASE_SECONDS * 0.8
        held.check()  # by a second write, on condition of the first
    assert bucket.lost_answers == []
    held.release()
    assert list(bucket.list("")) == []


def test_two_threads_do_not_renew_a_lease_at_once(bucket: FakeBucket) -> None:
    held = lease.take(bucket, KEY)
    other = threading.Thread(target=held._renew_now, kwargs={"is_due": True})
    under_way: list[str] = []

    def count(kind: str, key: str) -> None:
        if kind == "write":
            under_way.append(key)
            if len(under_way) == 1:
                other.start()
                other.join(0.1)
                assert len(under_way) == 1

    bucket.before = count
    held._renew_now(is_due=True)
    other.join()
    assert len(under_way) == 2
    held.check()
    held.release()


def test_a_fresh_lease_costs_no_request(bucket: FakeBucket, clock: Clock) -> None:
    held = lease.take(bucket, KEY)
    num_requests = len(bucket.requests)
    clock.now += lease.LEASE_SECONDS * 0.7
    held.check()
    assert len(bucket.requests) == num_requests
    clock.now += lease.LEASE_SECONDS * 0.1
    held.check()
    assert bucket.requests[num_requests:] == [("write", KEY)]
    held.check()
    assert len(bucket.requests) == num_requests + 1
    held.release()


def test_a_suspended_holder_learns_that_it_was_replaced(bucket: FakeBucket, clock: Clock) -> None:
    held = lease.take(bucket, KEY)
    clock.now += 3600
    _hold(bucket)
    for _ in range(2):
        with pytest.raises(errors.LockedError, match="another writer took it over"):
            held.check()
    held.release()
    assert _record(bucket)["machine"] == "other"  # held by another writer


def test_a_suspended_holder_learns_that_the_next_one_has_come_and_gone(
    bucket: FakeBucket, clock: Clock
) -> None:
    held = lease.take(bucket, KEY)
    clock.now += 3600
    bucket.delete([KEY])
    with pytest.raises(errors.LockedError, match="another writer took it over"):
        held.check()


def test_a_suspended_holder_that_nobody_replaced_goes_on(bucket: FakeBucket, clock: Clock) -> None:
    held = lease.take(bucket, KEY)
    clock.now += 3600
    held.check()
    assert _record(bucket)["lease"] == held._token
    held.release()


def test_the_other_clock_shows_a_suspension_too(
    bucket: FakeBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = lease.take(bucket, KEY)
    clock = lease._clocks()
    monkeypatch.setattr(lease, "_clocks", lambda: (clock[0] + 3600, clock[1]))
    _hold(bucket)
    with pytest.raises(errors.LockedError):
        held.check()


def test_a_store_that_does_not_answer_is_no_other_writer(bucket: FakeBucket, clock: Clock) -> None:
    held = lease.take(bucket, KEY)

    def fail(kind: str, key: str) -> None:
        raise TransientError("down")

    bucket.before = fail
    held._try_to_renew()  # logs it
    held.check()
    clock.now += lease.LEASE_SECONDS
    with pytest.raises(errors.StorageError, match="Cannot renew the lease"):
        held.check()
    bucket.before = lambda kind, key: None
    held.check()
    held.release()


def test_a_lease_that_could_not_be_given_back_is_free_for_this_process(
    bucket: FakeBucket, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_MAX_SECONDS", 0.0)
    held = lease.take(bucket, KEY)

    def fail(kind: str, key: str) -> None:
        raise TransientError("down")

    bucket.before = fail
    held.release()
    bucket.before = lambda kind, key: None
    before = clock.now
    lease.take(bucket, KEY).release()
    assert clock.now == before


def test_a_release_leaves_the_next_holder_s_lease(bucket: FakeBucket) -> None:
    held = lease.take(bucket, KEY)

    def overtake(kind: str, key: str) -> None:
        if kind == "delete":
            bucket.before = lambda kind, key: None
            _hold(bucket)

    bucket.before = overtake
    held.release()
    assert _record(bucket)["machine"] == "other"


def test_a_store_without_versions_lets_a_lease_run_out_too(clock: Clock) -> None:
    """The versions of such a store are digests: only the content reveals a change."""
    path = f"memory://bucket-{uuid.uuid4().hex[:8]}/run/.functional_ckpt/lock"
    storage = connect(path)[0]
    assert isinstance(storage, ObjectStorage)
    storage.write(path, b'{"pid": 1, "machine": "other", "lease": "x"}')
    held = storage.lock(path)
    assert json.loads(storage.read(path))["lease"] == held._token
    clock.now += 3600
    held.check()
    held.release()
    assert not queries.exists(storage, path)


def test_the_age_of_a_lease_is_told_by_the_store_and_leaves_nothing_there(
    bucket: FakeBucket, clock: Clock
) -> None:
    _hold(bucket)
    modified_ns = bucket.head(KEY).modified_ns
    clock.now += 7
    assert lease._age_seconds(bucket, KEY, modified_ns) == pytest.approx(7)
    assert lease._age_seconds(bucket, KEY, 0) == 0.0
    assert [entry.key for entry in bucket.list("")] == [KEY]


@pytest.mark.parametrize("kind", ["head", "read", "write"])
def test_an_object_that_vanishes_is_not_replaced(kind: str, bucket: FakeBucket) -> None:
    objects, path = ObjectStorage(bucket).objects, f"{bucket.uri}/run/7/marker"
    objects.overwrite(path, b"old")

    def other_removes_it(each: str, key: str) -> None:
        if each == kind:
            bucket.before = lambda kind, key: None
            bucket.delete([key])

    bucket.before = other_removes_it
    assert not objects.replace_exactly(path, b"old", b"new")
    assert bucket.keys == []


def test_a_lease_that_is_added_during_a_check_is_checked_from_then_on(bucket: FakeBucket) -> None:
    requests, added = Requests(bucket), Lease(bucket, KEY)
    adding = threading.Thread(target=requests.add_lease, args=(added,))

    class Leases(list[Lease]):
        def __iter__(self) -> Iterator[Lease]:
            yield from super().__iter__()
            adding.start()
            adding.join(0.1)

    requests._leases = Leases()
    requests.check_leases()
    adding.join()
    assert requests._leases == [added]


def test_the_version_of_an_object_that_was_spooled_follows_its_content() -> None:
    one, two = (SpooledBucket.written("key", content) for content in (b"one", b"more"))
    assert (one.key, one.size_bytes, two.size_bytes) == ("key", 3, 4)
    assert one == SpooledBucket.written("key", b"one") and one.version != two.version
