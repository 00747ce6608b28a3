"""Files of weights in S3, put together of ranges of a step's objects: few bytes pass through here.

Free of torch. Bytes that the store copies are not read, and so not compared with their digests.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import Box, numpy_dtype
from functional_ckpt.core.files import part_plan
from functional_ckpt.core.files.part_plan import Made, Part, Run, Stored
from functional_ckpt.core.tree import structure
from functional_ckpt.format import checkpoint_dir, index
from functional_ckpt.format.ocdbt_decode import INLINE
from functional_ckpt.format.read_plan import ChunkRead, Destination
from functional_ckpt.format.reader import ArrayReader
from functional_ckpt.interop import plain_files
from functional_ckpt.interop.plain_files import PlainFile
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.storage.open import connect
from functional_ckpt.storage.part_uploads import PartUploads

_NUM_COPIES = 8  # at the same time, by each process
_NUM_SENDERS = 2  # each holds a part

Versions: TypeAlias = Mapping[str, str]
"""URI of each object of the step -> its version, which all parts are of."""


class Sent(NamedTuple):
    """A file of which the store has every part.

    Attributes:
        tags: Those of its parts, in order.
        size_bytes: Its size.
    """

    tags: Sequence[str]
    size_bytes: int


class _Piece(NamedTuple):
    """Bytes that this process makes: some it has, or a region of an array, which is one run."""

    data: bytes
    node: structure.ArrayNode | None = None
    box: Box | None = None


def send_files(
    step: str, item: str, files: Sequence[tuple[PlainFile, str]], versions: Versions
) -> list[Sent]:
    """Has the store make every part of files.

    Args:
        step: The step.
        item: Its item.
        files: The files, whose paths are URIs in S3, each with its upload.
        versions: The objects that the store may copy; empty to send all bytes.
    """
    saved = checkpoint_dir.open_checkpoint(*connect(step)).tree(item)
    sender = _Sender(saved, versions)
    return [sender.send(file, upload) for file, upload in files]


class _Sender:
    """Sends the files of one item."""

    def __init__(self, saved: checkpoint_dir.OpenItem, versions: Versions) -> None:
        self._saved = saved
        self._versions = versions
        self._nodes = {node.name: node for node in saved.array_nodes()}

    def send(self, file: PlainFile, upload: str) -> Sent:
        """Sends a file; its upload is not complete."""
        uploads = uploads_of(file.path)
        pieces: list[_Piece] = []
        runs = list(self._runs(file, pieces))
        size_bytes = sum(run.size_bytes for run in runs)
        parts = part_plan.plan_parts(runs, min_bytes=part_plan.least_bytes(size_bytes))
        tags = [""] * len(parts)

        def copy(number: int, run: Stored) -> None:
            tags[number] = uploads.copy(
                *(file.path, upload, number),
                *(run.file, self._versions[run.file], run.start, run.end),
            )

        def send(numbers: Sequence[int]) -> None:
            with contextlib.closing(self._saved.open_reader()) as reader:
                for number in numbers:
                    data = self._content(parts[number], pieces, reader)
                    tags[number] = uploads.send(file.path, upload, number, data)

        sent = [number for number, part in enumerate(parts) if not part.is_copied]
        tasks: list[Callable[[], None]] = [
            functools.partial(send, sent[first::_NUM_SENDERS]) for first in range(_NUM_SENDERS)
        ]
        for number, part in enumerate(parts):
            if part.is_copied and isinstance(run := part.runs[0], Stored):
                tasks.append(functools.partial(copy, number, run))
        run_in_threads(tasks, _NUM_COPIES)
        return Sent(tags, size_bytes)

    def _runs(self, file: PlainFile, pieces: list[_Piece]) -> Iterator[Run]:
        """Yields the bytes of a file; adds those that are made here to the pieces."""

        def made(piece: _Piece, size_bytes: int) -> Made:
            pieces.append(piece)
            return Made(len(pieces) - 1, size_bytes)

        header, tensors = plain_files.layout(
            *(file.path, file.dtypes, file.shapes, file.tied),
            small_bytes=part_plan.MIN_PART_BYTES,
        )
        yield made(_Piece(header), len(header))
        nodes = [self._nodes[file.arrays[tensor.name]] for tensor in tensors]
        places = self._places(nodes)
        for node in nodes:
            if found := places.get(node.name):
                yield from found
                continue
            for box in plain_files.pieces(node.spec, self._saved.request(node).grid):
                size_bytes = box.num_elements * node.spec.itemsize_bytes
                if size_bytes:
                    yield made(_Piece(b"", node, box), size_bytes)

    def _places(self, nodes: Sequence[structure.ArrayNode]) -> dict[str, list[Stored]]:
        """Returns where the store has the bytes of arrays, of those that it may copy."""
        record = self._saved.record
        if not self._versions or record is None:
            return {}
        found = index.open_index(self._saved.storage, self._saved.path, record.files)
        nowhere = Destination.into(np.empty(0))  # for the plan alone: nothing is read
        requests = [
            self._saved.request(node, destination=nowhere, verified=False) for node in nodes
        ]
        reads: dict[str, list[ChunkRead]] = {}
        for batch in found.plan(requests):
            for read in batch:
                reads.setdefault(read.request.name, []).append(read)
        places: dict[str, list[Stored]] = {}
        for node, request in zip(nodes, requests, strict=True):
            runs = self._stored(reads.get(request.name, ()), found.files)
            if runs is not None and sum(run.size_bytes for run in runs) == node.spec.size_bytes:
                places[node.name] = runs
        return places

    def _stored(self, reads: Sequence[ChunkRead], files: Sequence[str]) -> list[Stored] | None:
        """Returns the bytes of an array in order; None if they are not runs of objects."""
        starts: list[tuple[int, Stored]] = []
        for read in reads:
            if read.file == INLINE or read.part is None or read.part.start is None:
                return None
            uri = f"{self._saved.path}/{files[read.file]}"
            if uri not in self._versions:
                return None
            place = Stored(uri, read.offset, read.offset + read.num_bytes)
            starts.append((read.part.start, place))
        return [place for _, place in sorted(starts)]

    def _content(self, part: Part, pieces: Sequence[_Piece], reader: ArrayReader) -> bytes:
        """Returns the bytes of a part; those of arrays that are read in full are verified."""
        found: list[bytes | Any] = []
        for run in part.runs:
            if isinstance(run, Stored):
                data = self._saved.storage.read(run.file, run.start, run.size_bytes)
                if len(data) != run.size_bytes:
                    raise errors.CorruptCheckpointError(
                        f"{run.file}: it ends before byte {run.end:,}.", path=run.file
                    )
                found.append(data)
                continue
            piece = pieces[run.number]
            if piece.node is None or piece.box is None:
                found.append(piece.data)
                continue
            memory = np.empty(piece.box.shape, numpy_dtype(piece.node.spec.dtype))
            request = self._saved.request(piece.node, piece.box, Destination.into(memory))
            for task in reader.tasks([request]):
                task()
            found.append(memory.reshape(-1).view(np.uint8))
        return b"".join(found)


def is_s3(path: str) -> bool:
    """Returns whether a path is in S3, or in a service that is reached in the same way."""
    return path.startswith(("s3://", "s3a://"))


def uploads_of(path: str) -> PartUploads:
    """Returns the uploads of the bucket of a path.

    Raises:
        UsageError: It is not a bucket of S3, or no access key is known.
    """
    uploads = None
    if is_s3(path):
        objects = connect(path)[0].objects
        uploads = None if objects is None else objects.part_uploads
    if uploads is None:
        raise errors.UsageError(
            f"{path}: exports go to S3 (s3://), with an access key in the environment or in AWS's "
            "files, and to local paths only. Write to a local path, then copy it there.",
            path=path,
        )
    return uploads
