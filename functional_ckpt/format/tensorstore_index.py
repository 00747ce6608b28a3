"""Nodes and values of an index that only TensorStore reads: compressed nodes, object stores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import tensorstore as ts

from functional_ckpt import errors
from functional_ckpt.core.records.orbax import MANIFEST
from functional_ckpt.format.database import (
    REFUSALS,
    Database,
    open_files_for_reading,
    read_error,
)
from functional_ckpt.format.node_tree import Fetch
from functional_ckpt.format.ocdbt import Root, Span
from functional_ckpt.format.ocdbt_decode import (
    DecodedNode,
    dump_location,
    from_dump,
    root_of_dump,
)
from functional_ckpt.format.step_files import truncated
from functional_ckpt.storage.base import Storage


def dumped(storage: Storage, directory: str) -> tuple[Root | None, Fetch]:
    """Returns the root of an index whose nodes TensorStore wrote, and a reader of its nodes."""
    database = open_files_for_reading(directory, storage)
    return _dumped_root(database), _dumped(database)


def _dumped_root(database: Database) -> Root | None:
    try:
        return root_of_dump(ts.ocdbt.dump(database.store).result())
    except (*REFUSALS, IndexError) as error:
        raise read_error(database, MANIFEST, error) from error


def _dumped(database: Database) -> Fetch:
    """Returns a reader of nodes that TensorStore wrote."""

    def fetch(spans: Sequence[Span]) -> list[DecodedNode | Exception]:
        dumps = [ts.ocdbt.dump(database.store, dump_location(span)) for span in spans]
        return [_undump(database, span, dump) for span, dump in zip(spans, dumps, strict=True)]

    return fetch


def _undump(database: Database, span: Span, dump: Any) -> DecodedNode | Exception:
    try:
        return from_dump(dump.result())
    except REFUSALS as error:
        return read_error(database, f"the index node at byte {span.offset} of {span.file!r}", error)


def read_spans(
    database: Database,
) -> Callable[[Sequence[Span]], list[bytes | errors.CheckpointError]]:
    """Returns a reader of parts of data files: of many at a time."""

    def read(spans: Sequence[Span]) -> list[bytes | errors.CheckpointError]:
        futures = [
            database.store.read(span.file, byte_range=slice(span.offset, span.offset + span.length))
            for span in spans
        ]
        return [
            _read_remote(database, span, future)
            for span, future in zip(spans, futures, strict=True)
        ]

    return read


def _read_remote(database: Database, span: Span, future: Any) -> bytes | errors.CheckpointError:
    try:
        result = future.result()
    except REFUSALS as error:
        return read_error(database, repr(span.file), error)
    path = os.path.join(database.directory, span.file)
    if result.state != "value":
        return errors.CorruptCheckpointError(f"{path}: the file is missing.", path=path)
    return (
        result.value
        if len(result.value) == span.length
        else truncated(path, span.offset, span.length)
    )
