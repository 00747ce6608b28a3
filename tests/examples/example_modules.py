"""The examples as modules: they are scripts, and on no import path."""

from __future__ import annotations

import types
from pathlib import Path

from script_modules import load

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(name: str) -> types.ModuleType:
    return load(EXAMPLES / f"{name}.py")
