"""Python scripts in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
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


def command(script: str, *arguments: str | Path) -> list[str]:
    """The command line of `run`."""
    text = _PRELUDE + textwrap.dedent(script)
    return [sys.executable, "-W", "error::UserWarning", "-c", text, *map(str, arguments)]
