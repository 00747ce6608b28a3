"""Folders of PEFT: `adapter_model.safetensors` or `adapter_model.bin`."""

from __future__ import annotations

import functools
import os
from typing import Any

from functional_ckpt import errors
from functional_ckpt.interop import safetensors, torch_save, training_state
from functional_ckpt.interop.source import Format, Source

_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def _files(path: str) -> list[str]:
    return [file for name in _FILES if os.path.isfile(file := os.path.join(path, name))]


def _open(path: str) -> Source:
    file, *others = _files(path)
    if others:
        raise errors.UsageError(f"{path}: an adapter in two formats; open one file.", path=path)
    openers, left_out = training_state.openers_of(path, _FILES.__contains__)
    return Source(path, "peft", {"model": functools.partial(_read, file), **openers}, left_out)


def _read(file: str) -> dict[str, Any]:
    if file.endswith(".safetensors"):
        return safetensors.load_all(file)
    return dict(torch_save.load(file))


FORMAT = Format(
    name="peft", description="a folder of PEFT", matches=lambda path: bool(_files(path)), open=_open
)
