"""The files of a directory of the hub: which tensors each holds, and writing them.

Tensors are written while they are read, a few MiB at a time. Several processes write one directory,
each some of its files.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from functional_ckpt import errors
from functional_ckpt.core.files.dealing import deal
from functional_ckpt.core.files.safetensors_header import MAX_TENSORS
from functional_ckpt.interop.hf_config import load_json
from functional_ckpt.interop.hub_options import DEFAULT_SHARD_BYTES, Options
from functional_ckpt.interop.plain_files import PlainFile
from functional_ckpt.interop.stored_files import StoredFiles
from functional_ckpt.interop.weights import Weights
from functional_ckpt.storage.local import LocalStorage

if TYPE_CHECKING:
    import torch


class OutputFile(NamedTuple):
    """A file of the output.

    Attributes:
        name: Its name; empty where it is the output.
        names: Its tensors, by the names of the weights; of a copy, by those in the file.
        size_bytes: Their bytes.
        source: The file of the step that it is a copy of; None where tensors are written.
    """

    name: str
    names: Sequence[str]
    size_bytes: int
    source: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The tensors and the files of an export.

    Attributes:
        given: The tensors.
        options: How they are written.
        stored: The step's files, where those are copied.
        files: The files.
    """

    given: Weights
    options: Options
    stored: StoredFiles | None
    files: Sequence[OutputFile]

    @classmethod
    def of(
        cls,
        given: Weights,
        options: Options,
        stored: StoredFiles | None = None,
        *,
        num_writers: int = 1,
    ) -> Output:
        """Plans the files.

        Args:
            given: The tensors.
            options: How they are written.
            stored: The step's files, where those are copied.
            num_writers: The number of processes; with no size in the options, each has a file.

        Raises:
            MismatchError: The index to be followed is of other tensors.
        """
        groups: Mapping[str, Sequence[str]]
        if stored is not None:
            groups = stored.names
        elif options.is_one_file:
            groups = {"": [*given.sizes]}
        elif options.like is not None:
            groups = _as_in(options.like, given, options.key_prefix)
        else:
            groups = _cut(given.sizes, options, num_writers)
        files: list[OutputFile] = []
        for number, (key, names) in enumerate(groups.items(), 1):
            part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            name = key if options.like else f"{options.stem}{part}.{options.format}"
            source = None if stored is None else key
            if stored is None:
                size_bytes = sum(given.sizes[each] for each in names)
            else:
                size_bytes = stored.files[key].size_bytes
            files.append(OutputFile("" if options.is_one_file else name, names, size_bytes, source))
        return cls(given=given, options=options, stored=stored, files=files)

    def plain_files(self, path: str, rank: int, num_ranks: int) -> list[PlainFile] | None:
        """Returns the files of a rank as `write` would write them; None if torch is needed."""
        given, prefix = self.given, self.options.key_prefix
        is_plain = self.stored is None and self.options.format == "safetensors"
        if not is_plain or given.arrays is None:
            return None
        found: list[PlainFile] = []
        for file in self._own(rank, num_ranks):
            held = {*file.names}
            found.append(
                PlainFile(
                    path=os.path.join(path, file.name) if file.name else path,
                    arrays={prefix + name: given.arrays[name] for name in file.names},
                    dtypes={prefix + name: given.dtypes[name] for name in file.names},
                    shapes={prefix + name: given.shapes[name] for name in file.names},
                    tied={prefix + a: prefix + b for a, b in given.tied.items() if b in held},
                )
            )
        return found

    def write(self, path: str, rank: int = 0, num_ranks: int = 1) -> None:
        """Writes the files of a rank; nothing is durable yet.

        Args:
            path: The directory, which exists; or the file.
            rank: Which rank.
            num_ranks: How many write at the same time.
        """
        for file in self._own(rank, num_ranks):
            self._write(file, os.path.join(path, file.name) if file.name else path)

    def _own(self, rank: int, num_ranks: int) -> list[OutputFile]:
        """Returns the files of a rank."""
        files = {file.name: file for file in self.files}
        sizes = {name: file.size_bytes for name, file in files.items()}
        return [files[name] for name in deal(sizes, num_ranks)[rank]]

    def _write(self, file: OutputFile, path: str) -> None:
        given, prefix = self.given, self.options.key_prefix
        if self.stored is not None and file.source is not None:
            self.stored.copy(file.source, path)
            return
        if self.options.format == "safetensors":
            from functional_ckpt.interop import safetensors

            safetensors.write(given, file.names, path, prefix=prefix)
            return
        import torch

        tensors = {prefix + name: _compact(each) for name, each in given.fetch(file.names).items()}
        aliases = {prefix + a: tensors[prefix + kept] for a, kept in self._aliases(file)}
        torch.save(tensors | aliases, path)

    def _aliases(self, file: OutputFile) -> list[tuple[str, str]]:
        return [(name, kept) for name, kept in self.given.tied.items() if kept in {*file.names}]

    def write_index(self, directory: str) -> None:
        """Writes the file that names the file of each tensor, if there are several files."""
        if (data := self.index_content()) is not None:
            LocalStorage().write(os.path.join(directory, self.options.index), data)

    def index_content(self) -> bytes | None:
        """Returns the content of that file; None if there is one file."""
        if len(self.files) < 2:
            return None
        placed: dict[str, str] = {}
        for file in self.files:
            names = list(file.names)
            if self.options.format == "bin":
                names += [name for name, _ in self._aliases(file)]
            placed |= dict.fromkeys((self.options.key_prefix + name for name in names), file.name)
        index = {
            "metadata": {"total_size": sum(self.given.sizes.values())},
            "weight_map": dict(sorted(placed.items())),
        }
        return (json.dumps(index, indent=2) + "\n").encode()


def _cut(sizes: Mapping[str, int], options: Options, num_writers: int) -> dict[str, list[str]]:
    """Returns names in order, cut where a file would grow beyond its limit."""
    share = -(-sum(sizes.values()) // num_writers)
    limit = options.max_shard_bytes or min(DEFAULT_SHARD_BYTES, share)
    shards: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not shards or total + size > limit or len(shards[-1]) == MAX_TENSORS:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return {str(number): names for number, names in enumerate(shards)}


def _as_in(index: str, given: Weights, prefix: str) -> dict[str, list[str]]:
    """Returns file -> names, as an index has them."""
    placed = load_json(index).get("weight_map")
    if not isinstance(placed, dict):
        raise errors.CorruptCheckpointError(f"{index}: it has no weight_map.", path=index)
    files = cast("dict[str, str]", placed)
    known = {prefix + name for name in (*given.sizes, *given.tied)}
    missing = [prefix + name for name in given.sizes if prefix + name not in files]
    unexpected = [name for name in files if name not in known]
    if missing or unexpected:
        raise errors.MismatchError(
            f"{index}: it is not of these tensors: {len(missing)} are not in it "
            f"({', '.join(missing[:4])}), {len(unexpected)} are in it alone "
            f"({', '.join(unexpected[:4])}).",
            missing=missing,
            unexpected=unexpected,
            path=index,
        )
    groups: dict[str, list[str]] = {}
    for name in given.sizes:
        groups.setdefault(files[prefix + name], []).append(name)
    return dict(sorted(groups.items()))


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    # torch.save writes the entire storage that a tensor is a view of
    is_part = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone() if is_part else tensor
