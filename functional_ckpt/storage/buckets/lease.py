"""A writer's lease: replaces a lock on stores without one.

The lease is an object that names its holder, rewritten every few seconds on the condition that it
is unchanged. One that was not written for longer than `LEASE_SECONDS`, by the store's own clock, is
free to be taken; that of a dead process of this machine is so at once.

A holder that was suspended finds out before its next request: `check` looks at the clock, and where
the lease may have run out it renews it on condition, which fails once another has taken it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from errno import EIO
from typing import Any, NamedTuple, cast

import xxhash

from functional_ckpt import errors
from functional_ckpt.core.tree import plain_json
from functional_ckpt.storage.buckets.base import (
    LeaseStore,
    NotFound,
    PermanentError,
    PreconditionFailed,
    TransientError,
    retrying,
)

LEASE_SECONDS = 60.0
_RENEW_SECONDS = LEASE_SECONDS / 4
_LOOK_SECONDS = 2.0
# The holder relies on its lease for this part of it; the rest is for requests on their way.
_RELIABLE_FRACTION = 0.75
_MAX_RENEWALS = 3
_log = logging.getLogger("functional_ckpt")
# Leases that this process has released, but could not delete in the store.
_given_up: set[str] = set()


def take(bucket: LeaseStore, key: str) -> Lease:
    """Takes the lease at `key`; waits while its holder may be dead.

    Raises:
        LockedError: A live writer holds it.
    """
    seen: str | None = None
    free_after_seconds, since = 0.0, _clocks()
    while True:
        held = retrying(_look, bucket, key)
        version = ""
        if held is not None and not _is_dead(held.holder):
            version = held.version
            if _is_here(held.holder) or seen not in (None, version):  # renewed while we looked
                raise _locked(bucket, key, held.holder)
            if seen is None:
                seen, since = version, _clocks()
                free_after_seconds = LEASE_SECONDS - _age_seconds(bucket, key, held.modified_ns)
            if _elapsed_seconds(since) < free_after_seconds:
                time.sleep(_LOOK_SECONDS)
                continue
        elif held is not None:
            version = held.version
        lease = Lease(bucket, key)
        try:
            lease.begin(version)
        except PreconditionFailed:
            continue
        return lease


class _Held(NamedTuple):
    """The content of a lease's object.

    Attributes:
        version: The version that a conditional write replaces.
        modified_ns: When it was written, by the store's clock; 0 where that is not known.
        holder: Its content; empty for a foreign object.
    """

    version: str
    modified_ns: int
    holder: Mapping[str, Any]


def _look(bucket: LeaseStore, key: str) -> _Held | None:
    """Returns the lease; its version is read first, so it is never newer than the content."""
    try:
        entry = bucket.head(key)
        text = bucket.read(key)
    except NotFound:
        return None
    try:
        record = plain_json.parse(text)
    except ValueError:
        record = None
    holder = cast("dict[str, Any]", record if isinstance(record, dict) else {})
    # Where the store has no versions, those of `SpooledBucket` are digests of the content.
    version = entry.version or xxhash.xxh3_64_hexdigest(text)
    return _Held(version, entry.modified_ns, holder)


def _age_seconds(bucket: LeaseStore, key: str, modified_ns: int) -> float:
    """Returns the lease's age by the store's clock, read from a fresh object; 0 if unknown."""
    if not modified_ns:
        return 0.0
    probe = f"{key}.{uuid.uuid4().hex}.tmp"
    retrying(bucket.write, probe, b"")
    now_ns = retrying(bucket.head, probe).modified_ns
    retrying(bucket.delete, [probe])
    return (now_ns - modified_ns) / 1e9


def _clocks() -> tuple[float, float]:
    """Two clocks in seconds: either may stand still while a machine is suspended or moved."""
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.time()


def _elapsed_seconds(since: tuple[float, float]) -> float:
    """Returns the time since then, by the clock that has advanced more."""
    return max(now - then for now, then in zip(_clocks(), since, strict=True))


def _is_here(holder: Mapping[str, Any]) -> bool:
    return holder.get("machine") == _machine()


def _is_dead(holder: Mapping[str, Any]) -> bool:
    """Returns whether the holder is a process of this machine that has ended, or gave it up."""
    if holder.get("lease") in _given_up:
        return True
    pid = holder.get("pid")
    if not _is_here(holder) or type(pid) is not int:
        return False
    return _started(pid) != holder.get("started")


def _machine() -> str:
    """Returns this boot of this machine, and its processes' numbers."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return uuid.uuid4().hex  # unique: only time shows that it is dead


def _started(pid: int) -> str | None:
    """Returns when a process of this machine started, in ticks; None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _locked(bucket: LeaseStore, key: str, holder: Mapping[str, Any]) -> errors.LockedError:
    root = f"{bucket.uri}/{os.path.dirname(os.path.dirname(key))}"
    who = json.dumps({name: holder[name] for name in ("pid", "host") if name in holder})
    return errors.LockedError(
        f"Another live writer holds {root}: {who}. Stop it, give this run its own directory, or "
        "open the directory with read_only=True.",
        path=f"{bucket.uri}/{key}",
    )


class Lease:
    """A lease that this process holds and renews. Safe to use from any thread."""

    def __init__(self, bucket: LeaseStore, key: str) -> None:
        self.is_released = False
        self._bucket = bucket
        self._key = key
        self._version = ""
        self._renewed = _clocks()
        self._is_lost = False
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._pid = os.getpid()
        self._token = uuid.uuid4().hex

    def begin(self, replacing: str) -> None:
        """Takes it if it is as it was seen: the version `replacing`, "" for none."""
        try:
            retrying(self._write, replacing)
        except PreconditionFailed:
            if not retrying(self._is_ours):  # a write whose answer was lost succeeded
                raise
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def check(self) -> None:
        """Raises `LockedError` if another writer has taken the lease over."""
        try:
            self.renew_if_stale()
        except (PermanentError, TransientError) as error:
            raise errors.StorageError(
                f"Cannot renew the lease {self._bucket.uri}/{self._key}: "
                f"{self._bucket.redact(str(error))}.",
                errno=EIO,
                path=f"{self._bucket.uri}/{self._key}",
            ) from error

    def renew_if_stale(self) -> None:
        """Makes sure that this process may still write; to be called before each request.

        The holder stops to rely on a lease a good while before others may take it, so that a
        request that was sent in time also arrives in time. Then it is renewed first.

        Raises:
            LockedError: Another writer has taken the lease over.
            TransientError: It ends soon, and the store does not answer.
        """
        if self._is_stale and not self._is_lost:
            self._renew_now()
        if self._is_lost:
            raise errors.LockedError(
                f"The right to write below {self._bucket.uri}/"
                f"{os.path.dirname(os.path.dirname(self._key))} was lost: another writer took it "
                "over. Start the run again.",
                path=f"{self._bucket.uri}/{self._key}",
            )

    @property
    def is_fresh(self) -> bool:
        """Whether this process may write without a renewal."""
        return not (self._is_lost or self._is_stale)

    def release(self) -> None:
        """Lets the next writer in; safe to call twice."""
        if self.is_released or os.getpid() != self._pid:
            return
        self.is_released = True
        _given_up.add(self._token)
        self._stop.set()
        self._give_back()

    def _give_back(self) -> None:
        with self._mutex:
            try:
                if retrying(self._is_ours):
                    versions = {self._key: self._version}
                    retrying(self._bucket.delete, [self._key], versions=versions)
            except PreconditionFailed:
                pass  # another writer has it by now
            except (PermanentError, TransientError) as error:
                _log.warning(
                    "could not release lease %s/%s, it expires in %.0f s: %s",
                    self._bucket.uri,
                    self._key,
                    LEASE_SECONDS,
                    error,
                )

    def drop(self) -> None:
        """Lets this process's next writer in at once, and others when the lease ends."""
        self.is_released = True
        _given_up.add(self._token)

    @property
    def _is_stale(self) -> bool:
        return _elapsed_seconds(self._renewed) > LEASE_SECONDS * _RELIABLE_FRACTION

    def _write(self, replacing: str) -> None:
        record = {
            "pid": self._pid,
            "host": os.uname().nodename,
            "machine": _machine(),
            "started": _started(self._pid),
            "lease": self._token,
            "renewed": time.time_ns(),
        }
        sent = _clocks()  # others count from when it arrived, which is later
        entry = self._bucket.write(self._key, json.dumps(record).encode(), replacing=replacing)
        self._version = entry.version or self._bucket.head(self._key).version or ""
        self._renewed = sent

    def _is_ours(self) -> bool:
        held = _look(self._bucket, self._key)
        if held is None or held.holder.get("lease") != self._token:
            return False
        self._version = held.version
        return True

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_SECONDS) and not self._is_lost:
            if self.is_released:  # it was dropped
                self._give_back()
                return
            self._try_to_renew()

    def _try_to_renew(self) -> None:
        try:
            self._renew_now(is_due=True)
        except (PermanentError, TransientError) as error:
            _log.warning("could not renew lease %s/%s: %s", self._bucket.uri, self._key, error)

    def _renew_now(self, *, is_due: bool = False) -> None:
        """Renews it, or learns that it was lost; nothing where another thread has just done so."""
        with self._mutex:
            if self.is_released or self._is_lost or not (is_due or self._is_stale):
                return
            for _ in range(_MAX_RENEWALS):
                try:
                    self._write(self._version)
                except (NotFound, PreconditionFailed):
                    # Not as we know it: written by us, if an answer was lost, or by another.
                    if not self._is_ours():
                        self._is_lost = True
                        return
                else:
                    return
            raise TransientError(f"{self._bucket.uri}/{self._key} cannot be renewed")
