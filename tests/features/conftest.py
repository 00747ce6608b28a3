"""One set of worker processes for the rows that need several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gloo_workers import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    started = Workers()
    yield started
    started.close()
