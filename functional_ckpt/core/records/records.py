"""The records on disk and their JSON: our extension of Orbax's format. Pure; free of torch.

`docs/format.md` is normative; `core/records/orbax.py` has Orbax's own records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

from functional_ckpt import errors
from functional_ckpt.core.arrays import spec as spec_lib
from functional_ckpt.core.arrays.chunks import (
    DIGEST_BLOCK_BYTES,
    MAX_INLINE_BYTES,
    ChunkGrid,
    digest_offsets,
)
from functional_ckpt.core.records import file_list, structure_json
from functional_ckpt.core.records.file_list import FileRecord, digest_hex, hex_digits, relative
from functional_ckpt.core.tree import structure
from functional_ckpt.core.tree.plain_json import parse, string

Json: TypeAlias = Any

EXTENSION_FILE = "_FUNCTIONAL_CKPT"
_FORMAT = "functional_ckpt"
VERSION = 2
"""Of the records that are written."""
_BLOCK_BYTES = {1: 64 * 2**10, 2: DIGEST_BLOCK_BYTES}
"""Version that can be read -> the bytes of a digest."""
_SEAL = ', "xxh3": "{}"}}'
_SEAL_BYTES = len(_SEAL.format("0" * 16))


DIGEST_BYTES = 8
PAGE_BYTES = 16 * 2**10
"""The table of digests is read and verified in units of this many bytes."""
MAX_DIGESTS = 8192
"""Digests of a record; more are in a table."""


@dataclasses.dataclass(frozen=True, slots=True)
class DigestTable:
    """Where the digests of an item are, if they are not in its record.

    Attributes:
        file: The file, relative to the item.
        offset: The first byte.
        num_digests: The number of digests, 8 bytes each: arrays in the order of the record.
        pages: The digest of each page of the table, in one string.
    """

    file: str
    offset: int
    num_digests: int
    pages: str


class ArrayRecord(NamedTuple):
    """Chunk shape and digests of one array.

    Attributes:
        chunk_shape: Shape of one chunk.
        xxh3: For every chunk in C order, for every block of its valid region, 16 hex digits; all in
            one string. Empty where a table has them.
        num_in_table: The number of its digests in a table.
    """

    chunk_shape: tuple[int, ...]
    xxh3: str
    num_in_table: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ItemRecord:
    """Everything about a tree item except the bytes of its arrays.

    Attributes:
        item: The item's name.
        handler: Name of the handler that lowered it, for people.
        root: The structure.
        arrays: For each array that holds bytes, by name: its grid and digests.
        files: Every other file of the item's directory.
        block_bytes: Bytes of a chunk's valid region that have a digest.
        table: Where the digests are; None if they are in `arrays`.
    """

    item: str
    handler: str
    root: structure.Node
    arrays: Mapping[str, ArrayRecord]
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict)
    block_bytes: int = DIGEST_BLOCK_BYTES
    table: DigestTable | None = None

    @property
    def least_bytes(self) -> int:
        """Bytes that the arrays take on disk at least; a record of more is not believed.

        Small chunks count as nothing, because they may be compressed. Each of them has a digest in
        the record, which bounds their number.
        """
        return sum(
            _least_bytes(leaf.spec, self.arrays[leaf.name].chunk_shape)
            for leaf in structure.iter_arrays(self.root)
            if leaf.tied_to is None
        )

    def to_json(self) -> bytes:
        """Returns the sealed text of the item's extension file."""
        table = self.table
        record: dict[str, Json] = {
            "item": self.item,
            "handler": self.handler,
            "digest_block_bytes": self.block_bytes,
            "structure": structure_json.to_json(self.root),
            "arrays": {
                name: [list(array.chunk_shape), *([array.xxh3] if table is None else [])]
                for name, array in self.arrays.items()
            },
            **file_list.to_json(self.files),
        }
        if table is not None:
            record["digests"] = [table.file, table.offset, table.num_digests, table.pages]
        return sealed(record)


@functools.lru_cache(maxsize=4096)
def _least_bytes(spec: spec_lib.ArraySpec, chunk_shape: tuple[int, ...]) -> int:
    chunk_bytes = math.prod(chunk_shape) * spec.itemsize_bytes
    return spec.size_bytes if chunk_bytes > MAX_INLINE_BYTES else 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """The record of a checkpoint: its items and files.

    Attributes:
        step: The step, or None for a checkpoint without steps.
        items: Name of each item -> its format, `tree` or `json`.
        files: Every file outside the tree items' directories, and each tree item's extension file.
        generation: The number of rollbacks before it was saved.
        ancestors: For each earlier generation that led to it, its number and its last step.
    """

    step: int | None
    items: Mapping[str, str]
    files: Mapping[str, FileRecord]
    generation: int = 0
    ancestors: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> bytes:
        """Returns the sealed text of the checkpoint's extension file."""
        record: dict[str, Json] = {
            "step": self.step,
            "items": dict(self.items),
            "files": file_list.listed(self.files),
        }
        if self.generation:
            record |= {"generation": self.generation, "ancestors": self.ancestors}
        return sealed(record)


# ------------------------------------------------------------------------------------ sealed text


def sealed(record: Mapping[str, Json]) -> bytes:
    """Returns the sealed text of a record of the current version."""
    return with_checksum({"format": _FORMAT, "version": VERSION, **record})


def with_checksum(record: Mapping[str, Json], *, allow_nan: bool = False) -> bytes:
    """JSON text of a record whose last member is the digest of everything before it."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=allow_nan)[:-1]
    return (body + _SEAL.format(digest_hex(body.encode()))).encode()


def parse_json(data: bytes, path: object) -> Json:
    """Returns the JSON value in a file; raises `CorruptCheckpointError` for anything else."""
    try:
        return parse(data)
    except (ValueError, RecursionError) as error:
        raise errors.CorruptCheckpointError(f"{path}: not JSON ({error}).", path=path) from error


def parse_object(data: bytes, path: object) -> dict[str, Json]:
    """Returns the JSON object in a file; raises `CorruptCheckpointError` for anything else."""
    record = parse_json(data, path)
    if not isinstance(record, dict):
        raise errors.CorruptCheckpointError(f"{path}: not a JSON object.", path=path)
    return cast("dict[str, Json]", record)


def verify_checksum(data: bytes, path: object) -> dict[str, Json]:
    """Returns the record of a sealed text.

    Raises:
        CorruptCheckpointError: The text was changed, cut, or is of a version this package does not
            know.
    """
    body, mark = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if mark != _SEAL.format(digest_hex(body)).encode():
        raise errors.CorruptCheckpointError(
            f"{path}: its content does not match its own digest; the file was changed or cut "
            "short.",
            path=path,
        )
    known = parse_object(data, path)
    if known.get("format") != _FORMAT:
        raise errors.CorruptCheckpointError(f"{path}: not a {_FORMAT} record.", path=path)
    version = known.get("version")
    if type(version) is not int or version not in _BLOCK_BYTES:
        raise errors.CorruptCheckpointError(
            f"{path}: format version {version!r}; this package reads versions 1 to "
            f"{VERSION}. Use the version of functional_ckpt that wrote it, or a later one.",
            path=path,
        )
    return known


def parse_item(data: bytes, path: object) -> ItemRecord:
    """Returns the record of an item's extension file, or raises `CorruptCheckpointError`."""
    record = verify_checksum(data, path)
    with parsing(path):
        block_bytes = _BLOCK_BYTES[record["version"]]
        if record["digest_block_bytes"] != block_bytes:
            raise ValueError(f"digest blocks of {record['digest_block_bytes']!r} bytes")
        root = structure_json.from_json(record["structure"])
        files = file_list.from_json(record)
        table = _table(record.get("digests"), files)
        return ItemRecord(
            item=string(record["item"]),
            handler=string(record["handler"]),
            root=root,
            arrays=_arrays(record["arrays"], _stored_specs(root), block_bytes, table),
            files=files,
            block_bytes=block_bytes,
            table=table,
        )


def _table(record: Json, files: Mapping[str, FileRecord]) -> DigestTable | None:
    if record is None:
        return None
    file, offset, count, pages = record
    table = DigestTable(string(file), natural(offset), natural(count), hex_digits(pages))
    size_bytes = table.num_digests * DIGEST_BYTES
    num_pages = -(-size_bytes // PAGE_BYTES)
    if len(table.pages) != 16 * num_pages or table.offset + size_bytes > files[file].size_bytes:
        raise ValueError(f"{count} digests at byte {offset} of {file!r}")
    return table


def parse_step(data: bytes, path: object) -> StepRecord:
    """Returns the record of a step's extension file; raises `CorruptCheckpointError` if invalid."""
    record = verify_checksum(data, path)
    with parsing(path):
        step = record["step"]
        if step is not None and (type(step) is not int or step < 0):
            raise ValueError(f"step {step!r}")
        items = {_item_name(name): string(kind) for name, kind in record["items"].items()}
        if not set(items.values()) <= {"tree", "json"}:
            raise ValueError(f"items {items!r}")
        return StepRecord(
            step=step,
            items=items,
            files=file_list.from_json(record),
            generation=natural(record.get("generation", 0)),
            ancestors=tuple(
                (natural(generation), natural(last))
                for generation, last in record.get("ancestors", ())
            ),
        )


def natural(value: Json) -> int:
    """Returns the value, if it is an integer >= 0; else `ValueError`."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} for a number of steps or generations")
    return value


_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def parsing(path: object) -> Generator[None]:
    """Turns whatever a malformed record raises into one clear error."""
    try:
        yield
    except _MALFORMED as error:
        raise errors.CorruptCheckpointError(
            f"{path}: malformed record ({type(error).__name__}: {error}).", path=path
        ) from error


def _stored_specs(root: structure.Node) -> dict[str, spec_lib.ArraySpec]:
    """Returns the arrays that hold bytes, by name, once tied leaves are like those."""
    specs: dict[str, spec_lib.ArraySpec] = {}
    tied: list[structure.ArrayNode] = []
    for leaf in structure.iter_arrays(root):
        if leaf.tied_to is not None:
            tied.append(leaf)
        elif (spec := specs.setdefault(leaf.name, leaf.spec)) is not leaf.spec:
            raise ValueError(f"two arrays {leaf.name!r}: {spec} and {leaf.spec}")
    for leaf in tied:
        if specs.get(str(leaf.tied_to)) != leaf.spec:
            raise ValueError(f"{leaf.name!r} is tied to {leaf.tied_to!r}, which is not the same")
    return specs


def _arrays(
    listed: Json,
    specs: Mapping[str, spec_lib.ArraySpec],
    block_bytes: int,
    table: DigestTable | None,
) -> dict[str, ArrayRecord]:
    """Returns the records of arrays, once each fits its array."""
    if specs.keys() != listed.keys():
        raise ValueError(f"arrays {sorted(specs.keys() ^ listed.keys())} are listed once only")
    arrays: dict[str, ArrayRecord] = {}
    num_digests = 0
    for name, (sizes, *digests) in listed.items():
        spec, chunk_shape = specs[name], structure_json.shape(sizes)
        text = "" if table else hex_digits(*digests)
        recorded = table.num_digests if table else len(text) // 16
        fitting = _fitting(spec.shape, spec.itemsize_bytes, chunk_shape, block_bytes, recorded)
        num_digests += fitting.num_in_table
        if table is None:
            if len(text) != 16 * fitting.num_in_table:
                raise ValueError(f"array {name!r} has {len(text)} digits of digest")
            fitting = ArrayRecord(chunk_shape, text)
        elif digests:
            raise ValueError(f"array {name!r} has digests beside those in the table")
        arrays[name] = fitting
    if table and num_digests != table.num_digests:
        raise ValueError(f"{table.num_digests} digests for other numbers of blocks")
    return arrays


@functools.lru_cache(maxsize=4096)
def _fitting(
    shape: tuple[int, ...],
    itemsize_bytes: int,
    chunk_shape: tuple[int, ...],
    block_bytes: int,
    recorded: int,
) -> ArrayRecord:
    """Returns the record of an array whose digests are in a table; equal arrays share it."""
    grid = ChunkGrid(shape, chunk_shape, block_bytes)
    # A hostile shape may have 2^62 chunks: do not count them one by one.
    is_hostile = grid.num_chunks > recorded
    blocks = grid.num_chunks if is_hostile else digest_offsets(grid, itemsize_bytes)[-1]
    return ArrayRecord(chunk_shape, "", blocks)


# ------------------------------------------------------------------------------------ small parts


def _item_name(name: Json) -> str:
    if relative(name) != name or "/" in name:
        raise ValueError(f"{name!r} is not an item name")
    return name
