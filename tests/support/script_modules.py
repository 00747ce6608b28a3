"""Scripts and examples as modules: they are on no import path."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path


def load(path: Path, name: str | None = None) -> types.ModuleType:
    """Imports a file as the module `name`, by default its stem."""
    name = name or path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while they are made
    spec.loader.exec_module(module)
    return module
