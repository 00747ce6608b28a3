"""The files of a record as JSON: thousands of names that differ by a number are columns. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import xxhash

from functional_ckpt.core.tree.plain_json import integer, string

Json: TypeAlias = Any

_MIN_NUMBERED = 64
_MAX_DIGITS = 20
_NUMBER = re.compile(r"([^0-9]*)([0-9]+)(.*)", re.DOTALL)
_HEX = re.compile(r"[0-9a-f]*")


def digest_hex(data: Any) -> str:
    """xxh3 (64 bits, seed 0) of a bytes-like object as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


@dataclasses.dataclass(frozen=True, slots=True)
class FileRecord:
    """Expected size and digest of a file.

    Attributes:
        size_bytes: Its size.
        xxh3: Digest of its content, 16 hex digits.
    """

    size_bytes: int
    xxh3: str

    @classmethod
    def of(cls, data: bytes) -> FileRecord:
        """Returns the record of a file with this content."""
        return cls(len(data), digest_hex(data))


@dataclasses.dataclass(frozen=True, slots=True)
class _Numbered:
    """Names with consecutive numbers: `prefix`, `digits` digits, `suffix`."""

    prefix: str
    digits: int
    suffix: str
    first: int
    count: int

    @property
    def names(self) -> Iterator[str]:
        for number in range(self.first, self.first + self.count):
            yield f"{self.prefix}{number:0{self.digits}d}{self.suffix}"


def to_json(files: Mapping[str, FileRecord]) -> dict[str, Json]:
    """Returns the members of a record that list files."""
    numbered = list(_numbered(files))
    in_columns = {name for run in numbered for name in run.names}
    rest = {name: file for name, file in files.items() if name not in in_columns}
    columns = [
        [
            *(run.prefix, run.digits, run.suffix, run.first),
            [files[name].size_bytes for name in run.names],
            "".join([files[name].xxh3 for name in run.names]),
        ]
        for run in numbered
    ]
    return {"files": listed(rest), **({"numbered_files": columns} if columns else {})}


def listed(files: Mapping[str, FileRecord]) -> dict[str, Json]:
    """Returns files one by one."""
    return {name: [file.size_bytes, file.xxh3] for name, file in sorted(files.items())}


def _numbered(names: Iterable[str]) -> Iterator[_Numbered]:
    groups: dict[tuple[str, int, str], list[int]] = {}
    for name in names:
        if found := _NUMBER.fullmatch(name):
            prefix, number, suffix = found.groups()
            groups.setdefault((prefix, len(number), suffix), []).append(int(number))
    for key, numbers in sorted(groups.items()):
        first, count = min(numbers), len(numbers)
        if count >= _MIN_NUMBERED and max(numbers) - first == count - 1:
            yield _Numbered(*key, first, count)


def from_json(record: Mapping[str, Json]) -> dict[str, FileRecord]:
    """Returns the files that a record lists.

    Raises:
        ValueError, TypeError, KeyError: The record is malformed.
    """
    files = {
        relative(name): FileRecord(integer(size), hex_digits(digest))
        for name, (size, digest) in record["files"].items()
    }
    for prefix, digits, suffix, first, sizes, digests in record.get("numbered_files", ()):
        if not (0 < integer(digits) <= _MAX_DIGITS and integer(first) >= 0):
            raise ValueError(f"numbers of {digits!r} digits from {first!r} on")
        run = _Numbered(string(prefix), digits, string(suffix), first, len(sizes))
        if len(hex_digits(digests)) != 16 * run.count:
            raise ValueError(f"{len(digests)} digits of the digests of {run.count} files")
        for number, (name, size) in enumerate(zip(run.names, sizes, strict=True)):
            if relative(name) in files:
                raise ValueError(f"{name!r} is listed twice")
            digest = digests[16 * number : 16 * number + 16]
            files[name] = FileRecord(integer(size), digest)
    return files


def relative(name: Json) -> str:
    """Returns a path inside the checkpoint."""
    parts = string(name).split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{name!r} is not a path inside the checkpoint")
    return name


def hex_digits(value: Json) -> str:
    """Returns lowercase hex digits."""
    if not _HEX.fullmatch(string(value)):
        raise ValueError(f"{value!r} is not a digest")
    return value
