"""Requests to a bucket: made again after what may pass, with clear errors, under a lease."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Generator
from typing import TypeVar

from functional_ckpt import errors
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.storage.buckets.base import (
    Bucket,
    NotFound,
    PermanentError,
    PreconditionFailed,
    TransientError,
    retrying,
)
from functional_ckpt.storage.buckets.lease import Lease

__all__ = ["NUM_REQUESTS", "Requests"]

NUM_REQUESTS = 16
_T = TypeVar("_T")


class Requests:
    """What every request to a bucket goes through. Safe to use from any thread."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._leases: list[Lease] = []

    def check_leases(self) -> None:
        """Raises `LockedError` if another writer has taken a lease of ours over.

        Every request that changes the store is preceded by this, each time that it is made: what
        was true when an operation began need not be true when its last request goes out.
        """
        self._leases = [each for each in self._leases if not each.is_released]
        for each in self._leases:
            each.check()

    def _each(
        self,
        action: str,
        path: str,
        pairs: list[tuple[str, str]],
        call: Callable[[str, str], None],
    ) -> None:
        """Many requests that change the store, several at a time."""
        run_in_threads(
            [lambda pair=pair: self._change(action, path, lambda: call(*pair)) for pair in pairs],
            NUM_REQUESTS,
        )

    def _ask(self, action: str, path: str, request: Callable[[], _T]) -> _T:
        with self._clear(action, path):
            return retrying(request)

    def _change(self, action: str, path: str, request: Callable[[], object]) -> None:
        """A request that changes the store: made, and made again, only while the leases hold."""

        def attempt() -> None:
            self.check_leases()
            request()

        self._ask(action, path, attempt)

    @contextlib.contextmanager
    def _clear(self, action: str, path: str) -> Generator[None]:
        try:
            yield
        except (NotFound, PreconditionFailed, PermanentError, TransientError) as error:
            raise self._error(action, path, error) from None

    def _error(self, action: str, path: str, error: Exception) -> errors.CheckpointError:
        if isinstance(error, PreconditionFailed):
            return errors.StepExistsError(f"Cannot {action} {path}: the path exists.", path=path)
        if isinstance(error, NotFound):
            code = errno.ENOENT
            text = f"{os.strerror(code)} [errno {code}]"
        else:
            code = error.errno if isinstance(error, PermanentError) else errno.EIO
            text = self._bucket.redact(str(error))
        return errors.StorageError(f"Cannot {action} {path}: {text}.", errno=code, path=path)
