"""Sharded checkpoints of ColossalAI's Booster, in one folder or in the folders of its examples.

Files, each folder being optional:
    [modeling/ | model/]  weights in Hugging Face's layout
    [optimizer/]          pytorch_optim.bin.index.json, pytorch_optim-00001.bin ...,
                          pytorch_optim_group.bin; or, from asynchronous saves,
                          optimizer.safetensors.index.json, optimizer-00001.safetensors ...
    [lr_scheduler]        a file of torch.save
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.core.tree import plain_json
from functional_ckpt.interop import hostile, huggingface, pickles, safetensors, torch_save
from functional_ckpt.interop.source import Format, Source

_INDEXES = ("pytorch_optim.bin.index.json", "optimizer.safetensors.index.json")
_MODELS = ("", "model", "modeling")
_OPTIMIZERS = ("", "optimizer")
_SCHEDULERS = ("lr_scheduler", "scheduler")


def _indexes(folder: str) -> list[str]:
    return [name for name in _INDEXES if os.path.isfile(os.path.join(folder, name))]


def _open(path: str) -> Source:
    openers: dict[str, Any] = {}
    if (folder := _only(path, _MODELS, huggingface.fits)) is not None:
        openers["model"] = functools.partial(huggingface.load, folder)
    if (folder := _only(path, _OPTIMIZERS, lambda each: bool(_indexes(each)))) is not None:
        _read_index(folder)  # a missing shard is found before anything is read
        openers["optimizer"] = functools.partial(_read_optimizer, folder)
    if (file := _only(path, _SCHEDULERS, torch_save.fits)) is not None:
        openers["lr_scheduler"] = functools.partial(torch_save.load, file)
    return Source(path, "colossalai", openers)


def _only(path: str, names: Sequence[str], matches: Callable[[str], bool]) -> str | None:
    """Returns the path of the one name that matches; None if none does."""
    found = [each for name in names if matches(each := os.path.join(path, name))]
    if len(found) > 1:
        raise errors.UsageError(
            f"{path}: {' and '.join(found)} hold the same item; move one away.", path=path
        )
    return found[0] if found else None


def _read_index(folder: str) -> tuple[list[str], str]:
    """Returns the shards, and the file of the groups."""
    index, *others = _indexes(folder)
    path = os.path.join(folder, index)
    if others:
        raise errors.UsageError(
            f"{folder}: optimizers under two indexes: {index}, {', '.join(others)}; move one away.",
            path=folder,
        )
    try:
        record = plain_json.parse(hostile.read_small(path))
        files = list(dict.fromkeys(record["weight_map"].values()))
        groups = record["metadata"]["param_groups"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise errors.CorruptCheckpointError(
            f"{path}: not the index of an optimizer ({type(error).__name__}: {error}).", path=path
        ) from error
    huggingface.check_files(folder, index, [*files, groups])
    return files, groups


def _read_optimizer(folder: str) -> dict[str, Any]:
    files, groups = _read_index(folder)
    state: dict[Any, Any] = {}
    for name in files:
        file = os.path.join(folder, name)
        if name.endswith(".safetensors"):
            _merge_flat(state, file)
            continue
        shard = torch_save.load(file)
        if not isinstance(shard, dict) or not all(type(key) is int for key in shard):
            raise errors.CorruptCheckpointError(
                f"{file}: not the states of numbered parameters.", path=folder
            )
        state |= cast("dict[int, Any]", shard)
    return {
        "state": dict(sorted(state.items())),
        "param_groups": torch_save.load(os.path.join(folder, groups)),
    }


def _merge_flat(state: dict[Any, Any], file: str) -> None:
    """Adds the states of a file of safetensors: `state-0-exp_avg`, or with dots for hyphens.

    Non-tensors there are bytes of a pickle, of which only plain values are read.
    """
    tensors, metadata = safetensors.load(file)
    try:
        pickled = set(plain_json.parse(metadata.get("non_tensor_keys", "[]").encode()))
    except (ValueError, TypeError, RecursionError) as error:
        raise errors.CorruptCheckpointError(
            f"{file}: its non_tensor_keys are not a list of names.", path=file
        ) from error
    for name, tensor in tensors.items():
        found = re.fullmatch(r"state([-.])(\d+)\1(.+)", name, re.ASCII)
        if found is None:
            raise errors.CorruptCheckpointError(
                f"{file}: {name!r} is not the state of a numbered parameter.", path=file
            )
        value = _plain(tensor, name, file) if name in pickled else tensor
        state.setdefault(int(found[2]), {})[found[3]] = value


def _plain(tensor: Any, name: str, file: str) -> Any:
    value = pickles.read_inert(tensor.numpy().tobytes(), file)
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise errors.UsageError(
            f"{file}: {name!r} is a pickled {type(value).__name__}, which is never loaded.",
            path=file,
        )
    return value


FORMAT = Format(
    name="colossalai",
    description="a sharded checkpoint of ColossalAI",
    matches=lambda path: any(_indexes(os.path.join(path, name)) for name in _OPTIMIZERS),
    open=_open,
    supersedes=("huggingface",),
)
