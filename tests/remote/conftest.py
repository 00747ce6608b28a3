"""Servers for the tests of object stores, and the environment in which users would reach them."""

from __future__ import annotations

import uuid
from collections.abc import Generator
from pathlib import Path

import pytest
import servers
from remote_environment import set_environment, set_gcs_environment


@pytest.fixture(scope="session")
def s3_url() -> Generator[str]:
    """The URL of an S3 server."""
    with servers.s3_server() as url:
        yield url


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket of an S3 server that the environment leads to; its URI."""
    set_environment(monkeypatch, s3_url)
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    servers.make_bucket(s3_url, name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def gcs_url() -> Generator[str]:
    """The URL of a GCS server."""
    with servers.gcs_server() as url:
        yield url


@pytest.fixture
def gcs(gcs_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket of a GCS server that the environment leads to; its URI."""
    set_gcs_environment(monkeypatch, gcs_url)
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    servers.make_gcs_bucket(gcs_url, name)
    return f"gs://{name}"


@pytest.fixture(params=["s3", "gcs"])
def bucket(request: pytest.FixtureRequest) -> str:
    """A new bucket of each server in turn; its URI."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def libcloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A container of Libcloud's local provider; its URI."""
    (tmp_path / "top" / "bucket").mkdir(parents=True)
    monkeypatch.setenv("LIBCLOUD_KEY", str(tmp_path / "top"))
    return "libcloud://local:bucket"
