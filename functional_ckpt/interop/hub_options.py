"""Options of files of weights, as `huggingface` writes and reads them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Literal, TypeAlias, cast

from functional_ckpt import errors
from functional_ckpt.interop.stored_files import StoredFiles

FileFormat: TypeAlias = Literal["safetensors", "bin"]

DEFAULT_SHARD_BYTES = 5 * 10**9
STEMS: Mapping[str, str] = {"safetensors": "model", "bin": "pytorch_model"}
_UNITS: Mapping[str, int] = {
    "": 1,
    **{unit: 1000**n for n, unit in enumerate(("KB", "MB", "GB", "TB"), 1)},
    **{unit: 1024**n for n, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), 1)},
}
# Suffix of a path that is one file -> its format.
ONE_FILE: Mapping[str, FileFormat] = {".safetensors": "safetensors", ".bin": "bin", ".pt": "bin"}
# Weights, their shards and their indexes, of any variant.
_FILE = re.compile(
    r"(model|pytorch_model)(\.[\w-]+?)?(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index(\.[\w-]+)?\.json)?"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How files of weights are written.

    Attributes:
        max_shard_bytes: Bytes of a file; None for 5 GB, or less where several processes write.
        key_prefix: Put before every name.
        variant: Put into the files' names.
        format: `safetensors` or `bin`.
        like: An index, whose files the tensors go to.
        is_one_file: Whether the output is a file.
    """

    max_shard_bytes: int | None
    key_prefix: str
    variant: str | None
    format: FileFormat
    like: str | None = None
    is_one_file: bool = False

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        max_shard_size: int | str | None,
        key_prefix: str,
        variant: str | None,
        format: str,
        like: str | os.PathLike[str] | None = None,
    ) -> Options:
        """Returns the options that a user gives; raises `UsageError` for invalid ones.

        The suffix of the output's path has precedence over the format.
        """
        if format not in STEMS:
            raise errors.UsageError(f"format must be 'safetensors' or 'bin'; got {format!r}.")
        if variant is not None and not re.fullmatch(r"[\w-]+", variant):
            raise errors.UsageError(f"variant must be letters, digits, _ or -; got {variant!r}.")
        one_file = ONE_FILE.get(os.path.splitext(path)[1])
        return cls(
            max_shard_bytes=None if max_shard_size is None else _parse_size(max_shard_size),
            key_prefix=key_prefix,
            variant=variant,
            format=one_file or cast("FileFormat", format),
            like=None if like is None else os.fspath(like),
            is_one_file=one_file is not None,
        )

    def takes(self, stored: StoredFiles) -> bool:
        """Returns whether files of a step can be those of the output."""
        if self.format != "safetensors" or self.key_prefix or self.like:
            return False
        if self.is_one_file:
            return len(stored.files) == 1
        return stored.largest_bytes <= (self.max_shard_bytes or DEFAULT_SHARD_BYTES)

    @property
    def stem(self) -> str:
        """The start of the names of files."""
        return ".".join(filter(None, (STEMS[self.format], self.variant)))

    @property
    def index(self) -> str:
        """The name of the index of files."""
        parts = (STEMS[self.format], self.format, "index", self.variant, "json")
        return ".".join(filter(None, parts))


def is_weights(name: str) -> bool:
    """Returns whether weights, a shard of them or their index may have this name."""
    return _FILE.fullmatch(name) is not None


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"(\d+)\s*([A-Z]*)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) < 1 or isinstance(size, bool):
        raise errors.UsageError(
            f"max_shard_size must be bytes, or like '5GB', '200MB' or '1GiB'; got {size!r}."
        )
    return int(match[1]) * _UNITS[match[2]]
