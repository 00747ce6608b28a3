"""Data files in which nothing has changed since the last step: they are linked, not written.

A new state is compared with the digests of the last step's file block by block, up to the first
difference. The digests of the chunks before it are not computed again when the file is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from functional_ckpt.core.arrays.chunks import DIGEST_BLOCK_BYTES
from functional_ckpt.core.arrays.digests import digest_blocks
from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.core.files.file_plan import FilePlan
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.format.data_file import flat_bytes
from functional_ckpt.format.tuning import REFRESH_STEPS
from functional_ckpt.storage.base import Stat, Storage
from functional_ckpt.storage.commit_base import HIDDEN

if TYPE_CHECKING:
    from functional_ckpt.format.write_files import ArrayWrite, WrittenBox

_DIGITS = 16


def damage_path(root: str) -> str:
    """Returns the file whose last change says when shared files of a run were found damaged."""
    return os.path.join(root, HIDDEN, "damaged")


class KeptFile(NamedTuple):
    """A data file of a committed step.

    Attributes:
        path: Where it is.
        status: Its status once the step was committed; None before that.
        record: Its size and digest.
        header: Its header.
        boxes: The regions in it, with the digests of their chunks.
        num_steps: How many steps in a row share it.
    """

    path: str
    status: Stat | None
    record: FileRecord
    header: bytes
    boxes: Sequence[WrittenBox]
    num_steps: int = 1

    def compare(self, plan: FilePlan, writes: Sequence[ArrayWrite]) -> tuple[list[str], bool]:
        """Returns the digests of the chunks before the first difference, and whether there is none.

        Args:
            plan: A file that may have the bytes of this one.
            writes: Its members.
        """
        found: list[str] = []
        layout = plan.size_bytes, plan.header, len(plan.members)
        if layout != (self.record.size_bytes, self.header, len(self.boxes)):
            return found, False
        for member, write, box in zip(plan.members, writes, self.boxes, strict=True):
            planned = (write.name, write.grid.chunk_shape, write.box, member.offset)
            if planned != (box.name, box.chunk_shape, box.box, box.offset):
                return found, False
            if not isinstance(write.data, np.ndarray):
                return found, False
            start = 0
            for data in _chunks(write, write.data):
                end = start + _DIGITS * -(-len(data) // DIGEST_BLOCK_BYTES)
                digests = box.digests[start:end]
                if len(digests) != end - start or not _has_digests(data.data, digests):
                    return found, False
                found.append(digests)
                start = end
        return found, True

    def share(self, storage: Storage, path: str) -> bool:
        """Links the file, if it is still the one of the committed step; returns whether it is."""
        if self.status is None or self.num_steps >= REFRESH_STEPS:
            return False
        return storage.share(path, self.path, self.status)

    def committed(self, storage: Storage, item_directory: str) -> KeptFile:
        """Returns the file where it is once the step is committed."""
        path = os.path.join(item_directory, os.path.basename(self.path))
        return self._replace(path=path, status=storage.stat(path))


def _has_digests(data: memoryview, digests: str) -> bool:
    """Compares block by block: most of a changed chunk is not digested here."""
    return all(
        digest_blocks(data[start : start + DIGEST_BLOCK_BYTES]) == digests[digit : digit + _DIGITS]
        for start, digit in zip(
            range(0, len(data), DIGEST_BLOCK_BYTES), range(0, len(digests), _DIGITS), strict=True
        )
    )


def _chunks(write: ArrayWrite, region: Array) -> Iterator[Array]:
    """Yields the bytes of each chunk of a region, in C order, without padding."""
    grid, box = write.grid, write.box
    if box.shape == grid.chunk_shape and region.size:  # thousands of small arrays
        yield flat_bytes(region)
        return
    for index in grid.indices(box):
        yield flat_bytes(region[write.inside(index).slices()])
