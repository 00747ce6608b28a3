"""The regions that a rank writes, as views of live tensors, and their copies in host memory.

Several threads copy host memory. A CUDA stream copies device memory to page-locked memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from functional_ckpt.core.arrays.spec import Array, numpy_dtype
from functional_ckpt.core.files.file_plan import FilePlan
from functional_ckpt.core.tree import encode
from functional_ckpt.format.write_files import ArrayWrite
from functional_ckpt.runtime import device_copies, host_memory
from functional_ckpt.saving.lower import LoweredItem, Source
from functional_ckpt.saving.plan import ItemPlan, PlannedPart


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StagedItem:
    """An item with the files that this rank writes, and the host arrays of their members."""

    lowered: LoweredItem
    files: tuple[FilePlan, ...]
    writes: tuple[ArrayWrite, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the arrays that this rank writes."""
        return sum(write.data.nbytes for write in self.writes)

    @property
    def blocks_caller(self) -> bool:
        """Whether `save` waits until live memory of this item is written."""
        return any(write.on_copied is not None for write in self.writes)


class Part(NamedTuple):
    """A region that this rank writes of one array, and the live tensor that holds it."""

    item: str
    source: Source
    planned: PlannedPart
    view: torch.Tensor

    @property
    def name(self) -> str:
        """The leaf's key path."""
        return f"{self.item}.{self.source.node.name}"

    @property
    def dtype(self) -> str:
        """The dtype that is stored."""
        return self.source.node.spec.dtype

    @property
    def slot(self) -> host_memory.Slot:
        """The host memory that a copy needs."""
        planned = self.planned
        return host_memory.Slot(planned.box.shape, numpy_dtype(self.dtype), planned.offset)

    def write(
        self,
        host: Array,
        *,
        is_stable: bool = False,
        on_copied: Callable[[int], None] | None = None,
    ) -> ArrayWrite:
        """Returns the request that writes this part from a host array; see `ArrayWrite`."""
        return ArrayWrite(
            name=self.source.node.name,
            spec=self.source.node.spec,
            grid=self.planned.grid,
            box=self.planned.box,
            data=host,
            is_stable=is_stable,
            on_copied=on_copied,
        )


def parts_of(item: LoweredItem, plan: ItemPlan) -> Iterator[Part]:
    """Yields this rank's parts, file by file."""
    for planned in plan.parts:
        source = item.sources[planned.source]
        tensor = source.tensor
        is_whole = planned.local.shape == tensor.shape
        view = tensor if is_whole else tensor[planned.local.slices()]
        yield Part(item.name, source, planned, view)


class StagingMemory:
    """Host memory and CUDA streams for the copies of a save; reused from save to save."""

    def __init__(self) -> None:
        self._streams = device_copies.CopyStreams()
        self._ordinary = host_memory.StagingBuffer()
        self._locked = host_memory.StagingBuffer()

    def reserve(self, parts: Sequence[Part]) -> list[Array]:
        """Returns an array for every part, in locked pages for copies of a stream."""
        streamed = [part for part in parts if device_copies.is_streamed(part.view)]
        if not streamed:
            return self._ordinary.reserve([part.slot for part in parts])
        locked = self._locked.reserve([part.slot for part in streamed])
        self._locked.lock(device_copies.lock_pages)
        others = [part for part in parts if not device_copies.is_streamed(part.view)]
        ordinary = self._ordinary.reserve([part.slot for part in others])
        hosts = dict(zip(map(id, (*streamed, *others)), (*locked, *ordinary), strict=True))
        return [hosts[id(part)] for part in parts]

    def begin(self, copies: Sequence[tuple[Part, Array]]) -> device_copies.Transfers:
        """Returns the transfers from devices, of the devices' current values."""
        views = (part.view for part, host in copies if host.size)
        return self._streams.begin({v.device for v in views if device_copies.is_streamed(v)})

    def release(self) -> None:
        """Frees the memory once nothing refers to it."""
        self._ordinary.release()
        self._locked.release()


def refer(parts: Iterable[Part]) -> list[Array]:
    """Returns host arrays over live memory; copies of device memory."""
    return [
        encode.host_view(part.view if part.view.is_cpu else part.view.cpu(), part.dtype)
        for part in parts
    ]


def copy(copies: Sequence[tuple[Part, Array]], memory: StagingMemory) -> None:
    """Copies parts into host arrays."""
    transfers = memory.begin(copies)
    try:
        start_copy(copies, transfers)
    finally:
        transfers.synchronize()


def start_copy(
    copies: Sequence[tuple[Part, Array]],
    transfers: device_copies.Transfers,
    num_threads: int = host_memory.NUM_THREADS,
) -> None:
    """Copies host memory, and enqueues the copies from devices."""
    on_host: list[tuple[Array, Array]] = []
    on_device: list[tuple[torch.Tensor, torch.Tensor]] = []
    for part, host in copies:
        if device_copies.is_streamed(part.view):
            if host.size:
                on_device.append((encode.tensor_over(host), part.view))
        elif part.view.is_cpu:
            on_host.append((host, encode.host_view(part.view, part.dtype)))
        elif host.size:
            encode.tensor_over(host).copy_(part.view)
    transfers.enqueue(on_device)
    host_memory.copy_in_threads(on_host, num_threads)
