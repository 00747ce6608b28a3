"""Buckets of the providers of Apache Libcloud: `libcloud://PROVIDER:CONTAINER/path`.

The provider's account is LIBCLOUD_KEY and LIBCLOUD_SECRET; LIBCLOUD_REGION and LIBCLOUD_HOST where
it needs them. Arrays take the way of a local copy, and a driver is used by one thread at a time.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import errno
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from functional_ckpt import errors
from functional_ckpt.storage.buckets import credentials
from functional_ckpt.storage.buckets.base import (
    Entry,
    NotFound,
    PermanentError,
    SpooledBucket,
    TransientError,
    no_check,
)


def open_libcloud(uri: str, name: str) -> LibcloudBucket:
    """Returns a container of a provider, such as `local:bucket` or `azure_blobs:bucket`.

    Raises:
        UsageError: Libcloud is not installed, or there is no such provider.
    """
    provider, _, container = name.partition(":")
    if not container:
        raise errors.UsageError(f"{uri}: expected libcloud://PROVIDER:CONTAINER/path.", path=uri)
    try:
        from libcloud.storage import providers
    except ImportError as error:
        raise errors.UsageError(
            "libcloud:// needs Apache Libcloud: pip install 'functional-ckpt[libcloud]'."
        ) from error
    options = {
        option: os.environ[variable]
        for option, variable in (("region", "LIBCLOUD_REGION"), ("host", "LIBCLOUD_HOST"))
        if os.environ.get(variable)
    }
    key, secret = os.environ.get("LIBCLOUD_KEY", ""), os.environ.get("LIBCLOUD_SECRET")
    secrets = tuple(text for text in (key, secret) if text and provider != "local")
    try:
        make: Any = providers.get_driver(provider)
        driver: Any = make(key, secret, **options) if secret else make(key, **options)
        return LibcloudBucket(uri, driver, driver.get_container(container), secrets)
    except AttributeError as error:
        raise errors.UsageError(f"{uri}: Libcloud has no provider {provider!r}.") from error
    except Exception as error:  # noqa: BLE001 - providers raise their libraries' errors
        text = credentials.redact(f"{type(error).__name__}: {error}", secrets)
        raise errors.StorageError(
            f"Cannot open {uri}: {text}.", errno=errno.EACCES, path=uri
        ) from None


class LibcloudBucket(SpooledBucket):
    """A container behind Libcloud; see `base.Bucket`."""

    def __init__(self, uri: str, driver: Any, container: Any, secrets: tuple[str, ...]) -> None:
        self.uri = uri
        self._driver = driver
        self._container = container
        self._secrets = secrets
        self._mutex = threading.RLock()

    def read(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        """Returns bytes `begin` to `end` of an object."""
        with self._clear(key):
            found = self._get(key)
            if begin == (found.size if end is None else end):
                return b""
            if begin == 0 and end in (None, found.size):
                parts = self._driver.download_object_as_stream(found)
            else:
                parts = self._driver.download_object_range_as_stream(found, begin, end)
            return b"".join(parts)

    def head(self, key: str) -> Entry:
        """Returns the metadata of an object."""
        with self._clear(key):
            return _entry(self._get(key))

    def list(self, folder: str) -> Iterable[Entry]:
        """Returns every object below a folder."""
        with self._clear(folder), warnings.catch_warnings():
            # Drivers that list everything and then leave out say so at every call.
            warnings.filterwarnings("ignore", "Driver .* native object filtering", UserWarning)
            prefix = f"{folder}/" if folder else None
            found = self._driver.iterate_container_objects(self._container, prefix=prefix)
            return [_entry(each) for each in found]

    def write(self, key: str, data: bytes, *, replacing: str | None = None) -> Entry:
        """Writes an object; a condition is looked at first: two writers may both pass."""
        self.check_version(key, replacing)
        with tempfile.NamedTemporaryFile() as file:  # an empty stream is no object to some drivers
            file.write(data)
            file.flush()
            self.upload(file.name, key)
        return self.written(key, data)

    def copy(
        self,
        source: Entry,
        target: str,
        check: Callable[[], None] = no_check,
        *,
        is_exact: bool = False,
    ) -> bool:
        """Copies an object through this machine; on no condition."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "object")
            self.download(source.key, path)
            self.upload(path, target)
        return True

    def delete(self, keys: Iterable[str], *, versions: Mapping[str, str] | None = None) -> None:
        """Deletes objects; on no condition."""
        for key in keys:
            with contextlib.suppress(NotFound), self._clear(key):
                self._driver.delete_object(self._get(key))

    def upload(
        self, path: str, key: str, check: Callable[[], None] = no_check, *, replacing: str = ""
    ) -> None:
        """Writes a file into an object; Libcloud compares the digest that the store reports."""
        check()
        with self._clear(key):
            self._driver.upload_object(path, self._container, key)
            if self.head(key).size_bytes != os.path.getsize(path):
                raise TransientError(f"{key} differs after the upload")

    def download(self, key: str, path: str) -> None:
        """Writes an object into a new file."""
        with self._clear(key):
            self._driver.download_object(self._get(key), path, overwrite_existing=True)

    def redact(self, text: str) -> str:
        """Returns a message without the account's key."""
        return credentials.redact(text, self._secrets)

    def _get(self, key: str) -> Any:
        return self._driver.get_object(self._container.name, key)

    @contextlib.contextmanager
    def _clear(self, key: str) -> Generator[None]:
        from libcloud.common import types as common
        from libcloud.storage import types as storage

        try:
            with self._mutex:  # a driver has one connection
                yield
        except storage.ObjectHashMismatchError as error:
            raise TransientError(self.redact(f"{self.uri}: {error}")) from None
        except storage.ObjectError:  # there is none, or a folder to drivers that have folders
            raise NotFound(key) from None
        except (common.InvalidCredsError, storage.ContainerDoesNotExistError) as error:
            raise PermanentError(self.redact(str(error)), errno.EACCES) from None
        except (common.LibcloudError, OSError) as error:
            raise TransientError(self.redact(f"{self.uri}: {error}")) from None


def _entry(found: Any) -> Entry:
    modified: Any = found.extra.get("last_modified") or found.extra.get("modify_time")
    seconds = 0.0
    if isinstance(modified, (int, float)):
        seconds = float(modified)
    elif isinstance(modified, str):
        with contextlib.suppress(ValueError, TypeError):
            seconds = email.utils.parsedate_to_datetime(modified).timestamp()
        with contextlib.suppress(ValueError):
            seconds = datetime.datetime.fromisoformat(modified).timestamp()
    return Entry(str(found.name), int(found.size), int(seconds * 1e9), None)
