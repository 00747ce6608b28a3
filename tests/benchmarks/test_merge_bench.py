"""The benchmark of merges compares the mean with NumPy's, and bounds the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from full import IS_FULL

from benchmarks import merge


@pytest.mark.parametrize(("steps", "mib"), [(8, 1024)] if IS_FULL else [(2, 16)])
def test_a_merge_takes_little_memory(steps: int, mib: int, tmp_path: Path) -> None:
    figures = merge.measure(str(tmp_path), steps, mib)
    assert figures["peak_mib"] <= 256
    assert figures["merge_seconds"] > 0 < figures["raw_seconds"]
