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
from typing import Any, Literal, TypeAlias, cast

import torch

from functional_ckpt import errors
from functional_ckpt.handlers import hub_config
from functional_ckpt.interop import safetensors, torch_save, training_state, weights
from functional_ckpt.interop.atomic_output import atomic_output, check_replaceable
from functional_ckpt.interop.hf_config import Config, load_json, read_config
from functional_ckpt.interop.source import Format, Source, match_files
from functional_ckpt.interop.weights import Weights
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.paths import resolve_local

__all__ = ["FORMAT", "export", "load", "save"]

FileFormat: TypeAlias = Literal["safetensors", "bin"]

_STEMS: Mapping[str, str] = {"safetensors": "model", "bin": "pytorch_model"}
_UNITS: Mapping[str, int] = {
    "": 1,
    **{unit: 1000**n for n, unit in enumerate(("KB", "MB", "GB", "TB"), 1)},
    **{unit: 1024**n for n, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), 1)},
}
_DEFAULT_SHARD = "5GB"
# Suffix of a path that is one file -> its format.
_ONE_FILE: Mapping[str, FileFormat] = {".safetensors": "safetensors", ".bin": "bin", ".pt": "bin"}
_CONFIGS = ("config.json", "generation_config.json")
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
        config: What to write as `config.json`: a mapping, or a file to copy, or a directory with
            one; None for the module's own, where it has one.
        overwrite: Whether an existing file or directory is replaced, atomically.

    Raises:
        StepExistsError: The path exists and `overwrite` is False; it is not changed.
        UsageError: An existing directory has other files, which would be lost.
        UnsupportedLeafError: Something cannot be written; nothing was.
    """
    tied = hub_config.tied_targets(model)
    texts = {} if config is not None else hub_config.files_of(model)
    given = weights.of_value(model, keep=lambda name: name not in tied)
    options = _Options.of(max_shard_size, key_prefix, variant, format)
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

    No model is built, and no more than one file's tensors are in memory. Otherwise like `save`.

    Args:
        step: The step's directory; a URI too.
        path: The directory to create; a local path.
        item: The item that holds the weights.
        max_shard_size: Bytes of a file.
        key_prefix: Put before every name.
        variant: Put into the files' names.
        format: `safetensors` or `bin`.
        config: What to write as `config.json`; None for no such file.
        overwrite: Whether an existing file or directory is replaced, atomically.
    """
    options = _Options.of(max_shard_size, key_prefix, variant, format)
    texts = {} if config is None else read_config(config)
    _write(weights.of_step(step, item), path, options, texts, overwrite=overwrite)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    max_shard_bytes: int
    key_prefix: str
    variant: str | None
    format: FileFormat

    @classmethod
    def of(
        cls, max_shard_size: int | str, key_prefix: str, variant: str | None, format: str
    ) -> _Options:
        if format not in _STEMS:
            raise errors.UsageError(f"format must be 'safetensors' or 'bin'; got {format!r}.")
        if variant is not None and not re.fullmatch(r"[\w-]+", variant):
            raise errors.UsageError(f"variant must be letters, digits, _ or -; got {variant!r}.")
        return cls(
            max_shard_bytes=_parse_size(max_shard_size),
            key_prefix=key_prefix,
            variant=variant,
            format=cast("FileFormat", format),
        )

    @property
    def stem(self) -> str:
        return ".".join(filter(None, (_STEMS[self.format], self.variant)))

    @property
    def index(self) -> str:
        parts = (_STEMS[self.format], self.format, "index", self.variant, "json")
        return ".".join(filter(None, parts))


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"(\d+)\s*([A-Z]*)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) < 1 or isinstance(size, bool):
        raise errors.UsageError(
            f"max_shard_size must be bytes, or like '5GB', '200MB' or '1GiB'; got {size!r}."
        )
    return int(match[1]) * _UNITS[match[2]]


def _write(
    given: Weights,
    path: str | os.PathLike[str],
    options: _Options,
    texts: Mapping[str, str],
    *,
    overwrite: bool,
) -> None:
    one_file = _ONE_FILE.get(os.path.splitext(path)[1])
    if one_file is not None:
        options = dataclasses.replace(options, format=one_file)
    if options.format == "safetensors":
        safetensors.require(given.dtypes.items(), path)
    if overwrite:
        check_replaceable(path, lambda name: name in _CONFIGS or _is_weights(name))
    if one_file is not None:
        with atomic_output(path, overwrite=overwrite) as tmp:
            _write_shard(given, list(given.sizes), tmp, options)
        return
    shards = _shards(given.sizes, options.max_shard_bytes)
    storage = LocalStorage()
    with atomic_output(path, storage, overwrite=overwrite) as tmp:
        storage.make_directory(tmp)
        for name, text in texts.items():
            storage.write(os.path.join(tmp, name), text.encode())
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"{options.stem}{part}.{options.format}"
            written = _write_shard(given, names, os.path.join(tmp, file), options)
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


def _write_shard(given: Weights, names: Sequence[str], path: str, options: _Options) -> list[str]:
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
    """The first file to read: the weights, or their index."""
    found: list[str] = []
    for kind in _STEMS:
        options = _Options.of(1, "", variant, kind)
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
    """Whether it is a directory with weights, or shards of them, in files of one of the formats."""
    names = match_files(path, _is_weights)
    return format in _STEMS and any(name.startswith(_STEMS[format]) for name in names)


def of_files(format: str) -> Format:
    """The format that opens the files of one of the two formats, beside others of the other."""
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
)
