"""Requests to S3 that obstore has no calls for, signed with an access key.

Copies within the store: on the condition that the source has a version, and by parts. The signature
is AWS's version 4, https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import hashlib
import hmac
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.storage.buckets.base import (
    Entry,
    NotFound,
    PermanentError,
    PreconditionFailed,
    TransientError,
)
from functional_ckpt.storage.buckets.credentials import S3Credentials

MAX_COPY_BYTES = 5 * 2**30
"""The size of an object that one request may copy."""
PART_BYTES = 512 * 2**20
"""The size of a part of a larger copy; 10,000 of them are as large as an object may be."""
_NUM_PARTS = 8  # at the same time
_TIMEOUT_SECONDS = 300.0  # a copy is answered when it is done
_EMPTY = hashlib.sha256(b"").hexdigest()
_TRANSIENT_CODES = frozenset(
    {"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "OperationAborted"}
    | {"ConditionalRequestConflict"}
)


class Answer(NamedTuple):
    """The answer to a request: its headers, by names in lower case, and its body."""

    headers: Mapping[str, str]
    body: bytes

    def field(self, name: str) -> str | None:
        """Returns the text of an element of the body."""
        with contextlib.suppress(ElementTree.ParseError):
            for element in ElementTree.fromstring(self.body).iter():
                if element.tag.rpartition("}")[2] == name:
                    return element.text or ""
        return None


class S3Requests:
    """Sends requests about the objects of one bucket.

    Args:
        name: The bucket.
        found: Its endpoint, its region and the access key, which must be known.
    """

    def __init__(self, name: str, found: S3Credentials) -> None:
        self._region = found.region or "us-east-1"
        self._endpoint = (found.endpoint or f"https://s3.{self._region}.amazonaws.com").rstrip("/")
        self._name = name
        self._found = found

    @property
    def is_conditional(self) -> bool:
        """Whether the service compares conditions on writes."""
        return self._found.conditional

    def copy(
        self, source: Entry, target: str, check: Callable[[], None], *, is_exact: bool
    ) -> bool:
        """Copies an object to a key; see `Bucket.copy`."""
        if source.size_bytes > MAX_COPY_BYTES:
            self._copy_in_parts(source, target, check, is_exact=is_exact)
            return True
        headers = self._source(source, is_exact=is_exact)
        if is_exact and self._found.conditional:
            headers["if-none-match"] = "*"
        answer = self.send("PUT", target, headers=headers)
        return self._may_be_equal(source, target, answer)

    def _source(self, source: Entry, *, is_exact: bool) -> dict[str, str]:
        return source_headers(f"{self._name}/{source.key}", source.version if is_exact else None)

    def _may_be_equal(self, source: Entry, target: str, answer: Answer) -> bool:
        """Compares the MD5 of both objects, where the ETags of both are one."""
        found, expected = answer.field("ETag"), source.version
        if found is None:
            raise TransientError(f"{target}: no result of the copy ({_code(answer.body)})")
        if "aws:kms" in answer.headers.get("x-amz-server-side-encryption", ""):
            return True
        if expected is None or not (_is_md5(expected) and _is_md5(found)):
            return True
        return found.strip('"') == expected.strip('"')

    def _copy_in_parts(
        self, source: Entry, target: str, check: Callable[[], None], *, is_exact: bool
    ) -> None:
        headers = self._source(source, is_exact=is_exact)
        upload = self.start(target)
        try:
            starts = range(0, source.size_bytes, PART_BYTES)
            etags: list[str] = [""] * len(starts)

            def copy_part(number: int, start: int) -> None:
                check()
                end = min(start + PART_BYTES, source.size_bytes)
                etags[number] = self.copy_part(target, upload, number, headers, start, end)

            run_in_threads(
                [functools.partial(copy_part, *each) for each in enumerate(starts)], _NUM_PARTS
            )
            check()
            self.complete(target, upload, etags, is_new=is_exact and self._found.conditional)
        except BaseException:
            with contextlib.suppress(NotFound, PermanentError, TransientError):
                self.abort(target, upload)
            raise

    # ------------------------------------------------------------------------- uploads in parts

    def start(self, key: str) -> str:
        """Starts an upload in parts; returns its id."""
        answer = self.send("POST", key, query={"uploads": ""})
        upload = answer.field("UploadId")
        if not upload:
            raise TransientError(f"{key}: an upload without an id")
        return upload

    def send_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        """Sends a part; returns its ETag."""
        query = {"partNumber": str(number + 1), "uploadId": upload}
        etag = self.send("PUT", key, query=query, body=data).headers.get("etag")
        if not etag:
            raise TransientError(f"{key}: part {number + 1} was not sent")
        return etag

    def copy_part(
        self,
        key: str,
        upload: str,
        number: int,
        source: Mapping[str, str],
        start: int,
        end: int,
    ) -> str:
        """Makes bytes `start` to `end` of an object a part; returns the part's ETag."""
        headers = {**source, "x-amz-copy-source-range": f"bytes={start}-{end - 1}"}
        query = {"partNumber": str(number + 1), "uploadId": upload}
        etag = self.send("PUT", key, query=query, headers=headers).field("ETag")
        if not etag:
            raise TransientError(f"{key}: part {number + 1} was not copied")
        return etag

    def complete(self, key: str, upload: str, etags: Sequence[str], *, is_new: bool) -> None:
        """Makes the parts an object.

        Raises:
            PreconditionFailed: With `is_new`, there is an object.
        """
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>"
            for number, etag in enumerate(etags, 1)
        )
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        headers = {"if-none-match": "*"} if is_new else {}
        answer = self.send("POST", key, query={"uploadId": upload}, headers=headers, body=body)
        if answer.field("ETag") is None:
            raise TransientError(f"{key}: not completed ({_code(answer.body)})")

    def abort(self, key: str, upload: str) -> None:
        """Has the store forget the parts of an upload."""
        self.send("DELETE", key, query={"uploadId": upload})

    # -------------------------------------------------------------------------------- requests

    def send(
        self,
        method: str,
        key: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Answer:
        """Sends a request about an object.

        Raises:
            NotFound: There is no such object.
            PreconditionFailed: A condition does not hold.
            PermanentError: The store refuses.
            TransientError: The store does not answer, or is busy.
        """
        path = _quoted(f"/{self._name}/{key}")
        text = "&".join(
            f"{_quoted(name, '')}={_quoted(value, '')}"
            for name, value in sorted((query or {}).items())
        )
        url = urllib.parse.urlsplit(self._endpoint)
        now = datetime.datetime.now(datetime.UTC)
        every = {"content-type": "application/octet-stream", **(headers or {})}
        signed = signed_headers(
            self._found, self._region, method, url.netloc, url.path + path, text, every, body, now
        )
        request = urllib.request.Request(
            f"{self._endpoint}{path}{'?' if text else ''}{text}",
            data=body if method != "DELETE" else None,
            method=method,
            headers=signed,
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as opened:
                answer = Answer({k.lower(): v for k, v in opened.headers.items()}, opened.read())
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(key, error.code, error.read()) from None
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(f"{key}: {error}") from None
        if (code := _code(answer.body)) is not None:  # an error may be found after the first byte
            raise _refusal(key, 500 if code in _TRANSIENT_CODES else 400, answer.body)
        return answer


def source_headers(source: str, version: str | None) -> dict[str, str]:
    """Returns the headers of a copy: of which object, `bucket/key`, and of which version of it."""
    headers = {"x-amz-copy-source": _quoted(f"/{source}")}
    return headers if version is None else {**headers, "x-amz-copy-source-if-match": version}


def signed_headers(
    found: S3Credentials,
    region: str,
    method: str,
    host: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    body: bytes,
    now: datetime.datetime,
) -> dict[str, str]:
    """Returns the headers of a request, its signature among them.

    Args:
        found: The access key.
        region: The region of the store.
        method: `GET` and the like.
        host: The host, with its port if the URL has one.
        path: The quoted path.
        query: The quoted query, sorted by name.
        headers: The headers of the request, by names in lower case; all are signed.
        body: The content of the request.
        now: The time, which must be that of the store.
    """
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    digest = hashlib.sha256(body).hexdigest() if body else _EMPTY
    every = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": stamp, **headers}
    if found.token:
        every["x-amz-security-token"] = found.token
    names = sorted(every)
    listed = ";".join(names)
    lines = [method, path, query, *(f"{name}:{every[name].strip()}" for name in names)]
    request = "\n".join([*lines, "", listed, digest])
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    text = "\n".join(
        ["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()]
    )
    key = f"AWS4{found.secret}".encode()
    for part in (*scope.split("/"), text):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    every["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={found.key_id}/{scope},SignedHeaders={listed},"
        f"Signature={key.hex()}"
    )
    return every


def _refusal(key: str, status: int, body: bytes) -> Exception:
    """Returns the exception for an answer that is an error."""
    code = _code(body) or f"status {status}"
    if status == http.client.NOT_FOUND and code != "NoSuchBucket":
        return NotFound(key)
    if status == http.client.PRECONDITION_FAILED:
        return PreconditionFailed(key)
    is_busy = status >= 500 or status in (408, 409, 429) or code in _TRANSIENT_CODES
    if is_busy and status != http.client.NOT_IMPLEMENTED:
        return TransientError(f"{key}: {code}")
    return PermanentError(f"the request is refused ({code})", errno.EACCES)


def _code(body: bytes) -> str | None:
    """Returns the code of an error that is an answer's body."""
    found = re.search(rb"<Error>.*?<Code>([^<]*)</Code>", body, re.DOTALL)
    return None if found is None else found[1].decode(errors="replace")


def _is_md5(etag: str) -> bool:
    return re.fullmatch('"?[0-9a-f]{32}"?', etag) is not None


def _quoted(text: str, safe: str = "/") -> str:
    return urllib.parse.quote(text, safe=f"{safe}-_.~")
