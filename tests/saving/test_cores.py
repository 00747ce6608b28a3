"""Background work leaves a core to the training loop."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import testing
from functional_ckpt.core.files import file_plan


@pytest.mark.parametrize(
    ("num_cores", "staging", "expected"),
    [
        (1, fc.Eager(), 1),
        (2, fc.Eager(), 1),
        (3, fc.Eager(), 2),
        (64, fc.Eager(), 4),
        (None, fc.Eager(), 1),
        (1, fc.Blocking(), 4),
    ],
)
def test_so_many_files_are_written_at_a_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_cores: int | None,
    staging: Any,
    expected: int,
) -> None:
    busy: set[int] = set()
    most: list[int] = []
    seen: set[str] = set()

    class Watched(testing.FaultyStorage):
        def operation(self, kind: str, path: str) -> None:
            if kind == "write_data" and path not in seen:
                seen.add(path)
                busy.add(threading.get_ident())
                most.append(len(busy))
                deadline = time.monotonic() + 10
                while max(most) < expected and time.monotonic() < deadline:
                    time.sleep(0.001)  # until the other threads have started
                time.sleep(0.02)  # for one thread too many
                busy.discard(threading.get_ident())

    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    monkeypatch.setattr(file_plan, "BYTES_PER_FILE", 1)
    tree: dict[str, Any] = {name: torch.randn(100) for name in "abcdefgh"}
    manager = fc.CheckpointManager(tmp_path, storage=Watched(), staging=staging)
    with manager:
        manager.save(0, {"tree": tree})
    assert max(most) == expected
