"""Reading one checkpoint directory: open, match, read, lift. The manager and `fc.restore` share it.

Nothing of the caller's is written before everything has been matched; reads fill the target's own
memory.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch

from functional_ckpt.core import leaves, plan, structure, tree, walk
from functional_ckpt.core.spec import Box
from functional_ckpt.storage import arrays
from functional_ckpt.storage.layout import OpenItem

__all__ = ["Verify", "read_all"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Verify: TypeAlias = Literal["during", "before", "off"]


def read_all(
    bound: Sequence[tuple[OpenItem, plan.Binding]], *, verify: Verify, touched: Touched
) -> list[Any]:
    """Reads everything that the bindings name and builds their values.

    Args:
        bound: Items and what to make of them.
        verify: `during` checks each chunk as it is read; `before` checks all chunks first and so
            never writes a damaged byte into the target; `off` checks nothing.
        touched: Told when the first byte is about to go into the caller's memory.
    """
    jobs = [_Jobs(item, binding, touched) for item, binding in bound]
    if verify == "before":
        arrays.run_in_threads([task for job in jobs for task in job.verification()])
    verified = verify == "during"
    arrays.run_in_threads([task for job in jobs for task in job.tasks(verified=verified)])
    return [job.assemble() for job in jobs]


@dataclasses.dataclass(slots=True)
class Touched:
    """Whether a restore has begun to write into the caller's objects."""

    value: bool = False


class _Job:
    """One array on its way into memory; its chunks may arrive on several threads."""

    def __init__(self, item: OpenItem, binding: plan.ReadArray, touched: Touched) -> None:
        self.item = item
        self.binding = binding
        self.value: Any = None
        self._touched = touched
        self._lock = threading.Lock()
        self._destination: leaves.Destination | None = None
        self._num_parts = 1

    def tasks(self, *, verified: bool) -> list[Callable[[], None]]:
        node = self.binding.node
        record = self.item.record_of(node)
        if record is None:
            return [self._read_foreign]
        read = arrays.ArrayRead(
            name=node.stored_name,
            spec=node.spec,
            grid=record.grid,
            digests=record.digests if verified else None,
            box=Box.whole(node.spec.shape),
        )
        indices = list(record.grid.indices())
        self._num_parts = len(indices)
        if not indices:
            return [self._finish]
        return [functools.partial(self._read_part, read, index) for index in indices]

    def _read_part(self, read: arrays.ArrayRead, index: tuple[int, ...]) -> None:
        destination = self._open()
        arrays.read_part(self.item.database, read, index, destination.array)
        with self._lock:
            self._num_parts -= 1
            is_last = self._num_parts == 0
        if is_last:
            self._finish()

    def _read_foreign(self) -> None:
        node = self.binding.node
        array = self._open().array
        if array.size:
            arrays.read_foreign_array(
                self.item.database,
                node.name,
                array,
                is_zarr3=self.item.is_zarr3,
                fills_missing=self.item.fills_missing,
            )
        self._finish()

    def _open(self) -> leaves.Destination:
        with self._lock:
            if self._destination is None:
                if self.binding.form == "fill":
                    self._touched.value = True
                self._destination = _destination(self.binding)
            return self._destination

    def _finish(self) -> None:
        self.value = self._open().finish()
        self._destination = None


class _Jobs:
    """Every array of one item, each read once however many leaves are tied to it."""

    def __init__(self, item: OpenItem, binding: plan.Binding, touched: Touched) -> None:
        self.item = item
        self.binding = binding
        self._jobs: dict[Any, _Job] = {}
        self._of: dict[int, _Job] = {}
        for read in _reads(binding):
            key = (read.node.stored_name, *_sharing(read))
            job = self._jobs.setdefault(key, _Job(item, read, touched))
            self._of[id(read)] = job

    def tasks(self, *, verified: bool) -> list[Callable[[], None]]:
        return [task for job in self._jobs.values() for task in job.tasks(verified=verified)]

    def verification(self) -> list[Callable[[], None]]:
        nodes = {job.binding.node.stored_name: job.binding.node for job in self._jobs.values()}
        return [task for node in nodes.values() for task in self.item.verification(node)]

    def assemble(self) -> Any:
        return walk.fold(self.binding, self._visit)

    def _visit(self, binding: plan.Binding) -> walk.Visit[plan.Binding, Any]:
        if isinstance(binding, plan.Build):
            return binding.children, functools.partial(_build, binding)
        return walk.leaf(self._leaf(binding))

    def _leaf(self, binding: plan.Given | plan.ReadArray) -> Any:
        if isinstance(binding, plan.Given):
            return binding.value
        job = self._of[id(binding)]
        if binding.form == "as_saved" and binding.node.detail != job.binding.node.detail:
            # tied, but one is a Parameter and the other its plain view
            return leaves.dress(cast("torch.Tensor", job.value).detach(), binding.node.detail)
        return job.value


def _build(binding: plan.Build, children: Sequence[Any]) -> Any:
    value = tree.close_container(binding.node, children, binding.like)
    if binding.into is not None:
        with torch.no_grad():
            return binding.into.copy_(value)
    if isinstance(binding.like, torch.Tensor) and isinstance(value, torch.Tensor):
        return leaves.dress(value, {}, binding.like.device)
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
        return ("fill", id(read.like), leaves.identity(read.like))
    if read.form == "tensor":
        like = cast("torch.Tensor", read.like)
        is_parameter = isinstance(like, torch.nn.Parameter)
        tied = leaves.identity(like) if not like.is_meta else None
        return ("tensor", like.dtype, str(like.device), is_parameter, tied)
    return (read.form,)


def _destination(read: plan.ReadArray) -> leaves.Destination:
    if read.form == "fill":
        return _fill(read.node, cast("torch.Tensor", read.like))
    if read.form == "tensor":
        return _imitate(read.node, cast("torch.Tensor", read.like))
    if read.form == "ndarray":
        node = dataclasses.replace(read.node, kind="ndarray", detail={})
        return leaves.allocate(node)
    return leaves.allocate(read.node)


def _is_same_dtype(node: structure.ArrayNode, tensor: torch.Tensor) -> bool:
    stored = str(node.detail.get("dtype", node.spec.dtype))
    return stored == leaves.torch_dtype_name(tensor.dtype)


def _fill(node: structure.ArrayNode, tensor: torch.Tensor) -> leaves.Destination:
    """The tensor's own memory where a read can go straight there; else one bounded detour."""
    plain = not (tensor.is_conj() or tensor.is_neg()) and type(tensor) in (
        torch.Tensor,
        torch.nn.Parameter,
        torch.nn.Buffer,
    )
    is_direct = plain and tensor.device.type == "cpu" and _is_same_dtype(node, tensor)
    if is_direct and tensor.layout == torch.strided and 0 not in _used_strides(tensor):
        return leaves.Destination(leaves.host_view(tensor, node.spec.dtype), lambda: tensor)
    detour = leaves.allocate(dataclasses.replace(node, kind="tensor", detail=_only_dtype(node)))

    def finish() -> torch.Tensor:
        with torch.no_grad():
            return tensor.copy_(cast("torch.Tensor", detour.finish()))

    return leaves.Destination(detour.array, finish)


def _used_strides(tensor: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _only_dtype(node: structure.ArrayNode) -> Mapping[str, object]:
    return {key: value for key, value in node.detail.items() if key == "dtype"}


def _imitate(node: structure.ArrayNode, like: torch.Tensor) -> leaves.Destination:
    """New memory with the dtype and device of `like`; a meta tensor is imitated on the CPU."""
    detail = leaves.dressing(like)
    new = leaves.allocate(dataclasses.replace(node, kind="tensor", detail=_only_dtype(node)))
    device = None if like.is_meta else like.device

    def finish() -> torch.Tensor:
        tensor = cast("torch.Tensor", new.finish()).to(like.dtype)
        return leaves.dress(tensor, detail, device)

    return leaves.Destination(new.array, finish)
