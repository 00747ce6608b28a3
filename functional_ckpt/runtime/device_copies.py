"""Asynchronous copies between a device and host memory, on separate streams.

This module is independent of items and of waiting threads. The host's pages are locked if the
driver permits it, since only then is a copy asynchronous; a copy into other pages is correct, but
blocks the thread that starts it. Only CUDA devices (and ROCm's, which have the same name) are
supported.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.runtime import host_memory

_log = logging.getLogger("functional_ckpt")

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every device, not the current one alone


def is_streamed(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor's copies go through here."""
    return tensor.is_cuda


def _module_of(device: torch.device) -> Any:
    """Returns the module of torch with the streams and events of a device."""
    return torch.get_device_module(device)


# ------------------------------------------------------------------------------------ from a device


class CopyStreams:
    """One stream for each device, made when it is first needed and then kept."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def begin(self, devices: Iterable[torch.device]) -> Transfers:
        """Copies of device memory, ordered after the work that is enqueued so far.

        Args:
            devices: Their sources. Enqueued work is that on the streams that are current in the
                calling thread, as for `tensor.cpu()`.
        """
        starts: dict[torch.device, Any] = {}
        for device in devices:
            module = _module_of(device)
            if device not in self._streams:
                self._streams[device] = module.Stream(device)
            starts[device] = module.current_stream(device).record_event()
        return Transfers(self._streams, starts)


class Transfers:
    """The copies of one save; the caller keeps both ends of each until `synchronize` returns."""

    def __init__(
        self, streams: Mapping[torch.device, Any], starts: Mapping[torch.device, Any]
    ) -> None:
        self._streams = streams
        self._starts = starts
        self._ends: dict[torch.device, Any] = {}

    def __bool__(self) -> bool:
        """Returns whether there is anything to copy."""
        return bool(self._starts)

    def enqueue(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Starts to copy each second tensor, on a device, into the first, on the host.

        Call it once, on any thread.
        """
        from_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]]
        from_device = collections.defaultdict(list)
        for host, source in copies:
            from_device[source.device].append((host, source))
        for device, start in self._starts.items():
            module, stream = _module_of(device), self._streams[device]
            end = module.Event(blocking=True)  # who waits for it on the host sleeps meanwhile
            stream.wait_event(start)
            try:
                with module.stream(stream):
                    for host, source in from_device[device]:
                        # Non-contiguous tensors are made contiguous on the device first, one at a
                        # time: their memory comes from this stream, and no other gets it when it is
                        # let go.
                        host.copy_(source.contiguous(), non_blocking=True)
            finally:
                end.record(stream)
                self._ends[device] = end

    def make_stream_wait(self) -> None:
        """Orders later work of the calling thread after the copies; the host does not wait.

        Work that is being captured into a graph does not run now, and must not wait for work
        outside of the graph.
        """
        if not _is_capturing():
            for device, end in self._ends.items():
                _module_of(device).current_stream(device).wait_event(end)

    def synchronize(self) -> None:
        """Waits for the enqueued copies.

        Raises:
            RuntimeError: The device failed, now or before.
        """
        for end in self._ends.values():
            end.synchronize()


# ------------------------------------------------------------------------------------ to a device

_NUM_SLOTS = 4  # while two threads read into two, the others are on their way
_SLOT_BYTES = 8 * 2**20  # a multiple of digest blocks


class _Slot:
    """Host memory that is filled, and filled again once the device has it."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.sent: Any = None

    def wait(self) -> None:
        """Returns when the memory may be filled."""
        if self.sent is not None:
            self.sent.synchronize()
            self.sent = None


class PinnedBuffers:
    """A few pieces of host memory through which any number of bytes goes to devices.

    Close it before the sent tensors are used.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._memory = host_memory.StagingBuffer()
        self._slots: list[_Slot] = []
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()

    def prepare(self, device: torch.device) -> None:
        """Orders copies to a device after the calling thread's enqueued work."""
        if not self._slots:
            room = host_memory.Slot((_SLOT_BYTES,), np.dtype(np.uint8))
            self._slots = [_Slot(array) for array in self._memory.reserve([room] * _NUM_SLOTS)]
            self._memory.lock(lock_pages)
            for slot in self._slots:
                self._free.put(slot)
        if device not in self._streams:
            module = _module_of(device)
            stream = self._streams[device] = module.Stream(device)
            stream.wait_event(module.current_stream(device).record_event())

    def send(
        self, target: torch.Tensor, start: int, size_bytes: int, fill: Callable[[Array], None]
    ) -> None:
        """Sends bytes to a device; any thread may.

        Args:
            target: The bytes there, of a device that was prepared.
            start: Which is the first to change.
            size_bytes: How many are.
            fill: Writes them into the memory it is given, of at most 8 MiB at a time, from the
                first to the last.
        """
        stream, module = self._streams[target.device], _module_of(target.device)
        for begin in range(start, start + size_bytes, _SLOT_BYTES):
            end = min(begin + _SLOT_BYTES, start + size_bytes)
            slot = self._free.get()
            try:
                slot.wait()
                piece = slot.array[: end - begin]
                fill(piece)
                sent = module.Event(blocking=True)
                try:
                    # Inference mode is a thread's own, and may have been on where this was made.
                    is_inference = target.is_inference()
                    with module.stream(stream), torch.inference_mode(is_inference):
                        target[begin:end].copy_(torch.from_numpy(piece), non_blocking=True)
                finally:
                    sent.record(stream)
                    slot.sent = sent
            finally:
                self._free.put(slot)

    def close(self) -> None:
        """Returns when all is there, and gives the memory back."""
        for slot in self._slots:
            slot.wait()
        self._slots = []
        self._free = queue.SimpleQueue()
        self._memory.release()


# ------------------------------------------------------------------------------------ graphs


def _is_capturing() -> bool:
    """Returns whether the calling thread is capturing a CUDA graph on the current device."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_not_capturing() -> None:
    """Raises `UsageError` while a CUDA graph is captured, of which no save can be a part."""
    if _is_capturing():
        raise errors.UsageError(
            "A state cannot be saved while a CUDA graph is being captured; save before or after."
        )


# ------------------------------------------------------------------------------------ pages


def lock_pages(address: int, size_bytes: int) -> Callable[[], None] | None:
    """Locks host memory for copies that run by themselves.

    Returns:
        A function that unlocks it, to be called before the memory is freed; None if locking failed.
    """
    cudart: Any = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(address, size_bytes, _PORTABLE))
    if code == 0:
        return functools.partial(_unlock_pages, cudart, address, os.getpid())
    _log.warning(
        "%d bytes of host memory cannot be page-locked (CUDA error %d): copies from the device "
        "take longer, and do not run beside the training",
        size_bytes,
        code,
    )
    _forget_error()
    return None


def _unlock_pages(cudart: Any, address: int, process: int) -> None:
    is_forked = os.getpid() != process  # neither the lock nor the memory came along
    if not is_forked and int(cudart.cudaHostUnregister(address)) != 0:
        _forget_error()


def _forget_error() -> None:
    """Clears the CUDA error that was handled here: else torch raises it after the next launch."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
