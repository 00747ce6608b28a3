"""Buckets behind obstore, which only this module imports: S3, and all that speaks as it does."""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib
import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from functional_ckpt import errors
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
from functional_ckpt.storage.buckets.s3_requests import MAX_COPY_BYTES, S3Requests

_PART_BYTES = 8 * 2**20
# A request that got no answer is made again: by `base.retrying`, which also sees to uploads.
_RETRIES = {"max_retries": 1, "retry_timeout": datetime.timedelta(seconds=30)}
_CLIENT = {"connect_timeout": "5s", "timeout": "120s", "read_timeout": "20s"}
# Permanent errors and the store's texts for them; the first match counts.
_FINAL = {
    "there is no such bucket": "NoSuchBucket|ContainerNotFound",
    "the session token has expired or is not valid": (
        "ExpiredToken|TokenRefreshRequired|InvalidToken"
    ),
    "the access key or its secret is wrong": (
        "InvalidAccessKeyId|SignatureDoesNotMatch|InvalidSecurity"
    ),
    "the bucket is in another region: set AWS_REGION to it": (
        "AuthorizationHeaderMalformed|PermanentRedirect|IllegalLocationConstraint|"
        "301 Moved|307 Temporary|redirect"
    ),
    "this machine's clock is wrong": "RequestTimeTooSkewed",
    "the endpoint or the credentials cannot be used": (
        "invalid URL|builder error|MissingCredentials"
    ),
    "permission denied": "AccessDenied|AllAccessDisabled|403 Forbidden|401 Unauthorized",
    # All of status 400 except errors of a bad network.
    "the request is refused": (
        "400 Bad Request(?!(?s:.*)(RequestTimeout|IncompleteBody|BadDigest|ContentSHA256Mismatch|"
        "InvalidPart))"
    ),
}


def open_s3(uri: str, name: str, found: credentials.S3Credentials) -> ObstoreBucket:
    """Returns the bucket `name` of a store that speaks S3; its keys are below `uri`."""
    obstore = import_obstore()
    options: dict[str, Any] = {
        "endpoint": found.endpoint,
        "region": found.region,
        "access_key_id": found.key_id,
        "secret_access_key": found.secret,
        "session_token": found.token,
        "conditional_put": "etag" if found.conditional else "disabled",
    }
    store = obstore.store.S3Store(
        name,
        **{key: value for key, value in options.items() if value is not None},
        **client_options(found.endpoint),
    )
    spec = {
        "driver": "s3",
        "bucket": name,
        **({} if found.region is None else {"aws_region": found.region}),
        **({} if found.endpoint is None else {"endpoint": found.endpoint}),
    }
    context = {"aws_credentials": _tensorstore_credentials(found)}
    return ObstoreBucket(
        uri,
        store,
        spec,
        context,
        secrets=found.secrets,
        conditional=found.conditional,
        requests=None if found.key_id is None else S3Requests(name, found),
    )


def import_obstore() -> Any:
    """Returns the library; raises `UsageError` if it is not installed."""
    try:
        importlib.import_module("obstore.store")
        return importlib.import_module("obstore")
    except ImportError as error:
        raise errors.UsageError(
            "Object stores need obstore: pip install 'functional-ckpt[remote]'."
        ) from error


def client_options(endpoint: str | None) -> dict[str, Any]:
    """Returns the options of a store's requests."""
    allow_http = bool(endpoint and endpoint.startswith("http://"))
    return {"client_options": {**_CLIENT, "allow_http": allow_http}, "retry_config": _RETRIES}


def _tensorstore_credentials(found: credentials.S3Credentials) -> dict[str, Any]:
    """Returns the source of the same key for TensorStore, whose specs cannot contain keys.

    A key that is not in AWS's variables is passed in an unnamed file in memory.
    """
    if found.key_id is None:
        return {"type": "default"}
    if (found.key_id, found.secret, found.token) == tuple(
        os.environ.get(name) or None
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    ):
        return {"type": "environment"}
    lines = ["[default]", f"aws_access_key_id = {found.key_id}"]
    lines.append(f"aws_secret_access_key = {found.secret}")
    if found.token:
        lines.append(f"aws_session_token = {found.token}")
    path = _memory_file("\n".join([*lines, ""]).encode())
    return {"type": "profile", "profile": "default", "config_file": path, "credentials_file": path}


_memory_files: dict[bytes, str] = {}


def _memory_file(data: bytes) -> str:
    """Returns the path of a file in memory, for this process alone; kept as long as it lives."""
    if data not in _memory_files:
        descriptor = os.memfd_create("credentials", os.MFD_CLOEXEC)
        os.write(descriptor, data)
        _memory_files[data] = f"/proc/{os.getpid()}/fd/{descriptor}"
    return _memory_files[data]


class ObstoreBucket:
    """A bucket behind obstore; see `base.Bucket`."""

    def __init__(
        self,
        uri: str,
        store: Any,
        spec: Mapping[str, Any] | None,
        context: Mapping[str, Any],
        *,
        secrets: tuple[str, ...] = (),
        conditional: bool = True,
        requests: S3Requests | None = None,
        copies_at_once: bool = True,
    ) -> None:
        self.uri = uri
        self._obstore = import_obstore()
        self._store = store
        self._spec = spec
        self._context = dict(context)
        self._secrets = secrets
        self._conditional = conditional
        self._requests = requests
        self._copies_at_once = copies_at_once

    @property
    def part_requests(self) -> S3Requests | None:
        """Requests for objects made of parts; None without an access key."""
        return self._requests

    def read(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        """Returns bytes `begin` to `end` of an object."""
        with self._clear(key):
            if end is None:
                return bytes(self._obstore.get(self._store, key).bytes())
            if begin == end:
                return b""
            data = bytes(self._obstore.get_range(self._store, key, start=begin, end=end))
            if len(data) != end - begin:
                raise TransientError(f"{key}: {len(data)} bytes received of {end - begin}")
            return data

    def head(self, key: str) -> Entry:
        """Returns the metadata of an object."""
        with self._clear(key):
            return _entry(self._obstore.head(self._store, key))

    def list(self, folder: str) -> Iterable[Entry]:
        """Returns every object below a folder."""
        with self._clear(folder):
            found = self._obstore.list(self._store, prefix=f"{folder}/" if folder else None)
            return [_entry(each) for page in found for each in page]

    def names(self, folder: str) -> Iterable[str]:
        """Returns the names of the objects and folders in a folder."""
        with self._clear(folder):
            found = self._obstore.list_with_delimiter(self._store, f"{folder}/" if folder else None)
            paths = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
            return {path.rstrip("/").rpartition("/")[2] for path in paths}

    def write(self, key: str, data: bytes, *, replacing: str | None = None) -> Entry:
        """Writes an object at once."""
        mode: Any = "overwrite"
        if replacing is not None and self._conditional:
            mode = {"e_tag": replacing} if replacing else "create"
        elif replacing is not None:
            self._compare(key, replacing)
        try:
            with self._clear(key):
                result = self._obstore.put(self._store, key, data, mode=mode, use_multipart=False)
        except NotFound:  # the answer of some stores if the object to be replaced is gone
            raise PreconditionFailed(key) from None
        return Entry(key, len(data), 0, result.get("e_tag"))

    def _compare(self, key: str, version: str) -> None:
        """Instead of a condition, where the store knows none: two writers may both pass."""
        try:
            is_same = self.head(key).version == version
        except NotFound:
            is_same = version == ""
        if not is_same:
            raise PreconditionFailed(key)

    def copy(
        self,
        source: Entry,
        target: str,
        check: Callable[[], None] = no_check,
        *,
        is_exact: bool = False,
    ) -> bool:
        """Copies an object within the store; without an access key on no condition."""
        if self._requests is not None and (is_exact or source.size_bytes > MAX_COPY_BYTES):
            return self._requests.copy(source, target, check, is_exact=is_exact)
        if is_exact and not self._copies_at_once:
            raise PermanentError("a copy may be answered before it is complete", errno.ENOTSUP)
        with self._clear(source.key):
            self._obstore.copy(self._store, source.key, target)
        return True

    def delete(self, keys: Iterable[str], *, versions: Mapping[str, str] | None = None) -> None:
        """Deletes objects; on no condition."""
        with self._clear(""), contextlib.suppress(NotFound):
            self._obstore.delete(self._store, list(keys))

    def upload(
        self, path: str, key: str, check: Callable[[], None] = no_check, *, replacing: str = ""
    ) -> None:
        """Writes a file into an object: the signature of each part covers a digest of its bytes.

        An upload in parts has no condition here.
        """
        size_bytes = os.path.getsize(path)
        with self._clear(key), CheckedFile(path, check) as file:
            try:
                self._obstore.put(self._store, key, file, chunk_size=_PART_BYTES, max_concurrency=4)
            except OSError:
                check()  # its error, which has lost its class
                raise
        stored = self.head(key).size_bytes
        if stored != size_bytes:
            raise TransientError(f"{key}: {stored} bytes uploaded of {size_bytes}")

    def download(self, key: str, path: str) -> None:
        """Writes an object into a new file."""
        size_bytes = self.head(key).size_bytes
        with open(path, "wb") as file:
            for begin in range(0, size_bytes, _PART_BYTES):
                file.write(self.read(key, begin, min(begin + _PART_BYTES, size_bytes)))

    def kvstore(self, folder: str) -> Mapping[str, Any] | None:
        """TensorStore's spec of a folder; None where it has no driver."""
        if self._spec is None:
            return None
        return {**self._spec, "path": f"{folder}/" if folder else ""}

    def context(self) -> Mapping[str, Any]:
        """TensorStore's resources."""
        return self._context

    def redact(self, text: str) -> str:
        """Returns a message without the access key."""
        return credentials.redact(text, self._secrets)

    @contextlib.contextmanager
    def _clear(self, key: str) -> Generator[None]:
        known = self._obstore.exceptions
        try:
            yield
        except (known.NotFoundError, FileNotFoundError) as error:
            if re.search("NoSuchBucket|ContainerNotFound", str(error)):
                raise self._refusal(error, errno.ENOENT) from None
            raise NotFound(key) from None
        except (known.AlreadyExistsError, known.PreconditionError, FileExistsError):
            raise PreconditionFailed(key) from None
        except (known.PermissionDeniedError, known.UnauthenticatedError) as error:
            raise self._refusal(error, errno.EACCES) from None
        except known.BaseError as error:
            if _meaning(error) is not None:
                raise self._refusal(error, errno.EACCES) from None
            raise TransientError(f"{self.uri}: {self._first_line(error)}") from None

    def _refusal(self, error: Exception, code: int) -> PermanentError:
        meaning = _meaning(error) or "permission denied"
        return PermanentError(f"{meaning} ({self._first_line(error)})", code)

    def _first_line(self, error: Exception) -> str:
        """Returns the store's answer, shortened and without quotations of the request."""
        text = re.sub(r"<[^>]*>|\s+", " ", str(error).split("Debug source")[0])
        return self.redact(text).strip()[:300]


def _meaning(error: Exception) -> str | None:
    """Returns the meaning of a permanent error; None for a transient one."""
    text = str(error)
    return next((meaning for meaning, codes in _FINAL.items() if re.search(codes, text)), None)


def _entry(found: Mapping[str, Any]) -> Entry:
    modified: datetime.datetime = found["last_modified"]
    nanoseconds = int(modified.timestamp() * 1e9)
    return Entry(str(found["path"]), int(found["size"]), nanoseconds, found.get("e_tag"))
