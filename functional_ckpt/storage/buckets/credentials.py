"""Endpoints and credentials from the environment; they are never stored.

Variables by scheme:
    s3://   S3_ENDPOINT_URL or AWS_ENDPOINT_URL[_S3], AWS_REGION, AWS_ACCESS_KEY_ID and others, or
            AWS_PROFILE and the shared credentials file; otherwise the machine's role
    gs://   GCS_KEY and GCS_SECRET (an HMAC key); otherwise application default credentials
    oci://  bucket@namespace; the region of OCI's config file; OCI_ACCESS_KEY_ID and
            OCI_SECRET_ACCESS_KEY (a customer secret key); otherwise AWS's variables
"""

from __future__ import annotations

import configparser
import dataclasses
import os
from collections.abc import Mapping

from functional_ckpt import errors

_GCS_ENDPOINT = "https://storage.googleapis.com"
_MIN_SECRET = 8
_OCI_ENDPOINT = "https://{namespace}.compat.objectstorage.{region}.oraclecloud.com"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class S3Credentials:
    """How to reach a store that speaks S3.

    Attributes:
        endpoint: Its URL; None for AWS's own.
        region: Its region; None to ask AWS.
        key_id: The access key; None where the machine's own role is to be used.
        secret: Its secret.
        token: The session token of a temporary one.
        conditional: Whether the store supports writes on the condition of absence.
    """

    endpoint: str | None
    region: str | None
    key_id: str | None = dataclasses.field(default=None, repr=False)
    secret: str | None = dataclasses.field(default=None, repr=False)
    token: str | None = dataclasses.field(default=None, repr=False)
    conditional: bool = True

    def __post_init__(self) -> None:
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise errors.UsageError(
                f"S3_ENDPOINT_URL must start with http:// or https://; got {self.endpoint!r}."
            )
        if (self.key_id is None) != (self.secret is None):
            raise errors.UsageError(
                "An access key needs its secret, and a secret its key: set both, or neither."
            )

    @property
    def secrets(self) -> tuple[str, ...]:
        """Secrets that must not be shown."""
        return tuple(text for text in (self.key_id, self.secret, self.token) if text)


def redact(text: str, secrets: tuple[str, ...]) -> str:
    """Returns a text without secrets that it may quote.

    Very short ones, as of test servers, are parts of words: a message without them is unreadable.
    """
    for secret in secrets:
        if len(secret) >= _MIN_SECRET:
            text = text.replace(secret, "***")
    return text


def s3_credentials(environ: Mapping[str, str] = os.environ) -> S3Credentials:
    """Access to S3, or to another store at the endpoint that the environment names."""
    endpoint = _first(environ, "S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    profile = _aws_profile(environ)
    region = _first(environ, "AWS_REGION", "AWS_DEFAULT_REGION") or profile.get("region")
    key_id, secret, token = _aws_keys(environ, profile)
    return S3Credentials(
        endpoint=endpoint,
        region=region or ("us-east-1" if endpoint else None),
        key_id=key_id,
        secret=secret,
        token=token,
    )


def gcs_credentials(environ: Mapping[str, str] = os.environ) -> S3Credentials | None:
    """Access to GCS by an HMAC key; None where application default credentials are to be used."""
    if not environ.get("GCS_KEY") and not environ.get("GCS_SECRET"):
        return None
    return S3Credentials(
        endpoint=environ.get("GCS_ENDPOINT_URL") or _GCS_ENDPOINT,
        region="auto",
        key_id=environ.get("GCS_KEY") or None,
        secret=environ.get("GCS_SECRET") or None,
        conditional=False,
    )


def oci_credentials(namespace: str, environ: Mapping[str, str] = os.environ) -> S3Credentials:
    """Access to a namespace of OCI's object storage, which speaks S3."""
    path = environ.get("OCI_CONFIG_FILE") or "~/.oci/config"
    profile = _ini(path).get(environ.get("OCI_CONFIG_PROFILE") or "DEFAULT", {})
    region = environ.get("OCI_REGION") or profile.get("region")
    endpoint = environ.get("S3_ENDPOINT_URL")
    if not region or not (namespace or endpoint):
        raise errors.UsageError(
            "oci:// needs oci://bucket@namespace/path, and a region in OCI_REGION or in "
            f"{path} (OCI_CONFIG_FILE)."
        )
    key_id, secret = environ.get("OCI_ACCESS_KEY_ID"), environ.get("OCI_SECRET_ACCESS_KEY")
    token = None
    if not key_id and not secret:
        key_id, secret, token = _aws_keys(environ, _aws_profile(environ))
    if not key_id:
        raise errors.UsageError(
            "oci:// needs a customer secret key: set OCI_ACCESS_KEY_ID and OCI_SECRET_ACCESS_KEY."
        )
    return S3Credentials(
        endpoint=endpoint or _OCI_ENDPOINT.format(namespace=namespace, region=region),
        region=region,
        key_id=key_id,
        secret=secret,
        token=token,
    )


def _first(environ: Mapping[str, str], *names: str) -> str | None:
    return next((environ[name] for name in names if environ.get(name)), None)


def _aws_keys(
    environ: Mapping[str, str], profile: Mapping[str, str]
) -> tuple[str | None, str | None, str | None]:
    if environ.get("AWS_ACCESS_KEY_ID") or environ.get("AWS_SECRET_ACCESS_KEY"):
        return (
            environ.get("AWS_ACCESS_KEY_ID") or None,
            environ.get("AWS_SECRET_ACCESS_KEY") or None,
            environ.get("AWS_SESSION_TOKEN") or None,
        )
    return (
        profile.get("aws_access_key_id"),
        profile.get("aws_secret_access_key"),
        profile.get("aws_session_token"),
    )


def _aws_profile(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Returns the settings of the profile in use, from AWS's two files."""
    name = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or "default"
    config = _ini(environ.get("AWS_CONFIG_FILE") or "~/.aws/config")
    shared = _ini(environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials")
    section = name if name == "default" else f"profile {name}"
    return {**config.get(section, {}), **shared.get(name, {})}


def _ini(path: str) -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(default_section="\0")
    try:
        parser.read(os.path.expanduser(path), encoding="utf-8")
    except (configparser.Error, UnicodeError) as error:
        # The parser's message quotes the line, and so may quote a secret.
        raise errors.UsageError(f"{path} cannot be read: {type(error).__name__}.") from None
    return {name: dict(parser.items(name)) for name in parser.sections()}
