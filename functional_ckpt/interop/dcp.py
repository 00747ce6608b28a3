"""PyTorch's distributed checkpoints (`torch.distributed.checkpoint`), read without running pickles.

Their index, `.metadata`, is a pickle of records: it is read into inert ones. The tensors are stored
in the `.distcp` files as streams of `torch.save` and are read by `torch.load(weights_only=True)`.

`Writer` and `Reader` are PyTorch's storage interfaces over steps of this package.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.interop import hostile, torch_save
from functional_ckpt.interop.atomic_output import atomic_output
from functional_ckpt.interop.pickles import read_inert
from functional_ckpt.interop.source import Format, Source, items_of

if TYPE_CHECKING:
    from functional_ckpt.interop.dcp_reader import Reader as Reader
    from functional_ckpt.interop.dcp_writer import Writer as Writer

_INDEX = ".metadata"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The location of one stored piece of an entry."""

    file: str
    start: int
    length: int
    offset: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of the flattened state dict."""

    name: str
    keys: tuple[Any, ...]
    shape: tuple[int, ...] | None
    """None for other values than tensors."""
    parts: tuple[_Part, ...]


def _fits(path: str) -> bool:
    """Returns whether it is a directory with the index of a distributed checkpoint."""
    return os.path.isfile(os.path.join(path, _INDEX))


def _open(path: str) -> Source:
    items = items_of(_nest(entries(path).values()), path, _is_tensor)
    openers = {name: functools.partial(_read_tree, path, node) for name, node in items.items()}
    return Source(path, "dcp", openers)


# ------------------------------------------------------------------------------------------ index


def entries(path: str) -> dict[str, Entry]:
    """Returns the entries of a directory's index, by name."""
    index = os.path.join(path, _INDEX)
    metadata = read_inert(hostile.read_small(index), index)
    try:
        stored = _parts(metadata.storage_data, path)
        keys = cast("Mapping[str, Any]", getattr(metadata, "planner_data", None) or {})
        return {
            name: Entry(
                name=name,
                keys=tuple(keys.get(name, (name,))),
                shape=tuple(record.size) if hasattr(record, "size") else None,
                parts=tuple(stored.get(name, ())),
            )
            for name, record in metadata.state_dict_metadata.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise errors.CorruptCheckpointError(
            f"{index}: not the index of a distributed checkpoint ({error}).", path=index
        ) from error


def _parts(storage_data: Any, path: str) -> dict[str, list[_Part]]:
    found: dict[str, list[_Part]] = {}
    for where, info in storage_data.items():
        if getattr(info, "transform_descriptors", None):
            raise errors.UsageError(
                f"{path}: {where.fqn} was written through a transform (compression or encryption), "
                "which cannot be read; save it again without.",
                path=path,
            )
        name = str(info.relative_path)
        if os.path.isabs(name) or ".." in name.split("/"):
            raise errors.CorruptCheckpointError(
                f"{path}: its index names the file {name!r}, outside of it.", path=path
            )
        if not os.path.isfile(os.path.join(path, name)):
            raise errors.CorruptCheckpointError(
                f"{path}: its index names the file {name!r}, which is not there.", path=path
            )
        start, length = int(info.offset), int(info.length)
        size_bytes = os.path.getsize(os.path.join(path, name))
        if start < 0 or length < 0 or start + length > size_bytes:
            raise errors.CorruptCheckpointError(
                f"{path}: {where.fqn!r} is incomplete: it is {length} bytes from byte {start} of "
                f"{name!r}, which has {size_bytes}.",
                path=path,
            )
        part = _Part(
            file=os.path.join(path, name),
            start=start,
            length=length,
            offset=tuple(getattr(where, "offset", None) or ()),
        )
        found.setdefault(where.fqn, []).append(part)
    return found


def _nest(entries: Iterable[Entry]) -> dict[Any, Any]:
    root: dict[Any, Any] = {}
    for entry in entries:
        node = root
        for key in entry.keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        else:
            node[entry.keys[-1]] = entry
            continue
        raise errors.CorruptCheckpointError(f"{entry.name}: its key path is used by another entry.")
    return root


def _is_tensor(node: Any) -> bool:
    return isinstance(node, Entry) and node.shape is not None


def _is_list(node: Mapping[Any, Any], name: object) -> bool:
    """Returns whether it was a list; keys of an optimizer's parameters are numbers too."""
    return bool(node) and name != "state" and list(node) == list(range(len(node)))


# ------------------------------------------------------------------------------------------ values


def _read_tree(path: str, node: Any, name: object = None) -> Any:
    if isinstance(node, Entry):
        return read_entry(path, node)
    children = {key: _read_tree(path, child, key) for key, child in node.items()}
    if name == "state" and all(type(key) is str and key.isdecimal() for key in children):
        # of an optimizer, by number of parameter; PyTorch writes every key as a str
        return {int(key): child for key, child in children.items()}
    return list(children.values()) if _is_list(node, name) else children


def read_entry(path: str, entry: Entry) -> Any:
    """Returns the value of one entry: a tensor, or an object."""
    if entry.shape is None:
        if len(entry.parts) != 1:
            raise _lost(path, entry, f"{len(entry.parts)} pieces of a value that cannot be split")
        return _read_part(path, entry, entry.parts[0])
    full: torch.Tensor | None = None
    num_elements = 0
    for part in entry.parts:
        piece = _read_part(path, entry, part)
        if not isinstance(piece, torch.Tensor) or len(part.offset) != len(entry.shape):
            raise _lost(path, entry, "a piece that does not belong to it")
        if tuple(piece.shape) == entry.shape:
            return piece
        ends = [start + size for start, size in zip(part.offset, piece.shape, strict=True)]
        if min(part.offset) < 0 or any(e > s for e, s in zip(ends, entry.shape, strict=True)):
            raise _lost(path, entry, "a piece that reaches beyond it")
        if full is None:
            _check_size(path, entry, piece)
            full = torch.empty(entry.shape, dtype=piece.dtype, device="cpu")
        slices = tuple(slice(s, e) for s, e in zip(part.offset, ends, strict=True))
        full[slices].copy_(piece)
        num_elements += piece.numel()
    if full is None or num_elements != full.numel():
        raise _lost(path, entry, f"{num_elements} of {math.prod(entry.shape)} elements")
    return full


def _check_size(path: str, entry: Entry, piece: torch.Tensor) -> None:
    """Limits the memory for an index to the bytes on disk."""
    shape = cast("tuple[int, ...]", entry.shape)
    lengths = {(part.file, part.start): part.length for part in entry.parts}
    if math.prod(shape) * piece.element_size() > sum(lengths.values()):
        raise _lost(path, entry, f"too few bytes for the shape {list(shape)}")


def _read_part(path: str, entry: Entry, part: _Part) -> Any:
    with open(part.file, "rb") as file:
        file.seek(part.start)
        data = file.read(part.length)
    if len(data) != part.length:
        raise _lost(path, entry, f"{len(data)} of {part.length} bytes")
    what = f"{part.file} ({entry.name})"
    return torch_save.load_stream(io.BytesIO(data), what, size_bytes=len(data))


def _lost(path: str, entry: Entry, got: str) -> errors.CheckpointError:
    return errors.CorruptCheckpointError(
        f"{path}: {entry.name!r} is incomplete: its files hold {got}.",
        path=path,
        key_path=entry.name,
    )


# ------------------------------------------------------------------------------------------ writing


def save(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a new directory with `torch.distributed.checkpoint`, as one process.

    Args:
        content: A state dict: tensors and plain values in dicts and lists, under str keys.
        path: The directory to create.

    Raises:
        StepExistsError: The path exists.
    """
    checkpoint: Any = importlib.import_module("torch.distributed.checkpoint")
    with atomic_output(path) as tmp, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.save(
            dict(content), storage_writer=checkpoint.FileSystemWriter(tmp), no_dist=True
        )


FORMAT = Format(name="dcp", description="torch.distributed.checkpoint", matches=_fits, open=_open)


if not TYPE_CHECKING:  # importing torch.distributed.checkpoint takes long

    def __getattr__(name: str) -> Any:
        if name not in ("Reader", "Writer"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}_{name.lower()}"), name)


def __dir__() -> list[str]:
    return ["Reader", "Writer", "save"]
