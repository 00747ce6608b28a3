"""Reading the arrays of one checkpoint: requests, one plan per item, and the restored values.

Reads fill the target's own memory where possible. No read starts before everything is matched.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch

from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.arrays.spec import Array, Box
from functional_ckpt.core.restore_plan import plan
from functional_ckpt.core.tree import decode, flatten, memory, structure, walk
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format.checkpoint_dir import OpenItem
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.format.reader import ArrayReader
from functional_ckpt.restoring import destinations, shared_read
from functional_ckpt.runtime import device_copies, fence, threads

Verify: TypeAlias = Literal["stream", "first", False]


class FromNodes(Protocol):
    """Reads the requests of every rank from the nodes that hold their files; see `node_read`."""

    def __call__(
        self,
        items: Sequence[OpenItem],
        requests: Sequence[Sequence[ReadRequest]],
        *,
        verify: Verify,
        shown: Callable[[int, int], None] | None,
    ) -> None:
        """Fills the destinations of all requests."""
        ...


def read_all(
    bound: Sequence[tuple[OpenItem, plan.Binding]],
    *,
    verify: Verify,
    touched: TargetState,
    sharing: Coordinator | None = None,
    shown: Callable[[int, int], None] | None = None,
    from_nodes: FromNodes | None = None,
) -> list[Any]:
    """Reads everything that the bindings name and builds their values.

    Args:
        bound: Items, each with the binding to read.
        verify: `stream` checks each chunk as it is read; `first` checks all chunks first, so that
            damage is found before the target is modified, and then as `stream`; False checks
            nothing.
        touched: Set before the first byte is written to the caller's memory.
        sharing: The ranks that read for each other, if they do.
        shown: Called with the bytes read so far, and the total.
        from_nodes: Reads in place of the ranks, where files are on several nodes.
    """
    fence.wait_for_all()  # another save may still be copying from the memory that is read into
    verified = verify is not False  # after `first` too: the bytes may have changed in between
    with contextlib.ExitStack() as files:
        buffers = device_copies.PinnedBuffers()
        files.callback(buffers.close)
        with threads.gc_paused():
            items = [_ItemRead(item, binding, touched) for item, binding in bound]
            # Parts that other ranks read arrive in host memory.
            own = buffers if sharing is None and from_nodes is None else None
            requests = [each.requests(own, verified=verified) for each in items]
            readers = [] if from_nodes is not None else [each.open(files) for each in items]
        if from_nodes is not None:
            from_nodes([each.item for each in items], requests, verify=verify, shown=shown)
            return [each.assemble() for each in items]
        if verify == "first":
            threads.run_in_threads(_tasks(readers, [each.verification() for each in items]))
        delivered: Sequence[shared_read.Delivered] = [()] * len(items)
        if sharing is not None:
            names = [each.item.name for each in items]
            delivered = shared_read.read_shared(sharing, names, readers, requests)
        with threads.gc_paused():
            tasks = _tasks(readers, requests, delivered)
            if shown is not None:
                tasks = _counted(tasks, [item for item, _ in bound], shown)
        threads.run_in_threads(tasks)
    with threads.gc_paused():
        return [each.assemble() for each in items]


def _tasks(
    readers: Sequence[ArrayReader | None],
    requests: Sequence[Sequence[ReadRequest]],
    delivered: Sequence[shared_read.Delivered] | None = None,
) -> list[Callable[[], None]]:
    return [
        task
        for reader, wanted, done in zip(
            readers, requests, delivered or [()] * len(readers), strict=True
        )
        if reader is not None
        for task in reader.tasks(wanted, delivered=done)
    ]


def _counted(
    tasks: Sequence[Callable[[], None]],
    items: Sequence[OpenItem],
    shown: Callable[[int, int], None],
) -> list[Callable[[], None]]:
    """Returns the tasks; each reports the approximate number of bytes read so far."""
    total = sum(node.spec.size_bytes for item in items for node in structure.iter_arrays(item.root))
    done = itertools.count(1)

    def run(task: Callable[[], None]) -> None:
        task()
        shown(total * next(done) // len(tasks), total)

    return [functools.partial(run, task) for task in tasks]


@dataclasses.dataclass(slots=True)
class TargetState:
    """Set once the restore has modified a target."""

    value: bool = False


_counting = threading.Lock()  # one for all arrays: a lock for each of 10,000 costs more


class _ArrayRead:
    """One array being read; its parts may arrive on several threads."""

    __slots__ = ("_num_reads", "_place", "_sent", "_touched", "binding", "item", "value")

    def __init__(self, item: OpenItem, binding: plan.ReadArray, touched: TargetState) -> None:
        self.item = item
        self.binding = binding
        self.value: Any = None
        self._touched = touched
        self._place: decode.Destination | None = None
        self._sent: destinations.DeviceDestination | None = None
        self._num_reads = 0

    def requests(
        self, buffers: device_copies.PinnedBuffers | None, *, verified: bool
    ) -> Sequence[ReadRequest]:
        """Returns the requests for the array; one if the local part is one region."""
        node, like = self.binding.node, self.binding.like
        if memory.is_plain(like) or sharding.sharding_of(like) is None:
            destination = self._destination(buffers)
            requests = [self.item.request(node, None, destination, verified=verified)]
        else:
            requests = [
                self.item.request(
                    node,
                    piece.box,
                    Destination(functools.partial(self._piece, piece.local), self._count),
                    verified=verified,
                )
                for piece in sharding.pieces_of(like)
            ]
        for request in requests:  # most often one
            self._num_reads += request.num_reads
        if not self._num_reads:
            self._finish()
        return requests

    def _destination(self, buffers: device_copies.PinnedBuffers | None) -> Destination:
        """Returns device memory where all chunks are runs of its bytes, else host memory."""
        binding = self.binding
        if buffers and destinations.is_streamed(binding) and self.item.has_rows(binding.node):
            self._sent = destinations.device_destination(binding)
            if self._sent is not None:
                buffers.prepare(self._sent.target.device)
                send = functools.partial(self._send, buffers)
                return Destination(self._memory, self._count, send)
        self._place = destinations.host_destination(binding)
        return Destination(self._memory, self._count)

    def _send(
        self, buffers: device_copies.PinnedBuffers, start: int, size_bytes: int, fill: Any
    ) -> None:
        sent = cast("destinations.DeviceDestination", self._sent)
        self._touch()
        buffers.send(sent.target, start, size_bytes, fill)

    def _memory(self) -> Array:
        self._touch()
        buffer = self._place
        return self._open().array if buffer is None else buffer.array

    def _piece(self, local: Box) -> Array:
        return self._memory()[local.slices()]

    def _touch(self) -> None:
        if self.binding.form == "fill":
            self._touched.value = True

    def _open(self) -> decode.Destination:
        """Makes the host memory of a sharded tensor when its first part arrives."""
        with _counting:
            if self._place is None:
                self._place = destinations.host_destination(self.binding)
            return self._place

    def _count(self) -> None:
        if self._num_reads > 1:
            with _counting:
                self._num_reads -= 1
                is_last = self._num_reads == 0
            if not is_last:
                return
        self._finish()

    def _finish(self) -> None:
        if self._sent is not None:
            self.value = self._sent.value
        else:
            buffer = self._place
            self.value = (self._open() if buffer is None else buffer).finish()
            self._place = None


class _ItemRead:
    """Every array of one item, each read once however many leaves are tied to it."""

    def __init__(self, item: OpenItem, binding: plan.Binding, touched: TargetState) -> None:
        self.item = item
        self.binding = binding
        self._touched = touched
        self._arrays: dict[Any, _ArrayRead] = {}
        self._of: dict[int, _ArrayRead] = {}
        reads = list(_reads(binding))
        times = collections.Counter(read.node.stored_name for read in reads)
        for read in reads:
            name = read.node.stored_name
            key = (name,) if times[name] == 1 else (name, *_sharing(read))
            self._of[id(read)] = self._arrays.setdefault(key, _ArrayRead(item, read, touched))

    def open(self, files: contextlib.ExitStack) -> ArrayReader | None:
        """Opens the item's arrays; None if none is read."""
        if not self._arrays:
            return None
        reader = self.item.open_reader()
        files.callback(reader.close)
        return reader

    def requests(
        self, buffers: device_copies.PinnedBuffers | None, *, verified: bool
    ) -> list[ReadRequest]:
        """Returns the requests for all arrays of the item."""
        return [
            request
            for array in self._arrays.values()
            for request in array.requests(buffers, verified=verified)
        ]

    def verification(self) -> list[ReadRequest]:
        """Returns requests that read every chunk of the arrays with digests, and keep nothing."""
        nodes = {
            array.binding.node.stored_name: array.binding.node for array in self._arrays.values()
        }
        return [] if self.item.record is None else [self.item.request(n) for n in nodes.values()]

    def assemble(self) -> Any:
        return walk.fold(self.binding, self._visit)

    def _visit(self, binding: plan.Binding) -> walk.Visit[plan.Binding, Any]:
        if isinstance(binding, plan.Build):
            return binding.children, functools.partial(_build, binding, self._touched)
        return walk.leaf(self._leaf(binding))

    def _leaf(self, binding: plan.Given | plan.ReadArray) -> Any:
        if isinstance(binding, plan.Given):
            return binding.value
        array = self._of[id(binding)]
        if binding.form == "as_saved" and binding.node.detail != array.binding.node.detail:
            # tied, but one is a Parameter and the other its plain view
            return decode.apply_tensor_role(
                cast("torch.Tensor", array.value).detach(), binding.node.detail
            )
        return array.value


def _build(binding: plan.Build, touched: TargetState, children: Sequence[Any]) -> Any:
    value = flatten.unflatten_one_level(binding.node, children, binding.like)
    if binding.into is not None:
        touched.value = True
        with memory.writing(binding.into):
            binding.into.copy_(value)
        return binding.into if binding.result is None else binding.result
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
    """Returns a key that is equal for tied leaves that can share one read."""
    if read.form == "fill":
        return ("fill", id(read.like), memory.storage_key(read.like))
    if read.form == "tensor":
        like = cast("torch.Tensor", read.like)
        is_parameter = isinstance(like, torch.nn.Parameter)
        tied = memory.storage_key(like) if not like.is_meta else None
        return ("tensor", like.dtype, str(like.device), is_parameter, tied)
    return (read.form,)
