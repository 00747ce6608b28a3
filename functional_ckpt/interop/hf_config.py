"""The configuration files beside the weights of a model of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.records.records import parse_object
from functional_ckpt.interop import hostile
from functional_ckpt.storage.paths import resolve

Config: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str]"


def own_config(model: Any) -> dict[str, str]:
    """Returns the configuration files that a module of transformers brings, by name."""
    texts: dict[str, str] = {}
    for attribute, file in (("config", "config.json"), ("generation_config",) * 2):
        own = getattr(model, attribute, None)
        if not isinstance(model, torch.nn.Module) or not hasattr(own, "to_json_string"):
            continue
        record = json.loads(cast("Any", own).to_json_string())
        if file == "config.json":
            record["architectures"] = record.get("architectures") or [type(model).__name__]
        name = file if file.endswith(".json") else f"{file}.json"
        texts[name] = json.dumps(record, indent=2, sort_keys=True) + "\n"
    return texts


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
    return parse_object(hostile.read_small(path), path)
