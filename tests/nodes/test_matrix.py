"""Failures in every phase of a save on several nodes, with real processes; see `matrix`."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import matrix
import pytest
from full import IS_FULL
from gloo_workers import Workers

_DEFAULT = [
    matrix.Case("aabb", "rank killed", "voted", copies=0),
    matrix.Case("aabb", "node killed", "renaming", copies=0),
]


@pytest.fixture(scope="module")
def workers() -> Generator[Workers]:
    made = Workers(matrix.PRELOAD)
    yield made
    made.close()


@pytest.mark.parametrize("case", list(matrix.cases()) if IS_FULL else _DEFAULT, ids=str)
def test_no_step_is_lost_or_mixed(tmp_path: Path, workers: Workers, case: matrix.Case) -> None:
    violations = matrix.check(case, tmp_path, workers, () if IS_FULL else ("same", "more"))
    assert not violations, "\n".join(violations)
