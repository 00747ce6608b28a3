"""Configuration files of models of transformers, as items and exports hold them. Pure."""

from __future__ import annotations

import json

CONFIGS = ("config.json", "generation_config.json")
RUNTIME = "runtime."
"""Before the names of configuration files where the tensors are not those of the hub."""


def with_dtype(text: str, dtype: str) -> str:
    """Returns a configuration file with another dtype, where it has one."""
    record = json.loads(text)
    changed = {key: dtype for key in ("dtype", "torch_dtype") if key in record}
    return json.dumps(record | changed, indent=2, sort_keys=True) + "\n" if changed else text
