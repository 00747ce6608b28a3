"""A writer's lease: what stands in for a lock where the store has none.

The lease is an object that says who holds it, written anew every few seconds on the condition that
it is still as its holder left it. One that was not written for longer than `LEASE_SECONDS`, by the
store's own clock, is free to be taken; that of a dead process of this machine is so at once.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.core.tree import plain_json
from functional_ckpt.storage.buckets.base import (
    Bucket,
    Entry,
    NotFound,
    PermanentError,
    PreconditionFailed,
    TransientError,
    retrying,
)

__all__ = ["LEASE_SECONDS", "Lease", "take"]

LEASE_SECONDS = 60.0
_RENEW_SECONDS = LEASE_SECONDS / 4
_LOOK_SECONDS = 2.0
_log = logging.getLogger("functional_ckpt")
# Leases of this process that it has given up, though the store could not be told.
_given_up: set[str] = set()


def take(bucket: Bucket, key: str) -> Lease:
    """Takes the lease at `key`; waits while its holder may be dead.

    Raises:
        LockedError: A live writer holds it.
    """
    seen: str | None = None
    while True:
        held = _look(bucket, key)
        if held is None:
            version = ""
        else:
            entry, holder = held
            version = entry.version or ""
            if not _is_dead(holder):
                if seen is not None and version != seen:  # it was renewed while we looked
                    raise _locked(bucket, key, holder)
                if _is_here(holder) or holder.get("lease") is None:
                    raise _locked(bucket, key, holder)
                seen = version
                if _age_seconds(bucket, key, entry) < LEASE_SECONDS:
                    time.sleep(_LOOK_SECONDS)
                    continue
        lease = Lease(bucket, key)
        try:
            lease.begin(version)
        except PreconditionFailed:
            continue
        return lease


def _look(bucket: Bucket, key: str) -> tuple[Entry, dict[str, Any]] | None:
    try:
        entry = retrying(bucket.head, key)
        text = retrying(bucket.read, key)
    except NotFound:
        return None
    try:
        holder = plain_json.parse(text)
    except ValueError:
        holder = {}
    return entry, cast("dict[str, Any]", holder if isinstance(holder, dict) else {})


def _age_seconds(bucket: Bucket, key: str, entry: Entry) -> float:
    """How old the lease is by the store's clock, which a fresh object tells."""
    probe = f"{key}.{uuid.uuid4().hex}.tmp"
    retrying(bucket.write, probe, b"")
    now = retrying(bucket.head, probe).modified_ns
    retrying(bucket.delete, [probe])
    return (now - entry.modified_ns) / 1e9


def _is_here(holder: dict[str, Any]) -> bool:
    return holder.get("machine") == _machine()


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder is a process of this machine that has ended, or gave it up."""
    if holder.get("lease") in _given_up:
        return True
    pid = holder.get("pid")
    if not _is_here(holder) or type(pid) is not int:
        return False
    return _started(pid) != holder.get("started")


def _machine() -> str:
    """This boot of this machine, and its processes' numbers."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return uuid.uuid4().hex  # unlike any other's: only time tells


def _started(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None when it has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _locked(bucket: Bucket, key: str, holder: dict[str, Any]) -> errors.LockedError:
    root = f"{bucket.uri}/{os.path.dirname(os.path.dirname(key))}"
    who = json.dumps({name: holder[name] for name in ("pid", "host") if name in holder})
    return errors.LockedError(
        f"Another live writer holds {root}: {who}. Stop it, give this run its own directory, or "
        "open the directory with read_only=True.",
        path=f"{bucket.uri}/{key}",
    )


class Lease:
    """A lease that this process holds and renews.

    Attributes:
        is_released: Whether it was given back.
    """

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.is_released = False
        self._bucket = bucket
        self._key = key
        self._version = ""
        self._renewed = time.monotonic()
        self._lost: str | None = None
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._pid = os.getpid()
        self._token = uuid.uuid4().hex

    def begin(self, replacing: str) -> None:
        """Takes it if it is as it was seen: the version `replacing`, "" for none."""
        try:
            self._version = retrying(self._write, replacing)
        except PreconditionFailed:
            if not self._is_ours():  # a write whose answer was lost is ours
                raise
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def check(self) -> None:
        """Raises `LockedError` when another writer took it over, or may have."""
        if self._lost is None and time.monotonic() - self._renewed > LEASE_SECONDS:
            self._try_to_renew()
            if self._lost is None and time.monotonic() - self._renewed > LEASE_SECONDS:
                self._lost = "the store could not be reached for longer than it lasts"
        if self._lost is not None:
            raise errors.LockedError(
                f"The right to write below {self._bucket.uri}/"
                f"{os.path.dirname(os.path.dirname(self._key))} was lost: {self._lost}. "
                "Start the run anew.",
                path=f"{self._bucket.uri}/{self._key}",
            )

    def release(self) -> None:
        """Lets the next writer in; safe to call twice."""
        if self.is_released or os.getpid() != self._pid:
            return
        self.is_released = True
        _given_up.add(self._token)
        self._stop.set()
        with self._mutex:
            try:
                if self._is_ours():
                    retrying(self._bucket.delete, [self._key])
            except (PermanentError, TransientError) as error:
                _log.warning(
                    "%s/%s ends in %.0f s: %s", self._bucket.uri, self._key, LEASE_SECONDS, error
                )

    def _write(self, replacing: str) -> str:
        record = {
            "pid": self._pid,
            "host": os.uname().nodename,
            "machine": _machine(),
            "started": _started(self._pid),
            "lease": self._token,
            "renewed": time.time_ns(),
        }
        entry = self._bucket.write(self._key, json.dumps(record).encode(), replacing=replacing)
        self._renewed = time.monotonic()
        return entry.version or self._bucket.head(self._key).version or ""

    def _is_ours(self) -> bool:
        held = _look(self._bucket, self._key)
        if held is None or held[1].get("lease") != self._token:
            return False
        self._version = held[0].version or ""
        return True

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_SECONDS) and self._lost is None:
            self._try_to_renew()

    def _try_to_renew(self) -> None:
        with self._mutex:
            if self.is_released:
                return
            try:
                self._version = self._write(self._version)
            except PreconditionFailed:
                if not self._is_ours():
                    self._lost = "another writer took it over"
            except (NotFound, PermanentError, TransientError) as error:
                _log.warning("%s/%s: not renewed: %s", self._bucket.uri, self._key, error)
