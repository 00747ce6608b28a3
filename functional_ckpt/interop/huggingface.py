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
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.handlers import hub_config
from functional_ckpt.interop import (
    hub_weights,
    safetensors,
    stored_files,
    torch_save,
    training_state,
    weights,
)
from functional_ckpt.interop.atomic_output import atomic_output, check_replaceable
from functional_ckpt.interop.hf_config import Config, load_json, read_config
from functional_ckpt.interop.hub_options import ONE_FILE, STEMS, FileFormat, Options
from functional_ckpt.interop.source import Format, Source, match_files
from functional_ckpt.interop.stored_files import StoredFiles
from functional_ckpt.interop.weights import Weights
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.open import connect
from functional_ckpt.storage.paths import resolve_local

__all__ = ["FORMAT", "export", "load", "save"]

_DEFAULT_SHARD = "5GB"
# Weights, their shards and their indexes, of any variant.
_FILE = re.compile(
    r"(model|pytorch_model)(\.[\w-]+?)?(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index(\.[\w-]+)?\.json)?"
)


# ------------------------------------------------------------------------------------------ writing


def save(
    model: Any,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = _DEFAULT_SHARD,
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
        max_shard_size: Bytes of a file, as a number or like `"5GB"`, `"200MB"`, `"1GiB"`; a larger
            tensor has a file to itself.
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
    tied = hub_config.tied_targets(model)
    texts = {} if config is not None else hub_config.files_of(model)
    given = weights.of_value(model, keep=lambda name: name not in tied)
    if texts:
        given = hub_weights.of_model(given, hub_config.unwrapped(model))
    options = Options.of(max_shard_size, key_prefix, variant, format)
    texts = texts if config is None else read_config(config)
    _write(given, path, options, texts, overwrite=overwrite)


def export(
    step: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    item: str = "model",
    max_shard_size: int | str = _DEFAULT_SHARD,
    key_prefix: str = "",
    variant: str | None = None,
    format: FileFormat = "safetensors",
    config: Config | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an item of a step into a new directory, reading one file's tensors at a time.

    Data files that can be files of the output are copied as they are, and compared with their
    digests. No more than one file's tensors are in memory, but for models whose tensors on the hub
    are others (a mixture of experts in transformers 5). Otherwise like `save`.

    Args:
        step: The step's directory; a URI too.
        path: The directory to create; a local path.
        item: The item that holds the weights.
        max_shard_size: Bytes of a file.
        key_prefix: Put before every name.
        variant: Put into the files' names.
        format: `safetensors` or `bin`.
        config: The content of `config.json`; None for the step's own, if it has one.
        overwrite: Whether an existing file or directory is replaced, atomically.
    """
    options = Options.of(max_shard_size, key_prefix, variant, format)
    opened = checkpoint_dir.open_checkpoint(*connect(step))
    given = weights.of_step(opened, item)
    configs = stored_files.configs_of(opened.tree(item))
    own = {name.removeprefix(hub_config.RUNTIME): text for name, text in configs.items()}
    stored = None if key_prefix else stored_files.of_item(opened, item)
    if stored is None or not stored.is_on_hub or not options.takes(stored, path):
        held = [] if stored is None else [name for each in stored.names.values() for name in each]
        given, stored = hub_weights.of_config(given, own.get("config.json"), held), None
    texts = own if config is None else read_config(config)
    _write(given, path, options, texts, overwrite=overwrite, stored=stored)


def _write(
    given: Weights,
    path: str | os.PathLike[str],
    options: Options,
    texts: Mapping[str, str],
    *,
    overwrite: bool,
    stored: StoredFiles | None = None,
) -> None:
    one_file = ONE_FILE.get(os.path.splitext(path)[1])
    if one_file is not None:
        options = dataclasses.replace(options, format=one_file)
    if options.format == "safetensors":
        safetensors.require(given.dtypes.items(), path)
    if overwrite:
        check_replaceable(path, lambda name: name in hub_config.CONFIGS or _is_weights(name))
    if one_file is not None:
        with atomic_output(path, overwrite=overwrite) as tmp:
            if stored is None:
                _write_shard(given, list(given.sizes), tmp, options)
            else:
                stored.copy(next(iter(stored.files)), tmp)
        return
    shards: list[list[str]] = (
        _shards(given.sizes, options.max_shard_bytes)
        if stored is None
        else [list(names) for names in stored.names.values()]
    )
    sources = [None] * len(shards) if stored is None else list(stored.files)
    storage = LocalStorage()
    with atomic_output(path, storage, overwrite=overwrite) as tmp:
        storage.make_directory(tmp)
        for name, text in texts.items():
            storage.write(os.path.join(tmp, name), text.encode())
        weight_map: dict[str, str] = {}
        for number, (names, source) in enumerate(zip(shards, sources, strict=True), 1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"{options.stem}{part}.{options.format}"
            written = names
            if stored is None or source is None:
                written = _write_shard(given, names, os.path.join(tmp, file), options)
            else:
                stored.copy(source, os.path.join(tmp, file))
            weight_map |= dict.fromkeys(written, file)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(given.sizes.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            text = json.dumps(index, indent=2) + "\n"
            storage.write(os.path.join(tmp, options.index), text.encode())


def _shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, cut where a file would grow beyond its limit."""
    shards: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not shards or total + size > max_bytes:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards


def _write_shard(given: Weights, names: Sequence[str], path: str, options: Options) -> list[str]:
    """Writes one file; returns the names that it holds."""
    prefix = options.key_prefix
    tensors = {prefix + name: tensor for name, tensor in given.fetch(names).items()}
    tied = {prefix + name: prefix + kept for name, kept in given.tied.items() if kept in names}
    if options.format == "safetensors":
        safetensors.write(tensors, tied, path)
        return list(tensors)
    compact = {
        name: tensor.clone() if _is_part(tensor) else tensor for name, tensor in tensors.items()
    }
    torch.save(compact | {name: compact[kept] for name, kept in tied.items()}, path)
    return [*tensors, *tied]


def _is_part(tensor: torch.Tensor) -> bool:
    # torch.save writes the entire storage that a tensor is a view of
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


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
        options = Options.of(1, "", variant, kind)
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
    there = match_files(directory, _is_weights)
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
    return bool(match_files(path, _is_weights))


def _is_weights(name: str) -> bool:
    return _FILE.fullmatch(name) is not None


def holds(path: str, format: str) -> bool:
    """Returns whether it is a directory with weights in files of one of the formats."""
    names = match_files(path, _is_weights)
    return format in STEMS and any(name.startswith(STEMS[format]) for name in names)


def of_files(format: str) -> Format:
    """Returns the format that opens one of the two formats in a directory that has both."""
    return dataclasses.replace(
        FORMAT, open=functools.partial(_open, format=cast("FileFormat", format))
    )


def _open(path: str, format: FileFormat | None = None) -> Source:
    tensors = load(path, format=format)
    openers, left_out = training_state.openers_of(path, _is_weights)
    return Source(path, "huggingface", {"model": lambda: tensors, **openers}, left_out)


FORMAT = Format(
    name="huggingface",
    description="a directory of Hugging Face transformers",
    matches=fits,
    open=_open,
    supersedes=("deepspeed",),  # that transformers' Trainer has put beside the weights
)
