"""Verification of an item's arrays: all its database holds, under every name, as readers get it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from functional_ckpt import errors
from functional_ckpt.core.arrays import spec
from functional_ckpt.core.arrays.chunks import ChunkGrid, digest_offsets
from functional_ckpt.core.arrays.digests import Digests
from functional_ckpt.core.records import orbax, records
from functional_ckpt.core.tree import plain_json, structure
from functional_ckpt.format.digest_table import ItemDigests
from functional_ckpt.format.read_plan import Location, ReadRequest
from functional_ckpt.runtime.threads import gc_paused
from functional_ckpt.storage import queries
from functional_ckpt.verify import headers
from functional_ckpt.verify.findings import Finding, Problem, Verification, reason

if TYPE_CHECKING:
    from functional_ckpt.format.index import Index
    from functional_ckpt.format.reader import ArrayReader

# Values up to this size are read many at a time, adjacent ones at once.
_SMALL_BYTES = 128 * 1024
_MAX_VALUE_BYTES = 8 * 2**20
_BATCH = 512
_METADATA_FIELDS = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs")

_Difference: TypeAlias = tuple[Problem, str, str]
"""Problem, expected, got."""
_Check: TypeAlias = "Callable[[bytes | None], _Difference | None]"
"""Compares the value of a key, None where there is none."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    """A value of the database that differs from the written one."""

    leaf: str
    key: str | None
    """None where it is all of the database."""
    difference: _Difference


class _Value(NamedTuple):
    """A value to be read and compared."""

    leaf: str
    key: str
    check: _Check
    size_bytes: int = 0
    """Bytes that count as progress."""


_Alike: TypeAlias = Sequence[_Value]
"""Values with one location and one check."""


class ItemArrays:
    """The arrays of one item, compared with its record."""

    def __init__(self, search: Verification, item: str, record: records.ItemRecord) -> None:
        self.size_bytes = 0
        self._search = search
        self._item = item
        self._record = record
        self._directory = os.path.join(search.path, item)
        self._failures: list[_Failure] = []
        self._fallback_file = orbax.MANIFEST  # of failures without a key
        self._headers: list[tuple[str, Problem, str, str]] = []
        self._texts = ItemDigests(search.storage, self._directory, record)
        self._index: Index | None = None
        self._nodes = list(structure.iter_arrays(record.root))
        self._scalars = list(orbax.scalar_leaves(record.root))
        if self._check_sizes():
            self.size_bytes = sum(node.spec.size_bytes for node in self._nodes)
        else:
            self._nodes, self._scalars = [], []

    def _check_sizes(self) -> bool:
        """Limits the memory for a record to the bytes of its files."""
        wanted = self._record.least_bytes
        stored = sum(file.size_bytes for file in self._record.files.values())
        if wanted <= stored:
            return True
        self._search.add(
            self._item,
            f"{self._item}/{records.EXTENSION_FILE}",
            "record",
            f"files for {wanted:,} bytes of arrays",
            f"files of {stored:,} bytes",
        )
        return False

    def tasks(self, files: contextlib.ExitStack) -> list[Callable[[], None]]:
        """Returns the tasks, for any thread; nothing is raised.

        Args:
            files: Closed by the caller after the last task.
        """
        if not self._nodes and not self._scalars:
            return []
        from functional_ckpt.format import backends
        from functional_ckpt.format.index import open_index

        try:
            blocking = [name for name in self._record.files if self._would_block(name)]
            if blocking:
                self._fail_all(blocking[0], "it cannot be read safely")
                return []
            index = open_index(self._search.storage, self._directory, skips_damage=True)
        except (errors.CorruptCheckpointError, errors.StorageError) as error:
            self._fail_all(orbax.MANIFEST, reason(error, self._directory))
            return []
        with gc_paused():
            own = [(node, self._digests(node)) for node in self._nodes]
            values = [*self._numbers(), *_small_values(own)]
            large = list(_large_chunks(own))
            index.load([value.key.encode() for value in values])
            index.load([_key(request, key) for request, key in large])
            self._index = index
            found = self._found(index, values)
        reader = backends.reader_of(self._search.storage, index)
        files.callback(reader.close)
        batches = [found[start : start + _BATCH] for start in range(0, len(found), _BATCH)]
        return [
            functools.partial(self._check_headers, index, own),
            *(functools.partial(self._check_values, batch) for batch in batches),
            *(functools.partial(self._check_chunk, reader, *chunk) for chunk in large),
        ]

    def _would_block(self, name: str) -> bool:
        """Returns whether a file is a pipe or a device, on which TensorStore would block."""
        path = os.path.join(self._directory, name)
        return queries.kind(self._search.storage, path, follow=True) == "a special file"

    def _fail_all(self, file: str, why: str) -> None:
        names = (*(node.name for node in self._nodes), *(name for name, _, _ in self._scalars))
        difference: _Difference = ("unreadable", "a database", why)
        self._failures += [_Failure(name, None, difference) for name in names]
        self._fallback_file = file

    def _check_headers(
        self, index: Index, own: Sequence[tuple[structure.ArrayNode, Digests]]
    ) -> None:
        """Compares the headers of files of tensors with the index."""
        listed = self._record.files.items()
        files = {name: file.size_bytes for name, file in listed if name.endswith(".safetensors")}
        grids = {n.name: (n.spec, digests.grid) for n, digests in own if n.tied_to is None}
        storage, directory = self._search.storage, self._directory
        with gc_paused():
            self._headers += headers.problems(storage, directory, files, grids, index)

    # ---------------------------------------------------------------------------- small values

    def _numbers(self) -> Iterator[_Value]:
        for name, array, value in self._scalars:
            prefix = structure.key_prefix(name)
            yield _Value(name, f"{prefix}zarr.json", _metadata(array, array.shape))
            check = functools.partial(_compare_number, array, value)
            yield _Value(name, prefix + orbax.only_chunk(array), check)

    def _found(self, index: Index, values: Sequence[_Value]) -> list[_Alike]:
        """Returns values in the order of their locations; those that the index lacks fail."""
        found: dict[tuple[Location, _Check], list[_Value]] = {}
        for value in values:
            location = index.locations.get(value.key.encode())
            if location is None:
                self._miss(index, value)
            else:
                found.setdefault((location, value.check), []).append(value)
        return [found[key] for key in sorted(found, key=operator.itemgetter(0))]

    def _miss(self, index: Index, value: _Value) -> None:
        damage = index.damage_of(value.key.encode())
        why = (
            value.check(None)
            if damage is None
            else _unreadable("the written value", damage.error, self._directory)
        )
        if why is not None:
            self._failures.append(_Failure(value.leaf, value.key, why))
        self._search.advance(value.size_bytes)

    def _check_values(self, values: Sequence[_Alike]) -> None:
        index = cast("Index", self._index)
        keys = [alike[0].key.encode() for alike in values]
        found = index.read_values(keys, _MAX_VALUE_BYTES)
        for alike, key in zip(values, keys, strict=True):
            got = found[key]
            if isinstance(got, errors.CheckpointError):
                why = _unreadable("the written value", got, self._directory)
            else:
                why = self._compare(alike[0], got)
            if why is not None:
                self._failures += [_Failure(value.leaf, value.key, why) for value in alike]
        self._search.advance(sum([value.size_bytes for alike in values for value in alike]))

    def _compare(self, value: _Value, got: bytes) -> _Difference | None:
        try:
            return value.check(got)
        except errors.CheckpointError as error:  # a digest cannot be read
            return _unreadable("the recorded digest", error, self._directory)

    # ---------------------------------------------------------------------------- large chunks

    def _check_chunk(self, reader: ArrayReader, request: ReadRequest, key: str) -> None:
        try:
            for task in reader.tasks([request]):
                task()
        except (errors.CheckpointError, MemoryError, ValueError) as error:
            why = reason(error, self._directory)
            self._failures.append(
                _Failure(
                    request.name,
                    _key(request, key).decode(),
                    ("mismatch", "the bytes that were written", why),
                )
            )
        self._search.advance(request.box.num_elements * request.spec.itemsize_bytes)

    def _digests(self, node: structure.ArrayNode) -> Digests:
        array = self._record.arrays[node.stored_name]
        grid = _grid(node.spec.shape, array.chunk_shape, self._record.block_bytes)
        return Digests(grid, node.spec.itemsize_bytes, self._texts.of(node.stored_name))

    # ---------------------------------------------------------------------------- blame

    def attribute_failures(self, damaged: dict[str, Finding]) -> None:
        """Attributes array failures to damaged files.

        Args:
            damaged: Finding of each damaged file, by path in the checkpoint; unexplained failures
                are added to it.
        """
        for file, problem, expected, got in self._headers:
            path = f"{self._item}/{file}"
            if path not in damaged and not self._failures:
                damaged[path] = Finding(
                    item=self._item, file=path, problem=problem, expected=expected, got=got
                )
        if not self._failures:
            return
        leaves: dict[str, set[str]] = {}
        first: dict[str, _Failure] = {}
        for failure in self._failures:
            suspects = self._candidate_files(failure)
            guilty = [file for file in suspects if f"{self._item}/{file}" in damaged]
            for file in guilty or suspects[:1]:
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

    def _candidate_files(self, failure: _Failure) -> list[str]:
        """Returns the files that may be the cause."""
        index = self._index
        if failure.key is None or index is None:
            return [self._fallback_file]
        key = failure.key.encode()
        if key in index.locations:
            file = index.file_of(key)
        else:
            damage = index.damage_of(key)
            file = orbax.MANIFEST if damage is None else damage.file
        # The manifest of another item or step leads to bytes that are not a node or the value.
        others = [] if self._record.table is None else [self._record.table.file]
        return [file if file in self._record.files else orbax.MANIFEST, orbax.MANIFEST, *others]


def _unreadable(expected: str, error: errors.CheckpointError, directory: str) -> _Difference:
    return ("unreadable", expected, reason(error, directory))


# ------------------------------------------------------------------------------------ comparisons


class _Chunk(NamedTuple):
    chunk: tuple[int, ...]
    key: str
    size_bytes: int
    first_block: int
    is_small: bool


_grid = functools.lru_cache(maxsize=1024)(ChunkGrid)  # arrays that are alike have the same


@functools.lru_cache(maxsize=1024)
def _chunks(grid: ChunkGrid, itemsize_bytes: int) -> Sequence[_Chunk]:
    chunks: list[_Chunk] = []
    blocks = digest_offsets(grid, itemsize_bytes)
    for index, first_block in zip(grid.indices(), blocks, strict=False):
        size_bytes = grid.box(index).num_elements * itemsize_bytes
        is_small = size_bytes <= _SMALL_BYTES and not grid.is_padded(index)
        chunks.append(_Chunk(index, grid.key(index), size_bytes, first_block, is_small))
    return chunks


def _small_values(own: Sequence[tuple[structure.ArrayNode, Digests]]) -> Iterator[_Value]:
    for node, digests in own:
        prefix = structure.key_prefix(node.name)
        check = _metadata(node.spec, digests.grid.chunk_shape)
        yield _Value(node.name, f"{prefix}zarr.json", check)
        for chunk in _chunks(digests.grid, digests.itemsize_bytes):
            if chunk.is_small:
                check = functools.partial(_compare_chunk, digests, chunk)
                yield _Value(node.name, prefix + chunk.key, check, chunk.size_bytes)


def _large_chunks(
    own: Sequence[tuple[structure.ArrayNode, Digests]],
) -> Iterator[tuple[ReadRequest, str]]:
    for node, digests in own:
        for chunk in _chunks(digests.grid, digests.itemsize_bytes):
            if not chunk.is_small:
                # Under its own name, not its owner's: a tied leaf must resolve to the same bytes.
                box = digests.grid.box(chunk.chunk)
                yield ReadRequest(node.name, node.spec, box, digests.grid, digests), chunk.key


def _key(request: ReadRequest, chunk: str) -> bytes:
    return (structure.key_prefix(request.name) + chunk).encode()


@functools.lru_cache(maxsize=1024)
def _metadata(array: spec.ArraySpec, chunk_shape: tuple[int, ...]) -> _Check:
    """Returns the comparison of an array's metadata; arrays that are alike have the same."""
    return functools.partial(_compare_metadata, array, chunk_shape)


def _compare_metadata(
    array: spec.ArraySpec, chunk_shape: tuple[int, ...], value: bytes | None
) -> _Difference | None:
    """Checks that Orbax's metadata of an array agrees with the native record."""
    if value is None:
        return ("missing", "the array's zarr.json", "nothing")
    try:
        record: Any = plain_json.parse(value)
        found = {field: record[field] for field in _METADATA_FIELDS}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return ("unreadable", "the array's zarr.json", f"{type(error).__name__}: {error}")
    wanted = orbax.zarr3_metadata(array, chunk_shape)
    for field, got in found.items():
        if got != wanted[field]:
            return ("mismatch", f"{field} {wanted[field]} in zarr.json", f"{got!r:.80}")
    return None


def _compare_number(
    array: spec.ArraySpec, number: object, value: bytes | None
) -> _Difference | None:
    """Compares a plain number of the record with the copy that Orbax reads."""
    import numpy as np

    if value == np.array(number, spec.numpy_dtype(array.dtype)).tobytes():
        return None
    got = "nothing" if value is None else f"the bytes {value[:16].hex()}"
    return ("mismatch", f"the number {number!r}", got)


def _compare_chunk(digests: Digests, chunk: _Chunk, value: bytes | None) -> _Difference | None:
    if value is None:
        return ("missing", f"chunk {chunk.key}", "nothing")
    if len(value) != chunk.size_bytes:
        return ("mismatch", f"a chunk of {chunk.size_bytes:,} bytes", f"{len(value):,} bytes")
    wrong = digests.check(chunk.first_block, value)
    return wrong and ("mismatch", f"digest {wrong.expected}", f"digest {wrong.got}")
