"""Files of safetensors, memory-mapped when read. The only importer of safetensors."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping

import safetensors
import safetensors.torch
import torch

from functional_ckpt import errors
from functional_ckpt.core.files import safetensors_header
from functional_ckpt.interop import hostile
from functional_ckpt.interop.source import Format, Source

DTYPES = (
    *("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
)
"""The dtypes of the format."""


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


def write(tensors: Mapping[str, torch.Tensor], tied: Mapping[str, str], path: str) -> None:
    """Writes a file; nothing is durable yet.

    Args:
        tensors: Names and tensors of `DTYPES`.
        tied: Name that is left out -> the name under which its memory is stored; kept in the
            file's metadata, as huggingface_hub does.
        path: The file to create.
    """
    compact = {name: _compact(tensor) for name, tensor in tensors.items()}
    open(path, "wb").close()  # safetensors makes files that only their owner may read
    safetensors.torch.save_file(compact, path, metadata={"format": "pt", **tied})


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor with a memory of its own, and no more of it than it shows."""
    tensor = tensor.detach().cpu().contiguous()
    is_whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_whole else tensor.clone()


def require(names: Iterable[tuple[str, str]], path: object) -> None:
    """Raises `UnsupportedLeafError` that names leaves which the format cannot store."""
    bad = [f"{name} ({dtype})" for name, dtype in names if dtype not in DTYPES]
    if bad:
        raise errors.UnsupportedLeafError(
            f"{path}: safetensors has no such dtype: {', '.join(bad[:8])}; convert the tensor, or "
            "write torch's own format.",
            path=path,
        )


def _open(path: str) -> Source:
    return Source(path, "safetensors", {"model": functools.partial(load_all, path)})


FORMAT = Format(name="safetensors", description="a file of safetensors", matches=fits, open=_open)
