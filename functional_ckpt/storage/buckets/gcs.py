"""Buckets of Google Cloud Storage, behind Google's own library; its only importer.

It uses application default credentials. An object's version is its generation, on which writes can
be conditional; uploads and complete reads are verified by CRC32C.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from functional_ckpt import errors
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.storage.buckets import credentials
from functional_ckpt.storage.buckets.base import (
    CheckedFile,
    Entry,
    NotFound,
    PermanentError,
    PreconditionFailed,
    TransientError,
    no_check,
)

_PART_BYTES = 16 * 2**20
_NUM_CONNECTIONS = 64
_TIMEOUT_SECONDS = (5, 60)  # to connect; between two pieces of an answer
_UPLOAD_SECONDS = 60.0
_MISSING_BUCKET = "bucket does not exist"
_FIELDS = "name,size,updated,generation"


def open_gcs(uri: str, name: str) -> GcsBucket:
    """Returns the bucket `name` of GCS, or of the server that STORAGE_EMULATOR_HOST names.

    Raises:
        UsageError: Google's library is not installed, or the server's name is no URL.
        StorageError: There are no application default credentials.
    """
    try:
        storage: Any = importlib.import_module("google.cloud.storage")
        auth: Any = importlib.import_module("google.auth.exceptions")
        requests: Any = importlib.import_module("requests.adapters")
    except ImportError as error:
        raise errors.UsageError(
            "gs:// by application default credentials needs google-cloud-storage: "
            "pip install 'functional-ckpt[gcs]'."
        ) from error
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        _tell_tensorstore(emulator)
    try:
        client = storage.Client(project=None)
    except auth.GoogleAuthError as error:
        text = " ".join(str(error).split())
        raise errors.StorageError(
            f"Cannot open {uri}: {text} Or set GCS_KEY and GCS_SECRET, an HMAC key.",
            errno=errno.EACCES,
            path=uri,
        ) from None
    # Nothing is traced, so nothing need be known of the bucket: it asked again after each 404.
    client._bucket_metadata_cache = None
    for scheme in ("https://", "http://"):  # as many connections as there may be requests at a time
        client._http.mount(scheme, requests.HTTPAdapter(pool_maxsize=_NUM_CONNECTIONS))
    return GcsBucket(uri, name, client)


def _tell_tensorstore(emulator: str) -> None:
    """Leads TensorStore's driver to the server: it has variables of its own, and nothing else."""
    if not emulator.startswith(("http://", "https://")):
        raise errors.UsageError(
            f"STORAGE_EMULATOR_HOST must start with http:// or https://; got {emulator!r}."
        )
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = emulator
    # Without a token it would look for this machine's account first.
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "anonymous"


class GcsBucket:
    """A bucket behind Google's library; see `base.Bucket`."""

    def __init__(self, uri: str, name: str, client: Any) -> None:
        self.uri = uri
        self._name = name
        self._client = client
        self._bucket = client.bucket(name)
        # `base.retrying` repeats requests, except for parts of a started upload.
        self._options = {"timeout": _TIMEOUT_SECONDS, "retry": None}

    @property
    def part_requests(self) -> None:
        """None: Google's library has no such requests."""
        return

    def read(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        """Returns bytes `begin` to `end` of an object."""
        if begin == end:
            return b""
        last = None if end is None else end - 1
        with self._clear(key):
            data = self._bucket.blob(key).download_as_bytes(
                start=begin or None, end=last, raw_download=True, **self._options
            )
        if end is not None and len(data) != end - begin:
            raise TransientError(f"{key}: {len(data)} bytes received of {end - begin}")
        return data

    def head(self, key: str) -> Entry:
        """Returns the metadata of an object."""
        with self._clear(key):
            blob = self._bucket.blob(key)
            blob.reload(**self._options)
            return _entry(blob)

    def list(self, folder: str) -> Iterable[Entry]:
        """Returns every object below a folder."""
        with self._clear(folder, of_bucket=True):
            found = self._blobs(folder, fields=f"items({_FIELDS}),nextPageToken")
            return [_entry(blob) for blob in found if not blob.name.endswith("/")]

    def names(self, folder: str) -> Iterable[str]:
        """Returns the names of the objects and folders in a folder."""
        with self._clear(folder, of_bucket=True):
            found = self._blobs(folder, fields="items(name),prefixes,nextPageToken", delimiter="/")
            # The console represents an empty folder by a name that ends with a slash.
            keys = [blob.name for blob in found if not blob.name.endswith("/")]
            return {key.rstrip("/").rpartition("/")[2] for key in [*keys, *found.prefixes]}

    def _blobs(self, folder: str, **options: Any) -> Any:
        prefix = f"{folder}/" if folder else None
        return self._client.list_blobs(self._bucket, prefix=prefix, **options, **self._options)

    def write(self, key: str, data: bytes, *, replacing: str | None = None) -> Entry:
        """Writes an object at once."""
        generation = None if replacing is None else int(replacing or 0)
        with self._clear(key):
            blob = self._bucket.blob(key)
            blob.upload_from_string(
                data, "application/octet-stream", if_generation_match=generation, **self._options
            )
            return _entry(blob)

    def copy(
        self,
        source: Entry,
        target: str,
        check: Callable[[], None] = no_check,
        *,
        is_exact: bool = False,
    ) -> bool:
        """Copies an object within the store; an exact copy has the same CRC32C."""
        conditions: dict[str, Any] = {}
        with self._clear(source.key):
            old, new = self._bucket.blob(source.key), self._bucket.blob(target)
            if is_exact and source.version is not None:
                generation = int(source.version)
                conditions = {"if_source_generation_match": generation, "if_generation_match": 0}
                old.reload(if_generation_match=generation, **self._options)
            token = None
            while True:  # a large one may take several requests
                check()
                token, _, _ = new.rewrite(old, token=token, **conditions, **self._options)
                if token is None:
                    break
        return not is_exact or None in (old.crc32c, new.crc32c) or old.crc32c == new.crc32c

    def delete(self, keys: Iterable[str], *, versions: Mapping[str, str] | None = None) -> None:
        """Deletes objects, several at a time, on the condition of their generation."""
        known = versions or {}
        run_in_threads(
            [lambda key=key: self._delete(key, known.get(key)) for key in keys],
            _NUM_CONNECTIONS // 4,
        )

    def _delete(self, key: str, version: str | None) -> None:
        generation = None if version is None else int(version)
        with contextlib.suppress(NotFound), self._clear(key):
            self._bucket.blob(key).delete(if_generation_match=generation, **self._options)

    def upload(
        self, path: str, key: str, check: Callable[[], None] = no_check, *, replacing: str = ""
    ) -> None:
        """Uploads a file in parts; the library compares the CRC32C of the object."""
        retry: Any = importlib.import_module("google.cloud.storage.retry")
        size_bytes = os.path.getsize(path)
        with self._clear(key), CheckedFile(path, check) as file:
            blob = self._bucket.blob(key, chunk_size=_PART_BYTES)
            blob.upload_from_file(
                file,
                size=size_bytes,
                content_type="application/octet-stream",
                if_generation_match=int(replacing or 0),
                timeout=_TIMEOUT_SECONDS,
                retry=retry.DEFAULT_RETRY.with_timeout(_UPLOAD_SECONDS),
            )
        if blob.size != size_bytes:
            raise TransientError(f"{key}: {blob.size} bytes uploaded of {size_bytes}")

    def download(self, key: str, path: str) -> None:
        """Writes an object into a new file."""
        with self._clear(key):
            self._bucket.blob(key).download_to_filename(path, raw_download=True, **self._options)

    def kvstore(self, folder: str) -> Mapping[str, Any]:
        """TensorStore's spec of a folder."""
        return {"driver": "gcs", "bucket": self._name, "path": f"{folder}/" if folder else ""}

    def context(self) -> Mapping[str, Any]:
        """None but the defaults: TensorStore finds the same credentials."""
        return {}

    def redact(self, text: str) -> str:
        """Returns a message without the token that requests carry."""
        token = getattr(self._client._credentials, "token", None)
        return credentials.redact(text, (token,) if token else ())

    @contextlib.contextmanager
    def _clear(self, key: str, *, of_bucket: bool = False) -> Generator[None]:
        """Converts an error; `of_bucket` if only the bucket can be missing."""
        from google.api_core import exceptions as api
        from google.auth import exceptions as auth
        from google.cloud.storage import exceptions as storage
        from requests import exceptions as http
        from urllib3 import exceptions as connections

        try:
            yield
        except api.NotFound as error:
            if of_bucket or _MISSING_BUCKET in str(error):
                raise self._refused("there is no such bucket", error, errno.ENOENT) from None
            raise NotFound(key) from None
        except api.PreconditionFailed:
            raise PreconditionFailed(key) from None
        except (api.Unauthorized, api.Forbidden, auth.RefreshError) as error:
            if getattr(error, "retryable", False):  # the server of tokens was busy
                raise self._transient(error) from None
            raise self._refused("permission denied", error, errno.EACCES) from None
        except (http.InvalidURL, http.InvalidSchema, auth.InvalidOperation) as error:
            text = "the endpoint or the credentials cannot be used"
            raise self._refused(text, error, errno.EACCES) from None
        except (api.ServerError, api.TooManyRequests, api.RetryError) as error:
            raise self._transient(error) from None
        except api.ClientError as error:
            if error.code in (408, 409, 410):  # too slow; another at the same time; a session ended
                raise self._transient(error) from None
            raise self._refused("the request is refused", error, errno.EINVAL) from None
        except (
            api.GoogleAPIError,
            auth.GoogleAuthError,
            storage.DataCorruption,
            storage.InvalidResponse,
            http.RequestException,
            connections.HTTPError,
            ConnectionError,
        ) as error:
            raise self._transient(error) from None

    def _refused(self, meaning: str, error: Exception, code: int) -> PermanentError:
        return PermanentError(f"{meaning} ({self._short(error)})", code)

    def _transient(self, error: Exception) -> TransientError:
        return TransientError(f"{self.uri}: {self._short(error)}")

    def _short(self, error: Exception) -> str:
        return self.redact(" ".join(str(error).split()))[:300]


def _entry(blob: Any) -> Entry:
    generation = None if blob.generation is None else str(blob.generation)
    modified_ns = int(blob.updated.timestamp() * 1e9)
    return Entry(blob.name, int(blob.size), modified_ns, generation)
