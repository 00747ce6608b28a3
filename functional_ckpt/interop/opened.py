"""A foreign checkpoint as the restore flow reads it: nothing is copied on disk first."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from functional_ckpt.core.tree import encode, flatten, structure
from functional_ckpt.format.checkpoint_dir import OpenCheckpoint, OpenItem
from functional_ckpt.format.read_plan import ReadRequest
from functional_ckpt.format.step_files import StepFiles
from functional_ckpt.interop import hostile, torch_save
from functional_ckpt.interop.source import Source
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.storage.local import LocalStorage

if TYPE_CHECKING:
    from functional_ckpt.format.reader import ArrayReader


class _ForeignItem(OpenItem):
    """An item whose arrays are tensors, most of them mapped from a file."""

    def __init__(self, path: str, name: str, value: Any) -> None:
        flat = flatten.flatten(value, item=name)
        self.storage = LocalStorage()
        self.path = path
        self.name = name
        self.root = flat.root
        self.record = None
        arrays = {node.name: (node, value) for node, value in flat.arrays}
        self._arrays = arrays | {node.name: arrays[node.stored_name] for node in flat.tied}

    def open_reader(self) -> ArrayReader:
        """Opens the tensors."""
        return _TensorReader(self._arrays)


@dataclasses.dataclass(frozen=True, slots=True)
class _TensorReader:
    """Copies regions out of tensors."""

    arrays: Mapping[str, tuple[structure.ArrayNode, Any]]

    def tasks(
        self,
        requests: Sequence[ReadRequest],
        *,
        delivered: Collection[tuple[int, tuple[int, ...]]] = (),
    ) -> list[Callable[[], None]]:
        """See `ArrayReader.tasks`."""
        return [functools.partial(self._read, each) for each in requests if each.num_reads]

    def _read(self, request: ReadRequest) -> None:
        if (destination := request.destination) is None:
            return
        node, value = self.arrays[request.name]
        torch_save.check_bytes(value)
        source = encode.host_view(encode.source_of(value, node), node.spec.dtype)
        destination.memory()[...] = source[request.box.slices()]
        destination.done()

    def close(self) -> None:
        """Nothing is open."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForeignCheckpoint(OpenCheckpoint):
    """The items of a source; each is read when it is asked for."""

    source: Source

    def tree(self, name: str) -> OpenItem:
        """Opens an item."""
        return _ForeignItem(self.path, name, self.source[name])

    @property
    def metrics(self) -> Mapping[str, Any] | None:
        """None: metrics of foreign checkpoints are items."""
        return None


def check_bytes(items: Mapping[str, Any]) -> None:
    """Raises `CorruptCheckpointError` for tensors that differ from the checksums of their file."""
    tasks = [functools.partial(torch_save.check_bytes, each) for each in hostile.tensors(items)]
    run_in_threads(tasks)


def open_source(source: Source) -> ForeignCheckpoint:
    """Opens the items of a source for a restore."""
    files = StepFiles.foreign(LocalStorage(), source.path, None)
    items = dict.fromkeys(source, "tree")
    return ForeignCheckpoint(files=files, items=items, metadata={}, source=source)
