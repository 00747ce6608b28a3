"""Reading one checkpoint directory: open, match, read, lift. The manager and `fc.restore` share it.

Nothing of the caller's is written before everything has been matched; reads fill the target's own
memory.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch

from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.arrays.spec import Box
from functional_ckpt.core.restore_plan import plan
from functional_ckpt.core.tree import decode, flatten, memory, walk
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format import read_direct, read_tensorstore
from functional_ckpt.format.checkpoint_dir import OpenItem
from functional_ckpt.restoring import destinations, shared_read
from functional_ckpt.runtime import device_copies, fence, threads

__all__ = ["Verify", "read_all"]

Verify: TypeAlias = Literal["stream", "first", False]

# Enough small reads under way to hide their latency; few enough that two threads share the work.
_BATCH_TASKS = 256
_BATCH_BYTES = 8 * 2**20


def read_all(
    bound: Sequence[tuple[OpenItem, plan.Binding]],
    *,
    verify: Verify,
    touched: TargetState,
    sharing: Coordinator | None = None,
) -> list[Any]:
    """Reads everything that the bindings name and builds their values.

    Args:
        bound: Items and what to make of them.
        verify: `stream` checks each chunk as it is read; `first` checks all chunks first, so that
            damage is found before the target is written into, and then as `during`; `off` checks
            nothing.
        touched: Set before the first byte is written to the caller's memory.
        sharing: The ranks that read for each other, if they do.
    """
    fence.wait_for_all()  # a target may be the source of a running copy of a save
    with threads.gc_paused():
        jobs = [_ItemRead(item, binding, touched) for item, binding in bound]
    if verify == "first":
        threads.run_in_threads([task for job in jobs for task in job.verification()])
    verified = verify is not False  # after `first` too: the data may have changed since
    with contextlib.ExitStack() as files:
        fetches: list[Callable[[], None]] = []
        bounce = device_copies.PinnedBuffers()
        files.callback(bounce.close)
        if sharing is None:
            for job in jobs:
                fetches += job.fetch(files, bounce, verified=verified)
        with threads.gc_paused():
            tasks = [task for job in jobs for task in job.tasks(verified=verified)]
        if sharing is not None:
            tasks = _without_shared(tasks, sharing)
        threads.run_in_threads([*fetches, *_batches(tasks)])
    with threads.gc_paused():
        return [job.assemble() for job in jobs]


@dataclasses.dataclass(frozen=True, slots=True)
class _Task:
    """A part of a restore.

    Attributes:
        run: Reads it.
        request: Asks for it ahead, if it is small.
        size_bytes: How much it reads.
        chunk: The region and the chunk of it that it reads; None for a foreign array.
    """

    run: Callable[[], None]
    request: Callable[[], None] | None = None
    size_bytes: int = 0
    chunk: tuple[shared_read.SharedRequest, tuple[int, ...]] | None = None


def _without_shared(tasks: Sequence[_Task], group: Coordinator) -> list[_Task]:
    """Performs the shared reads; returns the tasks left to this rank."""
    wanted = {id(task.chunk[0]): task.chunk[0] for task in tasks if task.chunk is not None}
    delivered = shared_read.read_shared(group, list(wanted.values()))
    places = {key: place for place, key in enumerate(wanted)}
    return [
        task
        for task in tasks
        if task.chunk is None or (places[id(task.chunk[0])], task.chunk[1]) not in delivered
    ]


def _batches(tasks: Sequence[_Task]) -> list[Callable[[], None]]:
    """Small parts together, so that their requests are under way at the same time."""
    batches: list[list[_Task]] = []
    size_bytes = _BATCH_BYTES
    for task in tasks:
        if size_bytes >= _BATCH_BYTES or len(batches[-1]) >= _BATCH_TASKS:
            batches.append([])
            size_bytes = 0
        batches[-1].append(task)
        size_bytes += task.size_bytes
    return [functools.partial(_run_batch, batch) for batch in batches]


def _run_batch(tasks: Sequence[_Task]) -> None:
    for task in tasks:
        if task.request is not None:
            task.request()
    for task in tasks:
        task.run()


@dataclasses.dataclass(slots=True)
class TargetState:
    """Set once the restore has modified a target."""

    value: bool = False


_counting = threading.Lock()  # one for all: a lock for each of ten thousands of arrays costs more


class _ArrayRead:
    """One array on its way into memory; its chunks may arrive on several threads."""

    __slots__ = ("_num_parts", "_place", "_touched", "binding", "item", "value")

    def __init__(self, item: OpenItem, binding: plan.ReadArray, touched: TargetState) -> None:
        self.item = item
        self.binding = binding
        self.value: Any = None
        self._touched = touched
        self._place: destinations.HostDestination | None = None
        self._num_parts = 1

    def accept(
        self,
        fetcher: read_direct.DirectReader,
        bounce: device_copies.PinnedBuffers,
        *,
        verified: bool,
    ) -> bool:
        """Has all of the array read with many others at once, where that is possible."""
        node, record = self.binding.node, self.item.record
        like = self.binding.like
        if record is None:
            return False
        if not (memory.is_plain(like) or sharding.sharding_of(like) is None):
            return False
        sent = destinations.device_destination(self.binding)
        if sent is not None:
            bounce.prepare(sent.target.device)
        else:
            self._place = destinations.host_destination(self.binding)
        array = record.arrays[node.stored_name]
        return fetcher.add(
            read_direct.ReadRequest(
                name=node.stored_name,
                spec=node.spec,
                chunk_shape=array.chunk_shape,
                digests=array.xxh3 if verified else None,
                destination=None if self._place is None else self._place.array,
                finish=self._finish if sent is None else functools.partial(self._finish_sent, sent),
                send=None if sent is None else functools.partial(bounce.send, sent.target),
            )
        )

    def tasks(self, *, verified: bool) -> list[_Task]:
        node = self.binding.node
        record = self.item.record_of(node)
        if record is None:
            return [_Task(self._read_foreign)]
        tasks: list[_Task] = []
        for piece in destinations.pieces_of(self.binding):
            read = read_tensorstore.ArrayRead(
                name=node.stored_name,
                spec=node.spec,
                grid=record.grid,
                digests=record.digests if verified else None,
                box=piece.box,
            )
            wanted = shared_read.SharedRequest(
                item=self.item.name,
                database=self.item.database,
                read=read,
                deliver=functools.partial(self._accept_part, piece),
            )
            tasks += [
                _Task(
                    functools.partial(self._read_part, read, piece.local, index),
                    functools.partial(
                        read_tensorstore.request_part, self.item.database, read, index
                    ),
                    record.grid.box(index).num_elements * node.spec.itemsize_bytes,
                    (wanted, index),
                )
                for index in record.grid.indices(piece.box)
            ]
        self._num_parts = len(tasks)
        return tasks or [_Task(self._finish)]

    def _read_part(
        self, read: read_tensorstore.ArrayRead, local: Box, index: tuple[int, ...]
    ) -> None:
        destination = self._open().array[local.slices()]
        read_tensorstore.read_part(self.item.database, read, index, destination)
        self._count_part()

    def _accept_part(self, piece: sharding.Piece, box: Box, values: Any) -> None:
        """A part that another rank may have read."""
        local = self._open().array[piece.local.slices()]
        local[box.relative_to(piece.box.offset).slices()] = values
        self._count_part()

    def _count_part(self) -> None:
        with _counting:
            self._num_parts -= 1
            is_last = self._num_parts == 0
        if is_last:
            self._finish()

    def _read_foreign(self) -> None:
        """A foreign array: TensorStore handles its chunks and codecs."""
        array = self._open().array
        for piece in destinations.pieces_of(self.binding):
            if piece.box.num_elements:
                read_tensorstore.read_foreign_array(
                    self.item.database,
                    self.binding.node.name,
                    array[piece.local.slices()],
                    box=piece.box,
                    shape=self.binding.node.spec.shape,
                    is_zarr3=self.item.is_zarr3,
                    fills_missing=self.item.fills_missing,
                )
        self._finish()

    def _open(self) -> destinations.HostDestination:
        with _counting:
            if self._place is None:
                self._place = destinations.host_destination(self.binding)
            if self.binding.form == "fill":
                self._touched.value = True
            return self._place

    def _finish_sent(self, sent: destinations.DeviceDestination) -> None:
        self.value = sent.value

    def _finish(self) -> None:
        place = self._place  # all but nothing at all was read into one
        self.value = (self._open() if place is None else place).finish()
        self._place = None


class _ItemRead:
    """Every array of one item, each read once however many leaves are tied to it."""

    def __init__(self, item: OpenItem, binding: plan.Binding, touched: TargetState) -> None:
        self.item = item
        self.binding = binding
        self._touched = touched
        self._fetched: set[int] = set()
        self._jobs: dict[Any, _ArrayRead] = {}
        self._of: dict[int, _ArrayRead] = {}
        reads = list(_reads(binding))
        times = collections.Counter(read.node.stored_name for read in reads)
        for read in reads:
            name = read.node.stored_name
            key = (name,) if times[name] == 1 else (name, *_sharing(read))
            job = self._jobs.setdefault(key, _ArrayRead(item, read, touched))
            self._of[id(read)] = job

    def fetch(
        self, files: contextlib.ExitStack, bounce: device_copies.PinnedBuffers, *, verified: bool
    ) -> list[Callable[[], None]]:
        """Tasks that read all that can be read with much else at once; `tasks` reads the rest."""
        storage = self.item.storage
        if self.item.record is None or not self._jobs or storage.files is None:
            return []
        database = self.item.database  # the one that is there must open in any case
        with threads.gc_paused():
            fetcher = read_direct.DirectReader(storage, self.item.path)
            files.callback(fetcher.close)
            jobs = self._jobs.values()
            taken = [job for job in jobs if job.accept(fetcher, bounce, verified=verified)]
            tasks = fetcher.tasks()
        database.count(fetcher.size_bytes)
        self._fetched = {id(job) for job in taken}
        if not any(job.binding.form == "fill" for job in taken):
            return tasks
        return [functools.partial(self._touch_and, task) for task in tasks]

    def _touch_and(self, task: Callable[[], None]) -> None:
        self._touched.value = True
        task()

    def tasks(self, *, verified: bool) -> list[_Task]:
        left = [job for job in self._jobs.values() if id(job) not in self._fetched]
        return [task for job in left for task in job.tasks(verified=verified)]

    def verification(self) -> list[Callable[[], None]]:
        nodes = {job.binding.node.stored_name: job.binding.node for job in self._jobs.values()}
        return [task for node in nodes.values() for task in self.item.verification(node)]

    def assemble(self) -> Any:
        return walk.fold(self.binding, self._visit)

    def _visit(self, binding: plan.Binding) -> walk.Visit[plan.Binding, Any]:
        if isinstance(binding, plan.Build):
            return binding.children, functools.partial(_build, binding, self._touched)
        return walk.leaf(self._leaf(binding))

    def _leaf(self, binding: plan.Given | plan.ReadArray) -> Any:
        if isinstance(binding, plan.Given):
            return binding.value
        job = self._of[id(binding)]
        if binding.form == "as_saved" and binding.node.detail != job.binding.node.detail:
            # tied, but one is a Parameter and the other its plain view
            return decode.apply_tensor_role(
                cast("torch.Tensor", job.value).detach(), binding.node.detail
            )
        return job.value


def _build(binding: plan.Build, touched: TargetState, children: Sequence[Any]) -> Any:
    value = flatten.unflatten_one_level(binding.node, children, binding.like)
    if binding.into is not None:
        touched.value = True
        with torch.no_grad():
            return binding.into.copy_(value)
    if isinstance(binding.like, torch.Tensor) and isinstance(value, torch.Tensor):
        return decode.apply_tensor_role(value, {}, binding.like.device)
    return value


def _reads(binding: plan.Binding) -> Iterator[plan.ReadArray]:
    todo = [binding]
    while todo:
        current = todo.pop()
        if isinstance(current, plan.ReadArray):
            yield current
        elif isinstance(current, plan.Build):
            todo.extend(reversed(current.children))


def _sharing(read: plan.ReadArray) -> tuple[object, ...]:
    """Leaves tied in the checkpoint share a read when they end in the same kind of memory."""
    if read.form == "fill":
        return ("fill", id(read.like), memory.storage_key(read.like))
    if read.form == "tensor":
        like = cast("torch.Tensor", read.like)
        is_parameter = isinstance(like, torch.nn.Parameter)
        tied = memory.storage_key(like) if not like.is_meta else None
        return ("tensor", like.dtype, str(like.device), is_parameter, tied)
    return (read.form,)
