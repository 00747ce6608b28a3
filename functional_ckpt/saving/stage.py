"""The only copy of a save: what this rank writes, out of live tensors into our own host memory.

On the host several threads copy; from a CUDA device a stream of its own does, into memory whose
pages are locked.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from functional_ckpt.core.arrays import write_plan
from functional_ckpt.core.arrays.spec import Box, numpy_dtype
from functional_ckpt.core.tree import encode
from functional_ckpt.format import database, write_tensorstore
from functional_ckpt.runtime import device_copies, host_memory, threads
from functional_ckpt.saving.lower import LoweredItem, Source
from functional_ckpt.saving.plan import ItemPlan, SavePlan

__all__ = ["CopyLatch", "StagedItem", "StagingMemory", "stage", "stage_within"]

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StagedItem:
    """An item whose bytes will not change any more.

    Attributes:
        lowered: What it was lowered to.
        writes: Host arrays that this rank writes.
        scalars: Names of the plain numbers that this rank writes for Orbax.
    """

    lowered: LoweredItem
    writes: tuple[write_tensorstore.ArrayWrite, ...]
    scalars: frozenset[str]

    @property
    def num_bytes(self) -> int:
        """How much this rank writes of its arrays."""
        return sum(write.data.nbytes for write in self.writes)

    @property
    def blocks_caller(self) -> bool:
        """Whether somebody waits until it is written."""
        return any(write.on_copied is not None for write in self.writes)


class StagingMemory:
    """Where saves are staged, and what copies to there; kept from save to save.

    Attributes:
        streams: What copies from devices.
    """

    def __init__(self) -> None:
        self.streams = device_copies.CopyStreams()
        self._ordinary = host_memory.StagingBuffer()
        self._locked = host_memory.StagingBuffer()

    def reserve(self, parts: Sequence[_Part]) -> list[Array]:
        """An array for every part; what comes from a device that streams gets locked pages."""
        streamed = [part for part in parts if device_copies.is_streamed(part.view)]
        if not streamed:
            return self._ordinary.reserve([_slot(part) for part in parts])
        locked = self._locked.reserve([_slot(part) for part in streamed])
        self._locked.lock(device_copies.lock_pages)
        others = [part for part in parts if not device_copies.is_streamed(part.view)]
        ordinary = self._ordinary.reserve([_slot(part) for part in others])
        places = {
            id(part): host
            for part, host in zip((*streamed, *others), (*locked, *ordinary), strict=True)
        }
        return [places[id(part)] for part in parts]

    def release(self) -> None:
        """Gives the memory back once nothing refers to it."""
        self._ordinary.release()
        self._locked.release()


class CopyLatch:
    """What a save writes from live memory, because it is more than may be staged.

    Args:
        size_bytes: Bytes of it.
    """

    def __init__(self, size_bytes: int) -> None:
        self._left_bytes = size_bytes
        self._lock = threading.Lock()
        self._done = threading.Event()

    def count_down(self, num_bytes: int) -> None:
        """So many bytes are on their way to the disk."""
        with self._lock:
            self._left_bytes -= num_bytes
            if self._left_bytes <= 0:
                self._done.set()

    def release(self) -> None:
        """Nothing more will be taken."""
        self._done.set()

    def wait(self) -> None:
        """Returns when the live memory may change."""
        self._done.wait()


class _Part(NamedTuple):
    """A region that this rank writes of one array, as a view of the live tensor."""

    source: Source
    planned: write_plan.PlannedArray
    box: Box
    view: torch.Tensor
    is_owner: bool


def stage(
    items: Sequence[LoweredItem], plan: SavePlan, room: StagingMemory | None
) -> tuple[StagedItem, ...]:
    """Copies what this rank will write into host memory of our own, in one pass.

    Args:
        items: What to stage.
        plan: This rank's part.
        room: Where to; None to refer to CPU memory as it is (the caller promises not to change it
            until the write is done).
    """
    database.check_process()
    with threads.gc_paused():
        parts = [list(_parts(item, plan[item.name])) for item in items]
        flat = [part for item_parts in parts for part in item_parts]
        if room is None:
            return _staged(items, plan, parts, _refer(flat), is_staged=False)
        hosts = room.reserve(flat)
        staged = _staged(items, plan, parts, hosts)
    _copy(list(zip(flat, hosts, strict=True)), room)
    return staged


def stage_within(
    items: Sequence[LoweredItem], plan: SavePlan, room: StagingMemory, budget_bytes: int
) -> tuple[tuple[StagedItem, ...], CopyLatch | None]:
    """As `stage`, with at most so many bytes of host memory; the rest refers to live memory.

    Returns:
        The items, and what to wait for before live memory changes; None for nothing.
    """
    database.check_process()
    parts = [list(_parts(item, plan[item.name])) for item in items]
    flat = [part for item_parts in parts for part in item_parts]
    left = budget_bytes
    copied: list[_Part] = []
    referred: list[_Part] = []
    for part in flat:
        size_bytes = _slot(part).size_bytes + host_memory.ALIGNMENT_BYTES
        is_within = size_bytes <= left
        left -= size_bytes if is_within else 0
        (copied if is_within else referred).append(part)
    hosts = room.reserve(copied)
    _copy(list(zip(copied, hosts, strict=True)), room)
    live = _refer(referred)
    places = {
        id(part): host for part, host in zip((*copied, *referred), (*hosts, *live), strict=True)
    }
    staged = _staged(items, plan, parts, [places[id(part)] for part in flat])
    if not referred:
        return staged, None
    through = CopyLatch(sum(array.nbytes for array in live))
    awaited = {id(array) for array in live}
    return tuple(
        dataclasses.replace(
            item,
            writes=tuple(
                write._replace(on_copied=through.count_down, is_stable=False)
                if id(write.data) in awaited
                else write
                for write in item.writes
            ),
        )
        for item in staged
    ), through


def _staged(
    items: Sequence[LoweredItem],
    plan: SavePlan,
    parts: Sequence[Sequence[_Part]],
    hosts: Sequence[Array],
    *,
    is_staged: bool = True,
) -> tuple[StagedItem, ...]:
    remaining = iter(hosts)
    return tuple(
        StagedItem(
            lowered=item,
            writes=tuple(_array_write(part, next(remaining), is_staged) for part in item_parts),
            scalars=plan[item.name].scalars,
        )
        for item, item_parts in zip(items, parts, strict=True)
    )


def _parts(item: LoweredItem, plan: ItemPlan) -> Iterator[_Part]:
    """Whole pieces where this rank writes all of one, single chunks where replicas share it."""
    for source, planned in zip(item.sources, plan.arrays, strict=True):
        is_owner = planned.is_owner
        for entry in planned.pieces:
            piece, grid = entry.piece, planned.grid
            if entry.is_whole and piece.box.shape == source.tensor.shape:
                yield _Part(source, planned, piece.box, source.tensor, is_owner)
                is_owner = False
                continue
            for box in [piece.box] if entry.is_whole else map(grid.box, entry.indices):
                start = piece.local.offset
                local = Box(
                    tuple(
                        o - p + s
                        for o, p, s in zip(box.offset, piece.box.offset, start, strict=True)
                    ),
                    box.shape,
                )
                yield _Part(source, planned, box, source.tensor[local.slices()], is_owner)
                is_owner = False
        if is_owner:  # an array without elements still has metadata
            yield _Part(source, planned, Box.whole(source.node.spec.shape), source.tensor, True)


def _refer(parts: Sequence[_Part]) -> list[Array]:
    return [
        encode.host_view(part.view if part.view.is_cpu else part.view.cpu(), _dtype(part))
        for part in parts
    ]


def _dtype(part: _Part) -> str:
    return part.source.node.spec.dtype


def _slot(part: _Part) -> host_memory.Slot:
    return host_memory.Slot(part.box.shape, numpy_dtype(_dtype(part)))


def _begin(parts: Sequence[tuple[_Part, Array]], room: StagingMemory) -> device_copies.Transfers:
    """Copies from the devices as they are now."""
    views = (part.view for part, host in parts if host.size)
    return room.streams.begin({v.device for v in views if device_copies.is_streamed(v)})


def _copy(parts: Sequence[tuple[_Part, Array]], room: StagingMemory) -> None:
    transfers = _begin(parts, room)
    try:
        _start_copy(parts, transfers)
    finally:
        transfers.synchronize()


def _start_copy(
    parts: Sequence[tuple[_Part, Array]],
    transfers: device_copies.Transfers,
    num_threads: int = host_memory.NUM_THREADS,
) -> None:
    """Copies what is on the host; what is on a device is under way then, beside it."""
    on_host: list[tuple[Array, Array]] = []
    on_device: list[tuple[torch.Tensor, torch.Tensor]] = []
    for part, host in parts:
        if device_copies.is_streamed(part.view):
            if host.size:
                on_device.append((encode.tensor_over(host), part.view))
        elif part.view.is_cpu:
            on_host.append((host, encode.host_view(part.view, _dtype(part))))
        elif host.size:
            encode.tensor_over(host).copy_(part.view)
    transfers.enqueue(on_device)
    host_memory.copy_in_threads(on_host, num_threads)


def _array_write(part: _Part, host: Array, is_staged: bool) -> write_tensorstore.ArrayWrite:
    node = part.source.node
    return write_tensorstore.ArrayWrite(
        name=node.name,
        spec=node.spec,
        grid=part.planned.grid,
        box=part.box,
        data=host,
        writes_metadata=part.is_owner,
        is_stable=is_staged,
    )
