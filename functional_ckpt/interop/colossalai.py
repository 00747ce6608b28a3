"""Sharded checkpoints of ColossalAI's Booster, together or in the folders its examples use.

[modeling/ | model/]  what transformers reads
[optimizer/]          pytorch_optim.bin.index.json, pytorch_optim-00001.bin ...,
pytorch_optim_group.bin
[lr_scheduler]        a file of torch.save
"""

from __future__ import annotations

import functools
import os
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.core.tree import plain_json
from functional_ckpt.interop import hostile, huggingface, torch_save
from functional_ckpt.interop.source import Format, Source

__all__ = ["FORMAT"]

_INDEX = "pytorch_optim.bin.index.json"
_MODELS = ("", "model", "modeling")
_OPTIMIZERS = ("", "optimizer")
_SCHEDULERS = ("lr_scheduler", "scheduler")


def fits(path: str) -> bool:
    """Whether there is a sharded optimizer, here or in the folder of that name."""
    return _folder_of(path) is not None


def _folder_of(path: str) -> str | None:
    for name in _OPTIMIZERS:
        if os.path.isfile(os.path.join(path, name, _INDEX)):
            return os.path.join(path, name)
    return None


def _open(path: str) -> Source:
    openers: dict[str, Any] = {}
    for name in _MODELS:
        if huggingface.fits(folder := os.path.join(path, name)):
            openers["model"] = functools.partial(huggingface.load, folder)
    if (folder := _folder_of(path)) is not None:
        _read_index(folder)  # a missing shard is found before anything is read
        openers["optimizer"] = functools.partial(_read_optimizer, folder)
    for name in _SCHEDULERS:
        if torch_save.fits(file := os.path.join(path, name)):
            openers["lr_scheduler"] = functools.partial(torch_save.load, file)
    return Source(path, "colossalai", openers)


def _read_index(folder: str) -> tuple[list[str], str]:
    """The shards, and the file of the groups."""
    path = os.path.join(folder, _INDEX)
    try:
        record = plain_json.parse(hostile.read_small(path))
        files = list(dict.fromkeys(record["weight_map"].values()))
        groups = record["metadata"]["param_groups"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise errors.CorruptCheckpointError(
            f"{path}: not the index of an optimizer ({type(error).__name__}: {error}).", path=path
        ) from error
    huggingface.check_files(folder, _INDEX, [*files, groups])
    return files, groups


def _read_optimizer(folder: str) -> dict[str, Any]:
    files, groups = _read_index(folder)
    state: dict[Any, Any] = {}
    for name in files:
        shard = torch_save.load(os.path.join(folder, name))
        if not isinstance(shard, dict) or not all(type(key) is int for key in shard):
            raise errors.CorruptCheckpointError(
                f"{os.path.join(folder, name)}: not the states of numbered parameters.", path=folder
            )
        state |= cast("dict[int, Any]", shard)
    return {
        "state": dict(sorted(state.items())),
        "param_groups": torch_save.load(os.path.join(folder, groups)),
    }


FORMAT = Format(
    name="colossalai",
    description="a sharded checkpoint of ColossalAI",
    matches=fits,
    open=_open,
    supersedes=("huggingface",),
)
