"""Files of safetensors, memory-mapped when read. The only importer of safetensors."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import safetensors
import torch

from functional_ckpt import errors
from functional_ckpt.core.files import safetensors_header
from functional_ckpt.interop import hostile, plain_files
from functional_ckpt.interop.source import Format, Source
from functional_ckpt.interop.weights import Weights


def fits(path: str) -> bool:
    """Returns whether the file starts as the format requires: a length, then a JSON object."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(9)
    return (
        len(start) == 9
        and start[8:] == b"{"
        and int.from_bytes(start[:8], "little") <= os.path.getsize(path) - 8
    )


def load(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns the tensors of a file, memory-mapped, and its metadata.

    Raises:
        StepNotFoundError: There is no such file.
        CorruptCheckpointError: It is broken, or no such file.
    """
    hostile.check_file(path)
    try:
        _check_names(path)
        with hostile.clear_failures(path), safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (safetensors.SafetensorError, ValueError, RuntimeError, RecursionError) as error:
        raise errors.CorruptCheckpointError(
            f"{path}: safetensors cannot read it ({error}).", path=path
        ) from error


def _check_names(path: str) -> None:
    """Raises ValueError if a name occurs twice: the package would take the last one."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= safetensors_header.MAX_READABLE_BYTES:
            json.loads(file.read(length), object_pairs_hook=safetensors_header.without_repeats)


def load_all(path: str) -> dict[str, torch.Tensor]:
    """As `load`, with the names that were left out because they share another's memory."""
    tensors, metadata = load(path)
    for name, kept in metadata.items():
        if kept in tensors:
            tensors.setdefault(name, tensors[kept])
    return tensors


def write(given: Weights, names: Iterable[str], path: str, *, prefix: str = "") -> None:
    """Writes a file while its tensors are read; nothing is durable yet.

    Names of tensors that share the memory of others are in the file's metadata, as huggingface_hub
    has them.

    Args:
        given: The tensors; of `plain_files.DTYPES`.
        names: Those to write.
        path: The file to create.
        prefix: Put before every name.
    """
    wanted = [*names]
    held = {*wanted}

    def stream(order: Sequence[str]) -> Iterator[Any]:
        tensors = given.stream([name.removeprefix(prefix) for name in order])
        return (tensor.view(torch.uint8).numpy() for tensor in tensors)

    plain_files.write(
        path,
        {prefix + name: given.dtypes[name] for name in wanted},
        {prefix + name: given.shapes[name] for name in wanted},
        {prefix + name: prefix + kept for name, kept in given.tied.items() if kept in held},
        stream,
    )


def _open(path: str) -> Source:
    return Source(path, "safetensors", {"model": functools.partial(load_all, path)})


FORMAT = Format(name="safetensors", description="a file of safetensors", matches=fits, open=_open)
