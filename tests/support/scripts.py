"""Python scripts in processes of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Generator
from pathlib import Path

_PRELUDE = """
import os, signal, sys, threading, time
import torch
import functional_ckpt as fc
from functional_ckpt import testing
torch.set_num_threads(1)
root = sys.argv[1]

def items(number):
    return {"tree": {"w": torch.full((1000,), float(number)), "n": number}}

class Slow(testing.FaultyStorage):
    '''Takes its time to publish, so that a commit is surely under way.'''
    publishing = threading.Event()

    def operation(self, kind, path):
        if kind == "rename" and "trash" not in path:
            self.publishing.set()
            time.sleep(1.0)
        super().operation(kind, path)
"""


def environment() -> dict[str, str]:
    """The environment in which a child has the imports of this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a script after a prelude of imports and helpers; `root` is its first argument."""
    return subprocess.run(
        command(script, *arguments),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )


@contextlib.contextmanager
def ready(script: str, *arguments: str | Path) -> Generator[subprocess.Popen[str]]:
    """Starts a script as `run` does; enters the block once it has printed `ready`."""
    with subprocess.Popen(
        command(script, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child


def command(script: str, *arguments: str | Path) -> list[str]:
    """The command line of `run`."""
    text = _PRELUDE + textwrap.dedent(script)
    return [sys.executable, "-W", "error::UserWarning", "-c", text, *map(str, arguments)]
