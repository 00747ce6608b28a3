"""The configuration files beside the weights of a model of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from functional_ckpt import errors
from functional_ckpt.core.records.records import parse_object
from functional_ckpt.storage import local_files
from functional_ckpt.storage.paths import resolve

Config: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str]"


def read_config(config: Config) -> dict[str, str]:
    """Returns the configuration file that the caller gives, by name."""
    if isinstance(config, Mapping):
        try:
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        except (TypeError, ValueError) as error:
            raise errors.UsageError(f"config is not JSON: {error}.") from error
        return {"config.json": text}
    path = resolve(config)
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    load_json(path)
    with open(path, encoding="utf-8") as file:
        return {"config.json": file.read()}


def load_json(path: str) -> dict[str, Any]:
    """Returns the JSON object in a file."""
    if not os.path.exists(path):
        raise errors.StepNotFoundError(f"{path}: there is no such file.", path=path)
    return parse_object(local_files.read_regular(path, follow=True), path)
