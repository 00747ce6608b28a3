"""A sample of `scripts/syscalls`: one system call fails, here and on other file systems."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
import syscalls

# Of the calls of each action, which fail in turn; `scripts/syscalls` takes all.
_EVERY = {"save": 40, "overwrite": 50, "delete": 25, "record": 25, "upload": 90, "open": 40}


@pytest.fixture(autouse=True)
def _possible() -> Iterator[None]:
    if (reason := syscalls.is_possible()) is not None:
        pytest.skip(reason)
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


def failures(folder: Path, every: dict[str, int]) -> list[tuple[str, list[str]]]:
    bench = syscalls.Bench(folder)
    return [
        (what, wrong)
        for action, step in every.items()
        for what, wrong in syscalls.trials(bench, [action], ["EIO"], step)
        if wrong and wrong != ["not reached"]
    ]


@pytest.mark.slow
def test_a_system_call_that_fails_loses_nothing(tmp_path: Path) -> None:
    assert failures(tmp_path, _EVERY) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tmpfs", "xfs", "btrfs", "overlay", "fuse"])
def test_nor_does_it_on_another_file_system(tmp_path: Path, kind: str) -> None:
    with disks.large(kind, tmp_path) as folder:
        assert failures(folder, {"overwrite": 90, "delete": 40}) == []
