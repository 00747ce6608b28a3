"""A bucket: the interface of all object stores, and the retrying of failed requests.

Keys are paths without a slash at either end. `s3` has the bucket of S3 and of compatible stores,
`gcs` that of GCS; `fsspec` and `libcloud` have those of the libraries of that name.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import io
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import xxhash

from functional_ckpt import errors

if TYPE_CHECKING:
    from functional_ckpt.storage.buckets.s3_requests import S3Requests

_log = logging.getLogger("functional_ckpt")
_T = TypeVar("_T")

# Together about five minutes: an outage of a minute is waited out, one of an hour is an error.
_MAX_ATTEMPTS = 40
_MAX_SECONDS = 300.0
_MAX_WAIT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Metadata of an object.

    Attributes:
        key: Its key.
        size_bytes: Its size.
        modified_ns: When it was written by the store's clock, nanoseconds since the epoch.
        version: Changes with every write; None where the store has none.
    """

    key: str
    size_bytes: int
    modified_ns: int
    version: str | None = None


class NotFound(Exception):
    """There is no such object."""


class PreconditionFailed(Exception):
    """A condition on a write does not hold."""


class TransientError(Exception):
    """A request failed that may go well when it is made again."""


class PermanentError(Exception):
    """A request that fails however often it is made: a permission, a bucket, a region, a token."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class CheckedFile(io.FileIO):
    """A file of which every part is checked before it is read."""

    def __init__(self, path: str, check: Callable[[], None]) -> None:
        super().__init__(path)
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        """Returns the next bytes."""
        self._check()
        return super().read(-1 if size is None else size) or b""


def no_check() -> None:
    """Checks nothing."""


class LeaseStore(Protocol):
    """Objects by key, written on condition: all that a lease needs. Safe to use from any thread.

    Every method raises `PermanentError` or `TransientError`, and `NotFound` where an object is
    needed.
    """

    @property
    def uri(self) -> str:
        """The URI above its keys, such as `s3://bucket`."""
        ...

    def head(self, key: str) -> Entry:
        """Returns the metadata of an object."""
        ...

    def read(self, key: str) -> bytes:
        """Returns the content of an object."""
        ...

    def write(self, key: str, data: bytes, *, replacing: str | None = None) -> Entry:
        """Writes an object at once.

        Args:
            key: Its key.
            data: Its content.
            replacing: The version that it must replace: "" for none; None for any.

        Raises:
            PreconditionFailed: The object has another version, or is gone.
        """
        ...

    def delete(self, keys: Iterable[str], *, versions: Mapping[str, str] | None = None) -> None:
        """Deletes objects; those that are not there are passed over.

        Args:
            keys: Their keys.
            versions: Expected versions, by key; some stores compare them on deletion, the others
                delete unconditionally.

        Raises:
            PreconditionFailed: One of them has changed, and is still there.
        """

    def redact(self, text: str) -> str:
        """Returns a message without the credentials that it may quote."""
        ...


class Bucket(LeaseStore, Protocol):
    """An object store."""

    def read(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        """Returns bytes `begin` to `end` of an object, which is at least that long."""
        ...

    def list(self, folder: str) -> Iterable[Entry]:
        """Returns every object below a folder, however deep; "" is the entire bucket."""
        ...

    def names(self, folder: str) -> Iterable[str]:
        """Returns the names of the objects and folders in a folder."""
        ...

    def copy(
        self,
        source: Entry,
        target: str,
        check: Callable[[], None] = no_check,
        *,
        is_exact: bool = False,
    ) -> bool:
        """Copies an object within the store.

        Args:
            source: The object.
            target: The key of the copy.
            check: As of `upload`.
            is_exact: Whether the object must have the version of `source`, and the copy be new;
                only some stores compare it here.

        Returns:
            False if the store's digests of the two differ: the copy is another object's. Not all
            stores have comparable ones.

        Raises:
            PreconditionFailed: With `is_exact`, one of the two does not hold.
        """
        ...

    @property
    def part_requests(self) -> S3Requests | None:
        """Requests for objects made of parts; None where the store has none, or no key is known."""
        ...

    def upload(
        self, path: str, key: str, check: Callable[[], None] = no_check, *, replacing: str = ""
    ) -> None:
        """Writes a file into an object; the store holds exactly its bytes when it returns.

        Args:
            path: The file.
            key: The object.
            check: Raises `TransientError` if this writer may have lost its right to write; called
                before each part is sent. It makes no request.
            replacing: As of `write`; only some stores compare it here.

        Raises:
            PreconditionFailed: The object has another version.
        """

    def download(self, key: str, path: str) -> None:
        """Writes an object into a new file."""

    def kvstore(self, folder: str) -> Mapping[str, Any] | None:
        """TensorStore's spec of a folder; None where it has no driver for the store."""
        ...

    def context(self) -> Mapping[str, Any]:
        """TensorStore's resources, credentials among them."""
        ...


class SpooledBucket(abc.ABC):
    """Base of buckets that TensorStore cannot read: arrays use a local copy.

    Their libraries differ in listings and versions: a version is a digest.
    """

    @abc.abstractmethod
    def read(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        """See `Bucket.read`."""

    @abc.abstractmethod
    def list(self, folder: str) -> Iterable[Entry]:
        """See `Bucket.list`."""

    def names(self, folder: str) -> Iterable[str]:
        """Returns the names of the objects and folders in a folder."""
        return {each.key[len(folder) :].lstrip("/").split("/")[0] for each in self.list(folder)}

    @property
    def part_requests(self) -> None:
        """None: there are no such requests."""
        return

    def kvstore(self, folder: str) -> Mapping[str, Any] | None:
        """None: TensorStore has no driver for it."""
        return None

    def context(self) -> Mapping[str, Any]:
        """None but the defaults."""
        return {}

    def check_version(self, key: str, replacing: str | None) -> None:
        """Raises `PreconditionFailed` unless an object has the version to be replaced."""
        if replacing is None:
            return
        try:
            version = xxhash.xxh3_64_hexdigest(self.read(key))
        except NotFound:
            version = ""
        if version != replacing:
            raise PreconditionFailed(key)

    @staticmethod
    def written(key: str, data: bytes) -> Entry:
        """Returns the metadata of an object that was just written."""
        return Entry(key, len(data), 0, xxhash.xxh3_64_hexdigest(data))


def retrying(call: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """Makes a request until it goes well, waiting longer each time, by chance more or less.

    Raises:
        TransientError: It never did.
    """
    try:
        return call(*arguments, **options)  # tenacity is imported only when something fails
    except TransientError as error:
        return _retry(functools.partial(call, *arguments, **options), error)


def _retry(call: Callable[[], _T], error: TransientError) -> _T:
    try:
        import tenacity
    except ImportError:
        raise errors.UsageError(
            "Object stores need tenacity: pip install 'functional-ckpt[remote]'."
        ) from error

    def tell(state: tenacity.RetryCallState) -> None:
        if state.attempt_number >= 3 and state.outcome is not None:
            _log.warning("tried %d times: %s", state.attempt_number, state.outcome.exception())

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TransientError),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=_MAX_WAIT_SECONDS),
        stop=tenacity.stop_any(
            tenacity.stop_after_attempt(_MAX_ATTEMPTS), tenacity.stop_after_delay(_MAX_SECONDS)
        ),
        before_sleep=tell,
        reraise=True,
    )(call)
