"""A checkpoint directory as it is read: its records, its items and their arrays. Free of torch.

TensorStore is imported when the first array is touched: what the records say can be had without it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from functional_ckpt import errors
from functional_ckpt.core.arrays import chunks
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.core.records import orbax, records
from functional_ckpt.core.tree import plain_json, structure
from functional_ckpt.policies.progress import Progress
from functional_ckpt.storage.base import Storage

if TYPE_CHECKING:
    from functional_ckpt.format import database as database_lib
    from functional_ckpt.format import read_tensorstore

__all__ = [
    "JSON_FILE",
    "PROGRESS_ITEM",
    "ArrayPlace",
    "OpenCheckpoint",
    "OpenItem",
    "open_checkpoint",
]

JSON_FILE = "metadata"
# Where a step says how far the training was: a JSON item to Orbax.
PROGRESS_ITEM = "progress"
_IGNORED = ("metrics", "descriptor", "array_metadatas")
# The item of a directory that is an item itself, as Orbax's checkpointers write it.
_BARE_ITEM = "default"


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayPlace:
    """How an array of ours is cut and what its bytes must be.

    Attributes:
        grid: Its chunks.
        digests: 16 hex digits per digest block.
    """

    grid: chunks.ChunkGrid
    digests: str


class OpenItem:
    """One tree item of a checkpoint, ours or Orbax's.

    Attributes:
        path: Its directory.
        name: Its name.
        root: Its structure.
        record: Our record; None when another program wrote the item.
        is_zarr3: Whether its arrays are of zarr version 3, or 2.
        fills_missing: Whether chunks that are not there are zeros, and no damage.
    """

    def __init__(self, storage: Storage, path: str, name: str | None) -> None:
        self.storage = storage
        self.path = path
        self.name = name or _BARE_ITEM
        self.record: records.ItemRecord | None = None
        self.is_zarr3 = True
        self.fills_missing = False
        extension = os.path.join(path, records.EXTENSION_FILE)
        if storage.exists(extension):
            self.record = records.parse_item(storage.read(extension), extension)
            self.root = self.record.root
            if name is not None and self.record.item != name:
                raise errors.CorruptCheckpointError(
                    f"{extension}: written as item {self.record.item!r}, found as {name!r}; the "
                    "directories were swapped or renamed.",
                    path=extension,
                )
            self._check_sizes()
        else:
            self.root = self._parse_foreign()

    @functools.cached_property
    def database(self) -> database_lib.Database:
        """The item's arrays, opened when first needed."""
        from functional_ckpt.format import database as database_lib

        if self.record is None and not self._foreign_metadata.get("use_ocdbt", True):
            return database_lib.open_files_for_reading(self.path, self.storage)
        return database_lib.open_for_reading(self.path, self.storage)

    def record_of(self, node: structure.ArrayNode) -> ArrayPlace | None:
        """Grid and digests of an array; None when another program wrote it."""
        if self.record is None:
            return None
        array = self.record.arrays[node.stored_name]
        return ArrayPlace(chunks.ChunkGrid(node.spec.shape, array.chunk_shape), array.xxh3)

    def array_nodes(self) -> Iterator[structure.ArrayNode]:
        """Every array that holds its own bytes."""
        for _, leaf in structure.iter_leaves(self.root):
            if isinstance(leaf, structure.ArrayNode) and leaf.tied_to is None:
                yield leaf

    def verification(self, node: structure.ArrayNode) -> list[Callable[[], None]]:
        """Tasks that read every chunk of an array; they raise `CorruptCheckpointError`."""
        place = self.record_of(node)
        if place is None:
            return []
        from functional_ckpt.format import read_tensorstore

        read = read_tensorstore.ArrayRead(
            name=node.stored_name,
            spec=node.spec,
            grid=place.grid,
            digests=place.digests,
            box=Box.whole(node.spec.shape),
        )
        return [functools.partial(self._verify_part, read, index) for index in place.grid.indices()]

    def _verify_part(self, read: read_tensorstore.ArrayRead, index: tuple[int, ...]) -> None:
        from functional_ckpt.format import read_tensorstore

        read_tensorstore.verify_part(
            self.database, read, index
        )  # opens the database when first needed

    def _check_sizes(self) -> None:
        """A record cannot ask for more memory than there are bytes on disk (uncompressed).

        Small chunks may be compressed, but each has a digest in the record, which bounds them.
        """
        database_lib = {} if self.record is None else self.record.arrays
        wanted = sum(
            _stored_bytes(node.spec, database_lib[node.name].chunk_shape)
            for node in self.array_nodes()
        )
        stored = self.storage.total_bytes(self.path)
        if wanted > stored:
            raise errors.CorruptCheckpointError(
                f"{self.path}: its record describes {wanted} bytes of arrays, but its files hold "
                f"{stored}.",
                path=self.path,
            )

    # ---------------------------------------------------------------------------- Orbax's own items

    @functools.cached_property
    def _foreign_metadata(self) -> Mapping[str, Any]:
        path = os.path.join(self.path, orbax.TREE_METADATA_FILE)
        if not self.storage.exists(path):
            raise errors.CorruptCheckpointError(
                f"{self.path}: neither {records.EXTENSION_FILE} nor "
                f"{orbax.TREE_METADATA_FILE} is there; this is not a tree item.",
                path=self.path,
            )
        return _load_json(self.storage, path)

    def _parse_foreign(self) -> structure.Node:
        from functional_ckpt.format import read_tensorstore

        path = os.path.join(self.path, orbax.TREE_METADATA_FILE)
        self.is_zarr3 = bool(self._foreign_metadata.get("use_zarr3", False))
        # Old versions of Orbax left chunks of zeros out; since then a missing chunk is lost.
        stores_zeros = self._foreign_metadata.get("store_array_data_equal_to_fill_value", False)
        self.fills_missing = not stores_zeros
        strings = os.path.join(self.path, orbax.STRINGS_FILE)
        texts = _load_json(self.storage, strings) if self.storage.exists(strings) else {}
        return orbax.parse_tree(
            self.storage.read(path),
            path,
            spec_of=lambda name: read_tensorstore.stored_spec(
                self.database, name, is_zarr3=self.is_zarr3
            )[0],
            texts=cast("Mapping[str, str]", texts),
        )


@functools.lru_cache(maxsize=4096)
def _stored_bytes(spec: ArraySpec, chunk_shape: tuple[int, ...]) -> int:
    """Bytes that an array takes on disk for certain: small chunks may be compressed."""
    chunk_bytes = math.prod(chunk_shape) * spec.itemsize_bytes
    return spec.size_bytes if chunk_bytes > chunks.MAX_INLINE_BYTES else 0


def _load_json(storage: Storage, path: str) -> Mapping[str, Any]:
    try:
        record = plain_json.parse(storage.read(path))
    except (ValueError, RecursionError) as error:
        raise errors.CorruptCheckpointError(f"{path}: not JSON ({error}).", path=path) from error
    if not isinstance(record, dict):
        raise errors.CorruptCheckpointError(f"{path}: not a JSON object.", path=path)
    return cast("dict[str, Any]", record)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpenCheckpoint:
    """A checkpoint directory.

    Attributes:
        storage: Where it is.
        path: Its directory.
        step: Its step, where it has one.
        items: Name of each item -> its format, `tree` or `json`.
        record: Our record; None when another program wrote it.
        metadata: Orbax's `_CHECKPOINT_METADATA`; empty where there is none.
        is_bare: Whether the directory is itself its one item.
    """

    storage: Storage
    path: str
    step: int | None
    items: Mapping[str, str]
    record: records.StepRecord | None
    metadata: Mapping[str, Any]
    is_bare: bool = False

    def tree(self, name: str) -> OpenItem:
        """Opens a tree item."""
        if self.is_bare:
            return OpenItem(self.storage, self.path, None)
        self._check_small_file(f"{name}/{records.EXTENSION_FILE}")
        return OpenItem(self.storage, os.path.join(self.path, name), name)

    def json(self, name: str) -> Any:
        """The value of a JSON item."""
        self._check_small_file(f"{name}/{JSON_FILE}")
        path = os.path.join(self.path, name, JSON_FILE)
        try:
            return plain_json.parse(self.storage.read(path))
        except (ValueError, RecursionError) as error:
            raise errors.CorruptCheckpointError(
                f"{path}: not JSON ({error}).", path=path
            ) from error

    @property
    def metrics(self) -> Mapping[str, Any] | None:
        """The metrics saved with the step; None where there are none."""
        path = os.path.join(self.path, "metrics", "metrics")
        if not self.storage.exists(path):
            return None
        self._check_small_file("metrics/metrics")
        return _load_json(self.storage, path)

    @property
    def progress(self) -> Progress | None:
        """How far the training was; None where the step does not say."""
        file = f"{PROGRESS_ITEM}/{JSON_FILE}"
        if self.record is None or file not in self.record.files or PROGRESS_ITEM in self.items:
            return None
        try:
            return Progress.from_json(self.json(PROGRESS_ITEM))
        except errors.UsageError as error:
            path = os.path.join(self.path, file)
            raise errors.CorruptCheckpointError(f"{path}: {error}.", path=path) from error

    def _check_small_file(self, name: str) -> None:
        """What our record says of a file must hold before anything in it is believed."""
        if self.record is None:
            return
        path = os.path.join(self.path, name)
        expected = self.record.files.get(name)
        if expected is None or not self.storage.exists(path):
            raise errors.CorruptCheckpointError(f"{path}: the file is missing.", path=path)
        if (got := self.storage.checksum(path)) != expected:
            raise errors.CorruptCheckpointError(
                f"{path}: expected {expected.size_bytes} bytes with digest {expected.xxh3}, got "
                f"{got.size_bytes} with {got.xxh3}; the file was changed or swapped.",
                path=path,
                step=self.step,
            )


def open_checkpoint(storage: Storage, path: str, step: int | None = None) -> OpenCheckpoint:
    """Opens a checkpoint directory for reading.

    A directory that is one tree item, ours or Orbax's, is a checkpoint of one item, `default`.

    Raises:
        StepNotFoundError: There is no directory.
        CorruptCheckpointError: It is not a checkpoint, or its records were changed.
    """
    if not storage.is_directory(path):
        raise errors.StepNotFoundError(f"There is no checkpoint at {path}.", path=path, step=step)
    if not storage.is_committed(path) and not storage.is_committed(os.path.dirname(path)):
        raise errors.StepNotFoundError(
            f"{path} was not written to its end: {orbax.COMMIT_FILE} is missing.",
            path=path,
            step=step,
        )
    extension = os.path.join(path, records.EXTENSION_FILE)
    metadata_path = os.path.join(path, orbax.CHECKPOINT_METADATA_FILE)
    metadata = _load_json(storage, metadata_path) if storage.exists(metadata_path) else {}
    if storage.exists(os.path.join(path, orbax.TREE_METADATA_FILE)):
        return OpenCheckpoint(
            storage=storage,
            path=path,
            step=step,
            items={_BARE_ITEM: "tree"},
            record=None,
            metadata=metadata,
            is_bare=True,
        )
    record = None
    if storage.exists(extension):
        record = records.parse_step(storage.read(extension), extension)
        items: Mapping[str, str] = record.items
        if step is not None and record.step != step:
            raise errors.CorruptCheckpointError(
                f"{path}: written as step {record.step}, found as step {step}; the directories "
                "were swapped or renamed.",
                path=path,
                step=step,
            )
        step = record.step
    else:
        items = _find_items(storage, path)
        _check_foreign(storage, path, items, step)
    checkpoint = OpenCheckpoint(
        storage=storage, path=path, step=step, items=items, record=record, metadata=metadata
    )
    if record is not None:
        checkpoint._check_small_file(orbax.CHECKPOINT_METADATA_FILE)
    if not items:
        raise errors.CorruptCheckpointError(
            f"{path}: not a checkpoint: it holds no item that this package or Orbax wrote.",
            path=path,
            step=step,
        )
    return checkpoint


def _check_foreign(storage: Storage, path: str, items: Mapping[str, str], step: int | None) -> None:
    """Without this a checkpoint of ours that lost its record would be read with less verified."""
    for name in items:
        if storage.exists(os.path.join(path, name, records.EXTENSION_FILE)):
            raise errors.CorruptCheckpointError(
                f"{os.path.join(path, records.EXTENSION_FILE)}: the file is missing, though item "
                f"{name!r} was written by this package. To read that item alone, give its own "
                "directory.",
                path=os.path.join(path, records.EXTENSION_FILE),
                step=step,
            )


def _find_items(storage: Storage, path: str) -> dict[str, str]:
    """The items of a checkpoint that Orbax wrote: directories with one of its metadata files."""
    found: dict[str, str] = {}
    for name in storage.list(path):
        folder = os.path.join(path, name)
        if name in _IGNORED or name.startswith(("_", ".")) or not storage.is_directory(folder):
            continue
        if storage.exists(os.path.join(folder, orbax.TREE_METADATA_FILE)):
            found[name] = "tree"
        elif storage.exists(os.path.join(folder, JSON_FILE)):
            found[name] = "json"
    return found
