"""A sample of `scripts/syscalls`: one system call fails, here and on other file systems."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import disks
import pytest
import syscalls

# Of the calls of each action, which fail in turn; `scripts/syscalls` takes all.
_EVERY = {"save": 40, "overwrite": 50, "delete": 25, "record": 25, "upload": 90, "open": 40}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(syscalls.is_possible() is not None, reason=syscalls.is_possible() or ""),
]


def trials_of(folder: Path, action: str, every: int) -> str:
    """Lets calls of an action fail with EIO; returns the script's output, without findings."""
    # In a process of its own: it forks, which a process that has saved must not.
    command = [sys.executable, "-W", "ignore", syscalls.__file__, "--actions", action]
    command += ["--errors", "EIO", "--every", str(every), "--folder", str(folder)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("action", _EVERY)
def test_a_system_call_that_fails_loses_nothing(
    action: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    figure(trials_of(tmp_path, action, _EVERY[action]))


@pytest.mark.parametrize("kind", ["tmpfs", "xfs", "btrfs", "overlay", "fuse"])
def test_nor_does_it_on_another_file_system(
    tmp_path: Path, kind: str, figure: Callable[[str], None]
) -> None:
    with disks.large(kind, tmp_path) as folder:
        figure(trials_of(folder, "overwrite", 90))
