"""Requests to a bucket by path, retried after transient errors, only while the leases hold."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Generator
from typing import Protocol, TypeVar

from functional_ckpt import errors
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.storage.buckets.base import (
    Bucket,
    Entry,
    NotFound,
    PermanentError,
    PreconditionFailed,
    TransientError,
    retrying,
)
from functional_ckpt.storage.queries import NUM_REQUESTS

_T = TypeVar("_T")


class Permit(Protocol):
    """The right to change a store, such as a lease."""

    @property
    def is_released(self) -> bool:
        """Whether it is not needed any more."""
        ...

    @property
    def is_fresh(self) -> bool:
        """Whether this process may write without a renewal."""
        ...

    def renew_if_stale(self) -> None:
        """Makes sure that this process may still write; `LockedError` if not."""


class Requests:
    """Sends all requests to a bucket. Safe to use from any thread.

    Args:
        bucket: The bucket; paths are URIs below its own.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self._leases: list[Permit] = []
        self._links: dict[str, str] = {}
        self._mutex = threading.Lock()

    def add_lease(self, lease: Permit) -> None:
        """Checks a lease before every change from now on, until it is released."""
        with self._mutex:
            self._leases.append(lease)

    def check_leases(self) -> None:
        """Raises `LockedError` if another writer has taken over a lease of this process.

        This precedes each request that changes the store, and each attempt: the lease may expire
        between the start of an operation and its last request.
        """
        with self._mutex:
            self._leases = leases = [each for each in self._leases if not each.is_released]
        for each in leases:
            each.renew_if_stale()

    def check_fresh(self) -> None:
        """Raises `TransientError` if a lease must be renewed first; sends no request.

        Long requests call it repeatedly.
        """
        with self._mutex:
            leases = [each for each in self._leases if not each.is_released]
        if not all(each.is_fresh for each in leases):
            raise TransientError(f"{self.bucket.uri}: the lease must be renewed first")

    def key(self, path: str) -> str:
        """Returns the key of a path; resolves links that this process wrote."""
        root = self.bucket.uri
        if path != root and not path.startswith(f"{root}/"):
            raise errors.UsageError(f"{path} is not in {root}.", path=path)
        key = path[len(root) + 1 :].strip("/")
        with self._mutex:
            links = tuple(self._links.items())
        for link, target in links:
            if key.startswith(f"{link}/"):
                return target + key[len(link) :]
        return key

    def add_link(self, key: str, target: str) -> None:
        """Registers a link for `key` to resolve."""
        with self._mutex:
            self._links[key] = target

    def entry(self, path: str) -> Entry | None:
        """Returns the metadata of an object; None if there is none."""
        key = self.key(path)
        return self._if_there("look at", path, lambda: self.bucket.head(key)) if key else None

    def content(self, path: str) -> bytes | None:
        """Returns the content of an object; None if there is none."""
        key = self.key(path)
        return self._if_there("read", path, lambda: self.bucket.read(key))

    def _if_there(self, action: str, path: str, request: Callable[[], _T]) -> _T | None:
        def attempt() -> _T | None:
            try:
                return request()
            except NotFound:
                return None

        return self.ask(action, path, attempt)

    def each(
        self,
        action: str,
        path: str,
        pairs: list[tuple[Entry, str]],
        call: Callable[[Entry, str], object],
    ) -> None:
        """Sends many requests that change the store, several at a time."""
        run_in_threads(
            [lambda pair=pair: self.change(action, path, lambda: call(*pair)) for pair in pairs],
            NUM_REQUESTS,
        )

    def ask(self, action: str, path: str, request: Callable[[], _T]) -> _T:
        """Sends a request, and retries it after a transient error."""
        with self.clear_errors(action, path):
            return retrying(request)

    def change(self, action: str, path: str, request: Callable[[], object]) -> None:
        """Sends a request that changes the store; each attempt only while the leases hold."""

        def attempt() -> None:
            self.check_leases()
            request()

        self.ask(action, path, attempt)

    @contextlib.contextmanager
    def clear_errors(self, action: str, path: str) -> Generator[None]:
        """Converts the bucket's errors to errors of this package."""
        try:
            yield
        except (NotFound, PreconditionFailed, PermanentError, TransientError) as error:
            raise self.error(action, path, error) from None

    def error(self, action: str, path: str, error: Exception) -> errors.CheckpointError:
        """Returns an error of the bucket as one of this package, without credentials."""
        if isinstance(error, PreconditionFailed):
            return errors.StepExistsError(f"Cannot {action} {path}: the path exists.", path=path)
        if isinstance(error, NotFound):
            code = errno.ENOENT
            text = f"{os.strerror(code)} [errno {code}]"
        else:
            code = error.errno if isinstance(error, PermanentError) else errno.EIO
            text = self.bucket.redact(str(error))
        return errors.StorageError(f"Cannot {action} {path}: {text}.", errno=code, path=path)
