"""Copying a state while the next forward and backward run, with a fence before it changes.

Parameters and optimizer state change in `optimizer.step()` and hardly anywhere else. So a save need
not wait until they are copied: the copy runs in the background, and whoever is about to change them
waits for what is left of it. torch calls us before every step of every optimizer; `load_state_dict`
of the modules and optimizers involved is fenced too. After the copy the tensors are asked whether
they were changed all the same, which fails the save.

What lies on a CUDA device is copied by the device, and a step only enqueues work: so a step does
not wait on the host for that. It makes the device run it after the copy.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding
from functional_ckpt.runtime.device_copies import Transfers

__all__ = [
    "Fence",
    "PendingCopy",
    "UnfencedChanges",
    "changes_between_steps",
    "storage_of",
    "storages_of",
    "wait_for_all",
]


def storages_of(optimizers: Iterable[Any]) -> frozenset[int]:
    """Where the memory is of all that these optimizers update."""
    return frozenset(
        storage_of(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def changes_between_steps(optimizer: Any) -> bool:
    """Whether calls other than `step` change parameters: schedule-free optimizers swap them."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def storage_of(tensor: Any) -> int:
    """Where a tensor's memory begins, or that of this rank's part of it."""
    return sharding.local_of(tensor).untyped_storage().data_ptr()


class _Watched:
    """A tensor that must not change until it is copied, and what it was when the save began.

    Not everything that changes a tensor counts up its version: fused optimizers do not, nor what
    writes by way of `.data`, a numpy view or the storage.
    """

    __slots__ = ("_name", "_now", "_tensors")

    def __init__(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        self._name = name
        self._tensors = tensors
        self._now = self._look()

    def _look(self) -> tuple[list[int], int]:
        # Of a DTensor only the local part, which comes last, has memory.
        return [tensor._version for tensor in self._tensors], self._tensors[-1].data_ptr()

    def name_if_changed(self) -> str | None:
        """The leaf's name where it is not what it was."""
        return None if self._look() == self._now else self._name


class UnfencedChanges:
    """Leaves that were changed while they were copied: from then on they are copied at once.

    Attributes:
        is_all: Whether that goes for all leaves.
    """

    def __init__(self) -> None:
        self.is_all = False
        self._names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Notes leaves. All that changed are known: torch counted the change of each."""
        self._names.update(names)

    def add_all(self) -> None:
        """Notes that something changes leaves in a way that torch does not count."""
        self.is_all = True

    def __contains__(self, name: str) -> bool:
        return self.is_all or name in self._names


class PendingCopy:
    """What is left to copy of one save.

    Args:
        copy: Copies it all, or enqueues it as `transfers`; called once, in the background.
        optimizers: Whose steps must wait for it.
        step: The step being saved.
        transfers: The part of it that devices copy.
        unfenced: Where to note what was changed in spite of the fence.
    """

    def __init__(
        self,
        copy: Callable[[], None],
        optimizers: Sequence[Any],
        step: int,
        transfers: Transfers,
        unfenced: UnfencedChanges,
    ) -> None:
        self._step = step
        self._transfers = transfers
        self._is_enqueued = threading.Event()
        self._looking = threading.Lock()
        self._changed: list[str] | None = None
        self._copy: Callable[[], None] | None = copy
        self._watched: list[_Watched] = []
        self._storages = storages_of(optimizers)
        self._unfenced = unfenced
        self._find_changed: Callable[[], list[str]] | None = None
        self._done = threading.Event()

    def check(self, find_changed: Callable[[], list[str]]) -> None:
        """Has the copy compared, once it is made, with what was there at the save."""
        self._find_changed = find_changed

    def watch(self, name: str, *tensors: torch.Tensor) -> None:
        """Adds a leaf, as one or two tensors over the same memory."""
        self._watched.append(_Watched(name, tensors))

    def concerns(self, optimizer: Any) -> bool:
        """Whether an optimizer updates anything of this save."""
        return not self._storages.isdisjoint(storages_of((optimizer,)))

    def run(self) -> None:
        """Copies, and lets through who waits.

        Raises:
            SaveError: Something was changed in spite of the fence; or the copy failed.
        """
        try:
            if self._copy is not None:
                self._copy()
            self._is_enqueued.set()
            self._transfers.synchronize()
            changed = self._names_of_changed()
        finally:
            find_changed = self._find_changed
            self.give_up()
        self._unfenced.add(changed)
        if not changed and find_changed is not None and (changed := find_changed()):
            self._unfenced.add_all()
        if changed:
            raise self._failure(changed)

    def _failure(self, changed: Sequence[str]) -> errors.SaveError:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        next_time = "Everything is" if self._unfenced.is_all else "They are"
        return errors.SaveError(
            f"Saving step {self._step} failed: {', '.join(changed[:3])}{more} changed while "
            "being copied, by something other than a step of a torch optimizer or "
            f"load_state_dict. {next_time} copied before save returns from now on. Call "
            "manager.fence() before such an update, or make the manager with staging='eager'.",
            step=self._step,
        )

    def _names_of_changed(self) -> list[str]:
        """What was changed before the first step that was let through; from then on, all may."""
        with self._looking:
            if self._changed is None:
                watched = self._watched
                self._changed = [name for each in watched if (name := each.name_if_changed())]
            return self._changed

    def give_up(self) -> None:
        """Lets everyone through; nothing is copied any more."""
        try:
            self._transfers.synchronize()  # of a copy that failed, some may be under way
        finally:
            self._copy = None
            self._find_changed = None
            self._watched = []
            self._is_enqueued.set()
            self._done.set()

    def wait(self) -> None:
        """Returns when all is copied."""
        self._done.wait()

    def wait_to_step(self) -> None:
        """Returns when a step may begin that runs where the calling thread's current streams do.

        The parts of it that run on a device run there after the copy.
        """
        if not self._transfers or torch.compiler.is_dynamo_compiling():
            self.wait()  # events of ours are nothing to trace
            return
        self._is_enqueued.wait()
        self._names_of_changed()
        self._transfers.make_stream_wait()

    @property
    def is_done(self) -> bool:
        """Whether nobody has to wait."""
        return self._done.is_set()


class Fence:
    """Holds up what would change the state of a save that is still being copied.

    Attributes:
        unfenced: What has changed in spite of it.
    """

    def __init__(self) -> None:
        self.unfenced = UnfencedChanges()
        self._pending: PendingCopy | None = None
        self._guarded: weakref.WeakSet[Any] = weakref.WeakSet()
        self._handles: list[Any] = []
        _fences.add(self)
        _install()

    def arm(self, pending: PendingCopy, loadable: Iterable[Any]) -> None:
        """From now on, changes wait for this copy.

        Args:
            pending: What is being copied.
            loadable: The modules and optimizers whose `load_state_dict` would change it.
        """
        self._pending = pending
        for each in loadable:
            if each not in self._guarded:
                self._guarded.add(each)
                register = each.register_load_state_dict_pre_hook
                self._handles.append(register(_before_load))

    def give_up(self) -> None:
        """Holds nothing up any more: the copy was made, or never will be."""
        if self._pending is not None:
            self._pending.give_up()

    def wait(self, optimizer: Any = None) -> None:
        """Returns when a step of the optimizer may begin; None: when everything is copied.

        Only steps are let through ahead of a device. Whoever else waits may write on any stream,
        from any thread, or from the host.
        """
        pending = self._pending
        if pending is None or pending.is_done:
            return
        if optimizer is None:
            pending.wait()
        elif pending.concerns(optimizer):
            pending.wait_to_step()

    def disarm(self) -> None:
        """Holds nothing up any more, and takes its hooks back."""
        self.wait()
        self._pending = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._guarded.clear()
        _fences.discard(self)


_fences: weakref.WeakSet[Fence] = weakref.WeakSet()
_is_installed = False


def _install() -> None:
    """Once for all: torch's own list of hooks is global, and an idle one costs nothing."""
    global _is_installed
    if not _is_installed:
        _is_installed = True
        register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    for fence in tuple(_fences):
        fence.wait(optimizer)


def wait_for_all() -> None:
    """Returns when nothing is being copied any more, in any manager."""
    for fence in tuple(_fences):
        fence.wait()


# A forked child has none of the threads that copy.
os.register_at_fork(after_in_child=_fences.clear)


# Functions of the module, not closures: a model is copied and pickled with its hooks.
def _before_load(*_: Any) -> None:
    wait_for_all()
