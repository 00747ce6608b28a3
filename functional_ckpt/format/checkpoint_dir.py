"""A checkpoint directory as it is read: its records, its items and their arrays. Free of torch.

TensorStore is imported on the first array access; records are read without it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from functional_ckpt import errors
from functional_ckpt.core.arrays import chunks
from functional_ckpt.core.arrays.digests import Digests
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.nodes import part
from functional_ckpt.core.records import orbax, records
from functional_ckpt.core.records.records import parse_object
from functional_ckpt.core.tree import structure
from functional_ckpt.format.digest_table import ItemDigests
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.format.step_files import JSON_FILE, StepFiles
from functional_ckpt.policies.progress import Progress
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.base import Storage

if TYPE_CHECKING:
    from functional_ckpt.format.database import Database
    from functional_ckpt.format.reader import ArrayReader

RECORD_FILES = (
    records.EXTENSION_FILE,
    orbax.CHECKPOINT_METADATA_FILE,
    orbax.TREE_METADATA_FILE,
    orbax.COMMIT_FILE,
)
"""One of these is in every checkpoint, native or Orbax's."""

_IGNORED = ("metrics", "descriptor", "array_metadatas")
# The item of a directory that is an item itself, as Orbax's checkpointers write it.
_BARE_ITEM = "default"
# How often a checkpoint is opened that is overwritten each time.
_MAX_ATTEMPTS = 4


class OpenItem:
    """One tree item of a checkpoint, native or Orbax's.

    Attributes:
        path: Its directory.
        name: Its name.
        root: Its structure.
        record: Its record; None for a foreign item.
        is_zarr3: Whether its arrays are of zarr version 3, or 2.
        fills_missing: Whether chunks that are not there are zeros, and no damage.
    """

    def __init__(
        self, storage: Storage, path: str, name: str | None, record: bytes | None = None
    ) -> None:
        self.storage = storage
        self.path = path
        self.name = name or _BARE_ITEM
        self.record: records.ItemRecord | None = None
        self.is_zarr3 = True
        self.fills_missing = False
        # Before TensorStore opens anything: it would wait for a pipe and follow a link.
        sizes = queries.regular_sizes(storage, path)
        extension = os.path.join(path, records.EXTENSION_FILE)
        data = queries.read_optional(storage, extension) if record is None else record
        if data is not None:
            self.record = records.parse_item(data, extension)
            self.root = self.record.root
            if name is not None and self.record.item != name:
                raise errors.CorruptCheckpointError(
                    f"{extension}: written as item {self.record.item!r}, found as {name!r}; the "
                    "directories were swapped or renamed.",
                    path=extension,
                )
            self._check_sizes(self.record, sizes)
        else:
            self.root = self._parse_foreign()

    def open_reader(self) -> ArrayReader:
        """Opens the item's arrays; the caller closes the reader."""
        if self.record is not None:
            from functional_ckpt.format import backends

            return backends.open_reader(self.storage, self.path, self.record.files)
        from functional_ckpt.format.read_tensorstore import TensorStoreReader

        return TensorStoreReader(
            self._foreign_database, is_zarr3=self.is_zarr3, fills_missing=self.fills_missing
        )

    def request(
        self,
        node: structure.ArrayNode,
        box: Box | None = None,
        destination: Destination | None = None,
        *,
        verified: bool = True,
    ) -> ReadRequest:
        """Returns a request to read a region of an array.

        Args:
            node: The array.
            box: The region; None for the entire array.
            destination: Where it goes; None reads every chunk that the region meets and keeps
                nothing.
            verified: Whether bytes are compared with their digests, where there are some.
        """
        spec = node.spec
        region = _whole(spec.shape) if box is None else box
        if self.record is None:
            return ReadRequest(node.name, spec, region, destination=destination)
        name = node.stored_name
        grid = _grid(spec.shape, self.record.arrays[name].chunk_shape, self.record.block_bytes)
        digests = None
        if verified:
            digests = Digests(grid, spec.itemsize_bytes, self._digests.of(name))
        return ReadRequest(name, spec, region, grid, digests, destination)

    def has_rows(self, node: structure.ArrayNode) -> bool:
        """Returns whether each chunk of an array is consecutive rows of it."""
        if self.record is None:
            return False
        return self.record.arrays[node.stored_name].chunk_shape[1:] == node.spec.shape[1:]

    @functools.cached_property
    def _digests(self) -> ItemDigests:
        if self.record is None:
            raise RuntimeError("a foreign item has no digests")
        return ItemDigests(self.storage, self.path, self.record)

    def digests(self, node: structure.ArrayNode) -> Digests | None:
        """Returns the recorded digests of an array; None for a foreign array."""
        return self.request(node).digests

    def array_nodes(self) -> Iterator[structure.ArrayNode]:
        """Returns every array that holds its own bytes."""
        return (node for node in structure.iter_arrays(self.root) if node.tied_to is None)

    def _check_sizes(self, record: records.ItemRecord, sizes: Mapping[str, int] | None) -> None:
        """Limits the memory for a record to the bytes on disk."""
        wanted = record.least_bytes
        stored = (
            queries.total_bytes(self.storage, self.path) if sizes is None else sum(sizes.values())
        )
        if wanted > stored + self._bytes_elsewhere(sizes or {}):
            raise errors.CorruptCheckpointError(
                f"{self.path}: its record describes {wanted} bytes of arrays, but its files hold "
                f"{stored}.",
                path=self.path,
            )

    def _bytes_elsewhere(self, sizes: Mapping[str, int]) -> int:
        """Returns the size of the files that other nodes hold, if this is a part of a step."""
        folder, item = os.path.split(self.path)
        file = os.path.join(folder, part.PART_FILE)
        if (data := queries.read_optional(self.storage, file)) is None:
            return 0
        known = part.parse(data, file).files.items()
        names = ((name.removeprefix(f"{item}/"), record.size_bytes) for name, record in known)
        return sum(
            size_bytes for name, size_bytes in names if "/" not in name and name not in sizes
        )

    # ---------------------------------------------------------------------------- foreign items

    @functools.cached_property
    def _foreign_database(self) -> Database:
        from functional_ckpt.format import database

        if self._foreign_metadata.get("use_ocdbt", True):
            return database.open_for_reading(self.path, self.storage)
        return database.open_files_for_reading(self.path, self.storage)

    @functools.cached_property
    def _foreign_text(self) -> bytes:
        data = queries.read_optional(
            self.storage, os.path.join(self.path, orbax.TREE_METADATA_FILE)
        )
        if data is None:
            raise errors.CorruptCheckpointError(
                f"{self.path}: neither {records.EXTENSION_FILE} nor "
                f"{orbax.TREE_METADATA_FILE} is there; this is not a tree item.",
                path=self.path,
            )
        return data

    @functools.cached_property
    def _foreign_metadata(self) -> Mapping[str, Any]:
        return parse_object(self._foreign_text, os.path.join(self.path, orbax.TREE_METADATA_FILE))

    def _parse_foreign(self) -> structure.Node:
        path = os.path.join(self.path, orbax.TREE_METADATA_FILE)
        self.is_zarr3 = bool(self._foreign_metadata.get("use_zarr3", False))
        # Old versions of Orbax left chunks of zeros out; since then a missing chunk is lost.
        stores_zeros = self._foreign_metadata.get("store_array_data_equal_to_fill_value", False)
        self.fills_missing = not stores_zeros
        strings = os.path.join(self.path, orbax.STRINGS_FILE)
        texts = queries.read_optional(self.storage, strings)
        return orbax.parse_tree(
            self._foreign_text,
            path,
            spec_of=self._stored_spec,
            texts=cast("Mapping[str, str]", {} if texts is None else parse_object(texts, strings)),
        )

    def _stored_spec(self, name: str) -> ArraySpec:
        """Returns the metadata of a foreign array; an error names the array."""
        from functional_ckpt.format import read_tensorstore

        try:
            return read_tensorstore.stored_spec(
                self._foreign_database, name, is_zarr3=self.is_zarr3
            )
        except errors.CorruptCheckpointError as error:
            raise errors.CorruptCheckpointError(
                error.message, path=error.path, key_path=error.key_path or name
            ) from error


# Records that many arrays share: making one takes five times as long as finding it here.
_whole = functools.lru_cache(maxsize=4096)(Box.whole)
_grid = functools.lru_cache(maxsize=4096)(chunks.ChunkGrid)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpenCheckpoint:
    """A checkpoint directory.

    Attributes:
        files: Its small files.
        items: Name of each item -> its format, `tree` or `json`.
        metadata: Orbax's `_CHECKPOINT_METADATA`; empty where there is none.
        is_bare: Whether the directory is itself its one item.
    """

    files: StepFiles
    items: Mapping[str, str]
    metadata: Mapping[str, Any]
    is_bare: bool = False

    @property
    def storage(self) -> Storage:
        """Where it is."""
        return self.files.storage

    @property
    def path(self) -> str:
        """Its directory."""
        return self.files.path

    @property
    def step(self) -> int | None:
        """Its step, where it has one."""
        return self.files.step

    @property
    def record(self) -> records.StepRecord | None:
        """The native record; None for a foreign checkpoint."""
        return self.files.record

    def tree(self, name: str) -> OpenItem:
        """Opens a tree item."""
        if self.is_bare:
            return OpenItem(self.storage, self.path, None)
        record = None
        if self.record is not None:
            record = self.files.read(f"{name}/{records.EXTENSION_FILE}")
        return OpenItem(self.storage, os.path.join(self.path, name), name, record)

    def json(self, name: str) -> Any:
        """Returns the value of a JSON item."""
        return self.files.json(name)

    @property
    def metrics(self) -> Mapping[str, Any] | None:
        """The metrics saved with the step; None where there are none."""
        return self.files.metrics

    @property
    def progress(self) -> Progress | None:
        """The progress of the training; None if it was not saved."""
        return None if self.record is None else self.files.progress

    @property
    def custom_metadata(self) -> Mapping[str, Any]:
        """The user's custom metadata."""
        return self.metadata.get("custom_metadata") or {}


def missing_item(
    path: str, name: str, items: Iterable[str], step: int | None = None, hint: str = ""
) -> errors.StepNotFoundError:
    """Returns the error for an item that a checkpoint does not hold."""
    return errors.StepNotFoundError(
        f"{path} has no item {name!r}; it has {', '.join(sorted(items))}.{hint}",
        step=step,
        path=path,
        key_path=name,
    )


def has_record(storage: Storage, path: str) -> bool:
    """Returns whether a directory is a checkpoint by its files, damaged or not."""
    return any(queries.exists(storage, os.path.join(path, name)) for name in RECORD_FILES)


def open_checkpoint(storage: Storage, path: str, step: int | None = None) -> OpenCheckpoint:
    """Opens a checkpoint directory for reading.

    A directory that is one tree item, native or Orbax's, is a checkpoint of one item, `default`.

    Raises:
        StepNotFoundError: There is no directory.
        CorruptCheckpointError: It is not a checkpoint, or its records were changed.
    """
    if not queries.is_directory(storage, path):
        raise errors.StepNotFoundError(f"There is no checkpoint at {path}.", path=path, step=step)
    if storage.objects is not None and not _is_marked(storage, path):
        raise errors.StepNotFoundError(
            f"{path} was not written to its end: {orbax.COMMIT_FILE} is missing.",
            path=path,
            step=step,
        )
    if queries.exists(storage, os.path.join(path, orbax.TREE_METADATA_FILE)):
        files = StepFiles.foreign(storage, path, step)
        return OpenCheckpoint(
            files=files, items={_BARE_ITEM: "tree"}, metadata=files.metadata, is_bare=True
        )
    for _ in range(_MAX_ATTEMPTS - 1):
        files = StepFiles.open(storage, path, step)
        try:
            return _open(files)
        except (errors.CorruptCheckpointError, errors.StorageError):
            if not files.is_replaced():
                raise
    return _open(StepFiles.open(storage, path, step))


def _is_marked(storage: Storage, path: str) -> bool:
    """Returns whether a checkpoint in an object store, or the one around an item, is complete."""
    parent = os.path.dirname(path)
    commits = commit.protocol(storage, parent)
    return commits.is_committed(path) or commits.is_committed(parent)


def _open(files: StepFiles) -> OpenCheckpoint:
    path, step = files.path, files.step
    if files.record is not None:
        items: Mapping[str, str] = files.record.items
    else:
        items = _find_items(files.storage, path)
        _check_foreign(files.storage, path, items, step)
    checkpoint = OpenCheckpoint(files=files, items=items, metadata=files.metadata)
    if not items:
        raise errors.CorruptCheckpointError(
            f"{path}: not a checkpoint: it holds no item that this package or Orbax wrote.",
            path=path,
            step=step,
        )
    return checkpoint


def _check_foreign(storage: Storage, path: str, items: Mapping[str, str], step: int | None) -> None:
    """Refuses native checkpoints without their record, which would be read less verified."""
    for name in items:
        if queries.exists(storage, os.path.join(path, name, records.EXTENSION_FILE)):
            raise errors.CorruptCheckpointError(
                f"{os.path.join(path, records.EXTENSION_FILE)}: the file is missing, though item "
                f"{name!r} was written by this package. To read that item alone, give its own "
                "directory.",
                path=os.path.join(path, records.EXTENSION_FILE),
                step=step,
            )


def _find_items(storage: Storage, path: str) -> dict[str, str]:
    """Returns the items of a checkpoint of Orbax: directories with one of its metadata files."""
    found: dict[str, str] = {}
    for name in storage.list(path):
        folder = os.path.join(path, name)
        if name in _IGNORED or name.startswith(("_", ".")):
            continue
        queries.check_ordinary(storage, folder)
        if not queries.is_directory(storage, folder):
            continue
        if queries.exists(storage, os.path.join(folder, orbax.TREE_METADATA_FILE)):
            found[name] = "tree"
        elif queries.exists(storage, os.path.join(folder, JSON_FILE)):
            found[name] = "json"
    return found
