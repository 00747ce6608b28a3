"""The configuration files of a module of transformers."""

from __future__ import annotations

import json
import logging
from typing import Any, cast

import torch

_log = logging.getLogger("functional_ckpt")


def files_of(model: Any) -> dict[str, str]:
    """Returns the configuration files that a module of transformers brings, by name."""
    texts: dict[str, str] = {}
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    for attribute, file in (
        ("config", "config.json"),
        ("generation_config", "generation_config.json"),
    ):
        own = getattr(model, attribute, None)
        if not isinstance(model, torch.nn.Module) or not hasattr(own, "to_json_string"):
            continue
        try:
            record = json.loads(cast("Any", own).to_json_string())
        except Exception as error:  # noqa: BLE001 - the library's own code; the weights are saved
            _log.warning("%s of %s is not JSON: %s", attribute, type(model).__name__, error)
            continue
        if attribute == "config":
            record["architectures"] = record.get("architectures") or [type(model).__name__]
            if isinstance(dtype := getattr(model, "dtype", None), torch.dtype):
                name = "torch_dtype" if "torch_dtype" in record else "dtype"
                record[name] = str(dtype).removeprefix("torch.")
        texts[file] = json.dumps(record, indent=2, sort_keys=True) + "\n"
    return texts
