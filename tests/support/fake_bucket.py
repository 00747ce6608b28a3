"""A bucket in memory, with the store's clock in the test's hand and a hook before each request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from functional_ckpt.storage.buckets import lease
from functional_ckpt.storage.buckets.base import (
    Entry,
    NotFound,
    PreconditionFailed,
    TransientError,
    no_check,
)


class FakeBucket:
    """See `buckets.base.Bucket`.

    Args:
        clock: The store's clock, seconds.
        compares_as_it_deletes: Whether a delete can be conditional.

    Attributes:
        before: Called before each request with its kind and key.
        lost_answers: Kinds of requests that are executed, and then seem to have failed; each once.
        requests: Kind and key of every request.
    """

    uri = "fake://bucket"

    def __init__(
        self, clock: Callable[[], float] = lambda: 0.0, *, compares_as_it_deletes: bool = True
    ) -> None:
        self.before: Callable[[str, str], None] = lambda kind, key: None
        self.lost_answers: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self._clock = clock
        self._compares = compares_as_it_deletes
        self._objects: dict[str, tuple[bytes, Entry]] = {}
        self._num_writes = 0
        self._mutex = threading.RLock()

    @property
    def keys(self) -> list[str]:
        """The objects."""
        with self._mutex:
            return sorted(self._objects)

    def _begin(self, kind: str, key: str) -> None:
        self.requests.append((kind, key))
        self.before(kind, key)

    def _end(self, kind: str) -> None:
        if kind in self.lost_answers:
            self.lost_answers.remove(kind)
            raise TransientError("the connection was closed")

    def read(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        self._begin("read", key)
        with self._mutex:
            if key not in self._objects:
                raise NotFound(key)
            return self._objects[key][0][begin:end]

    def head(self, key: str) -> Entry:
        self._begin("head", key)
        with self._mutex:
            if key not in self._objects:
                raise NotFound(key)
            return self._objects[key][1]

    def list(self, folder: str) -> Iterable[Entry]:
        self._begin("list", folder)
        with self._mutex:
            start = f"{folder}/" if folder else ""
            return [entry for key, (_, entry) in self._objects.items() if key.startswith(start)]

    def names(self, folder: str) -> Iterable[str]:
        start = len(folder) + 1 if folder else 0
        return {entry.key[start:].split("/")[0] for entry in self.list(folder)}

    def write(self, key: str, data: bytes, *, replacing: str | None = None) -> Entry:
        self._begin("write", key)
        with self._mutex:
            there = self._objects.get(key)
            if replacing is not None and replacing != ("" if there is None else there[1].version):
                raise PreconditionFailed(key)
            self._num_writes += 1
            modified_ns = int(self._clock() * 1e9) + self._num_writes
            entry = Entry(key, len(data), modified_ns, str(self._num_writes))
            self._objects[key] = (bytes(data), entry)
        self._end("write")
        return entry

    def copy(
        self,
        source: Entry,
        target: str,
        check: Callable[[], None] = no_check,
        *,
        is_exact: bool = False,
    ) -> bool:
        self._begin("copy", target)
        check()
        with self._mutex:
            if source.key not in self._objects:
                raise NotFound(source.key)
            data, entry = self._objects[source.key]
            if is_exact and entry.version != source.version:
                raise PreconditionFailed(source.key)
        self.write(target, data, replacing="" if is_exact else None)
        return True

    def delete(self, keys: Iterable[str], *, versions: Mapping[str, str] | None = None) -> None:
        for key in keys:
            self._begin("delete", key)
            with self._mutex:
                there = self._objects.get(key)
                if there is None:
                    continue
                expected = (versions or {}).get(key)
                if self._compares and expected not in (None, there[1].version):
                    raise PreconditionFailed(key)
                del self._objects[key]
        self._end("delete")

    def upload(
        self, path: str, key: str, check: Callable[[], None] = no_check, *, replacing: str = ""
    ) -> None:
        self._begin("upload", key)
        check()
        self.write(key, Path(path).read_bytes(), replacing=replacing)

    def download(self, key: str, path: str) -> None:
        Path(path).write_bytes(self.read(key))

    def kvstore(self, folder: str) -> Mapping[str, Any] | None:
        return None

    def context(self) -> Mapping[str, Any]:
        return {}

    def redact(self, text: str) -> str:
        return text


class Clock:
    """The time, which passes only when a test says so, or when a lease is waited for."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def rule(self, monkeypatch: Any) -> None:
        """Makes leases look at this clock, and their sleeps advance it."""
        monkeypatch.setattr(lease, "_clocks", lambda: (self.now, self.now))
        monkeypatch.setattr(lease.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
