"""Reads the arrays of an item, region by region."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from functional_ckpt.core.arrays.digests import Digests
from functional_ckpt.core.arrays.spec import Box, numpy_dtype
from functional_ckpt.core.tree import structure
from functional_ckpt.format.checkpoint_dir import OpenItem
from functional_ckpt.format.read_plan import Destination

if TYPE_CHECKING:
    import numpy as np

    from functional_ckpt.format.reader import ArrayReader

# How much of an array is held in memory at a time.
SLAB_BYTES = 64 * 2**20


class OpenArrays:
    """An item, whose arrays are opened when the first of them is read."""

    def __init__(self, opened: OpenItem, files: contextlib.ExitStack) -> None:
        self.opened = opened
        self._files = files

    @functools.cached_property
    def reader(self) -> ArrayReader:
        """Reads its arrays."""
        reader = self.opened.open_reader()
        self._files.callback(reader.close)
        return reader


class StoredArray:
    """One stored array.

    Attributes:
        node: Its node in the item's structure.
    """

    def __init__(self, arrays: OpenArrays, node: structure.ArrayNode) -> None:
        self._arrays = arrays
        self.node = node

    @property
    def digests(self) -> Digests | None:
        """The digests of its chunks; None where there are none."""
        return self._arrays.opened.digests(self.node)

    @property
    def is_numeric(self) -> bool:
        """Whether numbers are stored as such, not as their bits or raw bytes."""
        return self.node.kind != "bytes" and self.node.dtype == self.node.spec.dtype

    def read(self, box: Box) -> np.ndarray[Any, Any]:
        """Reads a region, verified where there is something to compare it with."""
        import numpy as np

        data = np.empty(box.shape, numpy_dtype(self.node.spec.dtype))
        for task in self.tasks(box, data):
            task()
        return data

    def tasks(self, box: Box, memory: np.ndarray[Any, Any]) -> list[Callable[[], None]]:
        """Returns the tasks that read a region into memory of its shape; a disk starts at once."""
        request = self._arrays.opened.request(self.node, box, Destination.into(memory))
        return self._arrays.reader.tasks([request])
