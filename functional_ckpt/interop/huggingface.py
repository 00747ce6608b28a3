"""Directories of weights as `transformers` writes them and its `from_pretrained` opens them.

    config.json
    model.safetensors                        one file, or
    model-00001-of-00002.safetensors ...     shards of at most `max_shard_size`, and
    model.safetensors.index.json             the file of each name; written last

`pytorch_model.bin` and its shards, in torch.save's format, likewise. A variant goes before the
suffix: `model.fp16.safetensors`, `model.safetensors.index.fp16.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.tree.encode import torch_dtype_name
from functional_ckpt.handlers import hub_config
from functional_ckpt.interop import (
    hub_export,
    hub_weights,
    safetensors,
    torch_save,
    training_state,
    weights,
)
from functional_ckpt.interop.file_names import match_files
from functional_ckpt.interop.hf_config import Config, load_json, read_config
from functional_ckpt.interop.hub_files import Output
from functional_ckpt.interop.hub_options import STEMS, FileFormat, Options, is_weights
from functional_ckpt.interop.source import Format, Source
from functional_ckpt.storage.paths import resolve_local

__all__ = ["FORMAT", "export", "load", "save"]

# ------------------------------------------------------------------------------------------ writing


def save(
    model: Any,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
    key_prefix: str = "",
    variant: str | None = None,
    format: FileFormat = "safetensors",
    config: Config | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a module, or a tree of tensors, into a new directory.

    Of tensors that share memory one is written, under the name that the model keeps for it.

    Args:
        model: A module, a state dict or any tree of tensors (names are joined by dots).
        path: The directory to create; a local path. One that ends in `.safetensors`, `.bin` or
            `.pt` becomes one file of the weights alone, in the format of its suffix.
        max_shard_size: Bytes of a file, as a number or like `"200MB"`, `"1GiB"`; None for 5 GB. A
            larger tensor has a file to itself.
        key_prefix: Put before every name.
        variant: Put into the files' names.
        format: `safetensors`, or `bin` for torch.save.
        config: The content of `config.json`: a mapping, or a file to copy, or a directory with one;
            None for the module's own, if it has one.
        overwrite: Whether an existing file or directory is replaced, atomically.

    Raises:
        StepExistsError: The path exists and `overwrite` is False; it is not changed.
        UsageError: An existing directory has other files, which would be lost.
        UnsupportedLeafError: Something cannot be written; nothing was.
    """
    options = Options.of(path, max_shard_size, key_prefix, variant, format)
    tied = hub_config.tied_targets(model)
    texts = {} if config is not None else hub_config.files_of(model)
    given = weights.of_value(model, keep=lambda name: name not in tied)
    if texts:
        given = hub_weights.of_model(given, hub_config.unwrapped(model))
    texts = texts if config is None else read_config(config)
    output = Output.of(hub_export.checked(given, options, path), options)
    hub_export.write(output, path, texts, output.write, overwrite=overwrite)


def export(
    step: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    item: str = "model",
    max_shard_size: int | str | None = None,
    like: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    key_prefix: str = "",
    variant: str | None = None,
    format: FileFormat = "safetensors",
    config: Config | None = None,
    overwrite: bool = False,
    num_workers: int = 1,
    process_group: Any = None,
) -> None:
    """Writes an item of a step, of any sharding, into a new directory.

    Data files that can be files of the output are copied as they are, and compared with their
    digests. Else tensors are read, verified and written a few MiB at a time; `bin` takes the memory
    of a file, and models whose tensors on the hub are others (a mixture of experts in transformers
    5) that of the model. Otherwise like `save`.

    Args:
        step: The step's directory; a URI too.
        path: The directory to create; a local path, which all workers or ranks see. Or a URI of S3:
            from S3 the store copies large tensors, which are not verified then.
        item: The item that holds the weights.
        max_shard_size: Bytes of a file; None for 5 GB, or less, so that each worker has a file.
        like: An index, such as `model.safetensors.index.json`, whose files the tensors go to.
        dtype: A dtype for tensors of 16, 32 and 64 bits of floating point.
        key_prefix: Put before every name.
        variant: Put into the files' names.
        format: `safetensors` or `bin`.
        config: What to write as `config.json`; None for the step's own, where it has one.
        overwrite: Whether an existing file or directory is replaced, atomically.
        num_workers: The number of processes that write files, started for this call.
        process_group: The ranks that write files, all of which must call; None for this process.

    Raises:
        StepExistsError: The path exists and `overwrite` is False; it is not changed.
        StorageError: A worker was killed; nothing is at the path.
        CoordinationError: Another rank failed; nothing is at the path.
    """
    hub_export.export(
        step,
        path,
        item=item,
        max_shard_size=max_shard_size,
        like=like,
        dtype=None if dtype is None else torch_dtype_name(dtype),
        key_prefix=key_prefix,
        variant=variant,
        format=format,
        config=config,
        overwrite=overwrite,
        num_workers=num_workers,
        process_group=process_group,
    )


# ------------------------------------------------------------------------------------------ reading


def load(
    path: str | os.PathLike[str],
    *,
    key_prefix: str = "",
    variant: str | None = None,
    format: FileFormat | None = None,
) -> dict[str, torch.Tensor]:
    """Returns the tensors in a directory by name, memory-mapped: none is read before it is used.

    Args:
        path: The directory.
        key_prefix: The prefix of every name; it is removed.
        variant: Which variant.
        format: Which format, where there are two.

    Raises:
        StepNotFoundError: There are no such weights.
        UsageError: There are weights in two formats, and `format` does not say which.
        CorruptCheckpointError: A shard is missing or damaged, or the index is not of these files.
    """
    directory = resolve_local(path, "weights are read from local directories; copy it here first.")
    file = _choose(directory, variant, format)
    if not file.endswith(".json"):
        tensors = _load_file(os.path.join(directory, file))
    else:
        tensors = _load_shards(directory, file)
    bad = [name for name in tensors if not name.startswith(key_prefix)]
    if bad:
        raise errors.MismatchError(
            f"{directory}: these names do not start with {key_prefix!r}: {', '.join(bad[:8])}.",
            unexpected=bad,
            path=directory,
        )
    return {name.removeprefix(key_prefix): tensor for name, tensor in tensors.items()}


def _choose(directory: str, variant: str | None, format: str | None) -> str:
    """Returns the first file to read: the weights, or their index."""
    found: list[str] = []
    for kind in STEMS:
        options = Options.of("", None, "", variant, kind)
        names = (f"{options.stem}.{kind}", options.index)
        here = [name for name in names if os.path.isfile(os.path.join(directory, name))]
        found += here if format in (None, kind) else []
    if len(found) == 1:
        return found[0]
    if found:
        raise errors.UsageError(
            f"{directory}: weights in two formats or twice: {', '.join(found)}; choose with "
            "format='safetensors' or 'bin', or move the others away.",
            path=directory,
        )
    there = match_files(directory, is_weights)
    raise errors.StepNotFoundError(
        f"{directory}: there are no weights"
        + (f" of variant {variant!r}" if variant else "")
        + (f" in format {format!r}" if format else "")
        + (f", nor an index of: {', '.join(there[:8])}." if there else "."),
        path=directory,
    )


def _load_shards(directory: str, index: str) -> dict[str, torch.Tensor]:
    path = os.path.join(directory, index)
    weight_map = load_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise errors.CorruptCheckpointError(f"{path}: it has no weight_map.", path=path)
    placed = cast("dict[str, str]", weight_map)
    check_files(directory, index, placed.values())
    files = list(dict.fromkeys(placed.values()))
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= _load_file(os.path.join(directory, file))
    lost = [f"{name} ({file})" for name, file in placed.items() if name not in tensors]
    if lost:
        raise errors.CorruptCheckpointError(
            f"{path}: it names tensors that their files do not hold: {', '.join(lost[:8])}.",
            path=path,
        )
    return tensors


def check_files(directory: str, index: str, files: Iterable[object]) -> None:
    """Raises `CorruptCheckpointError` where an index names a file that is not beside it."""
    for file in files:
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
            raise errors.CorruptCheckpointError(
                f"{os.path.join(directory, index)}: {file!r} is not the name of a file beside it.",
                path=directory,
            )
        if not os.path.isfile(os.path.join(directory, file)):
            raise errors.CorruptCheckpointError(
                f"{os.path.join(directory, index)}: it names {file}, which is not there; the "
                "checkpoint is incomplete.",
                path=directory,
            )


def _load_file(path: str) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        return safetensors.load_all(path)
    content = torch_save.load(path)
    if not isinstance(content, Mapping) or not all(map(torch.is_tensor, content.values())):
        raise errors.CorruptCheckpointError(f"{path}: not names and tensors.", path=path)
    return dict(cast("Mapping[str, torch.Tensor]", content))


def fits(path: str) -> bool:
    """Returns whether it is a directory with weights, or shards of them, under these names."""
    return bool(match_files(path, is_weights))


def holds(path: str, format: str) -> bool:
    """Returns whether it is a directory with weights in files of one of the formats."""
    names = match_files(path, is_weights)
    return format in STEMS and any(name.startswith(STEMS[format]) for name in names)


def of_files(format: str) -> Format:
    """Returns the format that opens one of the two formats in a directory that has both."""
    return dataclasses.replace(
        FORMAT, open=functools.partial(_open, format=cast("FileFormat", format))
    )


def _open(path: str, format: FileFormat | None = None) -> Source:
    tensors = load(path, format=format)
    openers, left_out = training_state.openers_of(path, is_weights)
    return Source(path, "huggingface", {"model": lambda: tensors, **openers}, left_out)


FORMAT = Format(
    name="huggingface",
    description="a directory of Hugging Face transformers",
    matches=fits,
    open=_open,
    supersedes=("deepspeed",),  # that transformers' Trainer has put beside the weights
)
