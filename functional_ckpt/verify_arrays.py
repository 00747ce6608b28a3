"""Verification of an item's arrays: all its database holds, under every name, as readers get it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from functional_ckpt import errors
from functional_ckpt.core import manifest, orbax_format, spec, structure
from functional_ckpt.core.chunks import ChunkGrid, digest_offsets
from functional_ckpt.verify_findings import Finding, Problem, Search, reason

if TYPE_CHECKING:
    from functional_ckpt.storage import arrays

__all__ = ["ItemArrays"]

# Values up to this size are read many at a time, straight from the key-value store.
_SMALL_BYTES = 128 * 1024
_BATCH = 512
_MANIFEST = "manifest.ocdbt"
_METADATA_FIELDS = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs")

Difference: TypeAlias = tuple[Problem, str, str]
"""Problem, expected, got."""
Check: TypeAlias = "Callable[[bytes | None], Difference | None]"
"""Compares the value of a key, None where there is none."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    """A value of the database that is not what was written."""

    leaf: str
    key: str
    difference: Difference


@dataclasses.dataclass(frozen=True, slots=True)
class _Value:
    """A value to be read and compared."""

    leaf: str
    key: str
    check: Check


class ItemArrays:
    """The arrays of one item, compared with its record.

    Args:
        search: Where findings go.
        item: Name of the item.
        record: Its record.

    Attributes:
        size_bytes: Bytes that will be read.
    """

    def __init__(self, search: Search, item: str, record: manifest.ItemRecord) -> None:
        self.size_bytes = 0
        self._search = search
        self._item = item
        self._record = record
        self._directory = os.path.join(search.path, item)
        self._failures: list[_Failure] = []
        leaves = structure.iter_leaves(record.root)
        self._nodes = [leaf for _, leaf in leaves if isinstance(leaf, structure.ArrayNode)]
        self._scalars = list(orbax_format.scalar_leaves(record.root))
        if self._check_sizes():
            self.size_bytes = sum(node.spec.size_bytes for node in self._nodes)
        else:
            self._nodes, self._scalars = [], []

    def _check_sizes(self) -> bool:
        """No record makes us allocate more than its files hold: chunks are not compressed."""
        wanted = sum(node.spec.size_bytes for node in self._nodes if node.tied_to is None)
        stored = sum(file.size_bytes for file in self._record.files.values())
        if wanted <= stored:
            return True
        self._search.add(
            self._item,
            f"{self._item}/{manifest.EXTENSION_FILE}",
            "record",
            f"files for {wanted:,} bytes of arrays",
            f"files of {stored:,} bytes",
        )
        return False

    def tasks(self) -> list[Callable[[], None]]:
        """What to run, on any thread; nothing is raised."""
        if not self._nodes and not self._scalars:
            return []
        from functional_ckpt.storage import arrays

        try:
            database = arrays.open_for_reading(self._directory)
        except errors.CorruptCheckpointError as error:
            why: Difference = ("unreadable", "a database", reason(error, self._directory))
            names = (*(node.name for node in self._nodes), *(name for name, _, _ in self._scalars))
            self._failures += [_Failure(name, _MANIFEST, why) for name in names]
            return []
        values = list(self._small_values())
        batches = (values[start : start + _BATCH] for start in range(0, len(values), _BATCH))
        tasks = [functools.partial(self._check_values, database, batch) for batch in batches]
        return [*tasks, *self._large_chunks(database)]

    # ---------------------------------------------------------------------------- small values

    def _small_values(self) -> Iterator[_Value]:
        for name, array, value in self._scalars:
            yield _metadata(name, array, ())
            key = f"{structure.key_prefix(name)}c"
            yield _Value(name, key, functools.partial(_compare_number, array, value))
        for node in self._nodes:
            place = self._record.arrays[node.stored_name]
            yield _metadata(node.name, node.spec, place.chunk_shape)
            grid = ChunkGrid(node.spec.shape, place.chunk_shape)
            for index in grid.indices():
                if _is_small(node.spec, grid, index):
                    key = f"{structure.key_prefix(node.name)}{grid.key(index)}"
                    check = functools.partial(_compare_chunk, node.spec, grid, index, place.xxh3)
                    yield _Value(node.name, key, check)

    def _check_values(self, database: arrays.Database, values: list[_Value]) -> None:
        from functional_ckpt.storage.arrays_inspect import read_values

        num_bytes = 0
        found = read_values(database, [value.key for value in values])
        for value, got in zip(values, found, strict=True):
            if isinstance(got, errors.CorruptCheckpointError):
                why: Difference | None = (
                    "unreadable",
                    "what was written",
                    reason(got, self._directory),
                )
            else:
                num_bytes += len(got or b"")
                why = value.check(got)
            if why is not None:
                self._failures.append(_Failure(value.leaf, value.key, why))
        self._search.advance(num_bytes)

    # ---------------------------------------------------------------------------- large chunks

    def _large_chunks(self, database: arrays.Database) -> Iterator[Callable[[], None]]:
        from functional_ckpt.storage import arrays

        for node in self._nodes:
            place = self._record.arrays[node.stored_name]
            grid = ChunkGrid(node.spec.shape, place.chunk_shape)
            # Under its own name, not its owner's: a tied leaf must resolve to the same bytes.
            read = arrays.ArrayRead(
                name=node.name,
                spec=node.spec,
                grid=grid,
                digests=place.xxh3,
                box=spec.Box.whole(node.spec.shape),
            )
            for index in grid.indices():
                if not _is_small(node.spec, grid, index):
                    yield functools.partial(self._check_chunk, database, read, index)

    def _check_chunk(
        self, database: arrays.Database, read: arrays.ArrayRead, index: tuple[int, ...]
    ) -> None:
        from functional_ckpt.storage import arrays

        try:
            arrays.verify_part(database, read, index)
        except (errors.CheckpointError, MemoryError, ValueError) as error:
            key = f"{structure.key_prefix(read.name)}{read.grid.key(index)}"
            why = reason(error, self._directory)
            self._failures.append(
                _Failure(read.name, key, ("mismatch", "the bytes that were written", why))
            )
        self._search.advance(read.grid.box(index).num_elements * read.spec.itemsize_bytes)

    # ---------------------------------------------------------------------------- blame

    def blame(self, damaged: dict[str, Finding]) -> None:
        """Tells each damaged file the leaves it takes with it.

        Args:
            damaged: Finding of each damaged file, by path in the checkpoint; what no damaged file
                explains is added to it.
        """
        if not self._failures:
            return
        from functional_ckpt.storage.arrays_inspect import locate

        places = locate(self._directory)
        # What the tree does not lead to any more lies behind the part of it that cannot be read.
        lost = sorted(places.unreadable) or [_MANIFEST]
        leaves: dict[str, set[str]] = {}
        first: dict[str, _Failure] = {}
        for failure in self._failures:
            known = places.files.get(failure.key)
            files = lost if known is None else [known]
            guilty = [file for file in files if f"{self._item}/{file}" in damaged]
            for file in guilty or files[:1]:
                leaves.setdefault(file, set()).add(failure.leaf)
                first.setdefault(file, failure)
        for file, names in leaves.items():
            path = f"{self._item}/{file}"
            finding = damaged.get(path)
            if finding is None:
                problem, expected, got = first[file].difference
                finding = Finding(
                    item=self._item, file=path, problem=problem, expected=expected, got=got
                )
            damaged[path] = dataclasses.replace(finding, leaves=tuple(sorted(names)))


# ------------------------------------------------------------------------------------ comparisons


def _is_small(array: spec.ArraySpec, grid: ChunkGrid, index: tuple[int, ...]) -> bool:
    size_bytes = grid.box(index).num_elements * array.itemsize_bytes
    return size_bytes <= _SMALL_BYTES and not grid.is_padded(index)


def _metadata(name: str, array: spec.ArraySpec, chunk_shape: tuple[int, ...]) -> _Value:
    key = f"{structure.key_prefix(name)}zarr.json"
    return _Value(name, key, functools.partial(_compare_metadata, array, chunk_shape))


def _compare_metadata(
    array: spec.ArraySpec, chunk_shape: tuple[int, ...], value: bytes | None
) -> Difference | None:
    """What Orbax reads of an array must say what our record says."""
    if value is None:
        return ("missing", "the array's zarr.json", "nothing")
    try:
        record: Any = json.loads(value)
        found = {field: record[field] for field in _METADATA_FIELDS}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return ("unreadable", "the array's zarr.json", f"{type(error).__name__}: {error}")
    wanted = orbax_format.zarr3_metadata(array, chunk_shape)
    for field, got in found.items():
        if got != wanted[field]:
            return ("mismatch", f"{field} {wanted[field]} in zarr.json", f"{got!r:.80}")
    return None


def _compare_number(
    array: spec.ArraySpec, number: object, value: bytes | None
) -> Difference | None:
    """A plain number is in our record; the copy that Orbax reads must be the same."""
    import numpy as np

    if value == np.array(number, spec.numpy_dtype(array.dtype)).tobytes():
        return None
    got = "nothing" if value is None else f"the bytes {value[:16].hex()}"
    return ("mismatch", f"the number {number!r}", got)


def _compare_chunk(
    array: spec.ArraySpec,
    grid: ChunkGrid,
    index: tuple[int, ...],
    digests: str,
    value: bytes | None,
) -> Difference | None:
    from functional_ckpt.core.chunks import DIGEST_BLOCK_BYTES

    if value is None:
        return ("missing", f"chunk {grid.key(index)}", "nothing")
    size_bytes = grid.box(index).num_elements * array.itemsize_bytes
    if len(value) != size_bytes:
        return ("mismatch", f"a chunk of {size_bytes:,} bytes", f"{len(value):,} bytes")
    offsets = digest_offsets(grid, array.itemsize_bytes)
    place = grid.position(index)
    expected = digests[16 * offsets[place] : 16 * offsets[place + 1]]
    got = "".join(
        manifest.digest_hex(value[start : start + DIGEST_BLOCK_BYTES])
        for start in range(0, len(value), DIGEST_BLOCK_BYTES)
    )
    return None if got == expected else ("mismatch", f"digest {expected}", f"digest {got}")
