"""Servers for the tests of object stores, and the environment in which users would reach them."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Generator
from pathlib import Path

import pytest
import servers

# The contract is every backend's; processes for ranks are those of tests/distributed, and small
# disks those of tests/faults.
for folder in ("storage", "distributed", "faults"):
    sys.path.append(str(Path(__file__).parents[1] / folder))


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


def set_environment(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What a user sets to reach the server at `url`."""
    for name, value in servers.environment(url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)


def set_gcs_environment(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What a user sets to reach a GCS server that is not Google's."""
    # TensorStore's variables are set by us in turn: so they are put back after the test.
    for name in ("TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING", "GCS_KEY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
