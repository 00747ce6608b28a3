"""The environment in which users would reach a server."""

from __future__ import annotations

import pytest
import servers

__all__ = ["set_environment", "set_gcs_environment"]


def set_environment(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The environment for the server at `url`."""
    for name, value in servers.environment(url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)


def set_gcs_environment(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The environment for a GCS server that is not Google's."""
    # TensorStore's variables are set by us in turn: so they are put back after the test.
    for name in ("TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING", "GCS_KEY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
