"""Copies a state while the next forward and backward run, with a fence before it changes.

Parameters and optimizer state change in `optimizer.step()` and hardly anywhere else. So a save need
not wait until they are copied: the copy runs in the background, and a step waits for the rest of
it. A hook runs before every step of every torch optimizer, and before `load_state_dict` of the
modules and optimizers of the save. If a tensor changed before it was copied, the save fails.

A device copies its own tensors, and a step only enqueues work on it. So a step does not block the
host for that copy: it makes the device run the step after the copy.
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


def storages_of(optimizers: Iterable[Any]) -> frozenset[int]:
    """Returns the storage addresses of the parameters that these optimizers update."""
    return frozenset(
        storage_of(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def changes_between_steps(optimizer: Any) -> bool:
    """Returns whether other calls than `step` change parameters, as in schedule-free optimizers."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def storage_of(tensor: Any) -> int:
    """Returns the address of a tensor's storage, or of this rank's part of it."""
    return sharding.local_of(tensor).untyped_storage().data_ptr()


class _Watched:
    """A tensor that must not change until it is copied, with its version at the start of the save.

    Not every change increments the version: fused optimizers, `.data`, numpy views and the storage
    do not.
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
        """Returns the leaf's name if it has changed."""
        return None if self._look() == self._now else self._name


class UnfencedChanges:
    """Leaves that changed while they were copied; later saves copy them before `save` returns."""

    def __init__(self) -> None:
        self.is_all = False
        self._names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Adds leaves whose change torch counted."""
        self._names.update(names)

    def __contains__(self, name: str) -> bool:
        return self.is_all or name in self._names


class PendingCopy:
    """The part of one save that is copied in the background.

    Args:
        copy: Makes the copy, or enqueues it as `transfers`; called once, in the background.
        optimizers: The optimizers whose steps must wait for it.
        step: The step being saved.
        transfers: The part of it that devices copy.
        unfenced: Gets the leaves that changed in spite of the fence.
    """

    def __init__(
        self,
        copy: Callable[[], None],
        optimizers: Sequence[Any],
        step: int | None,
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
        """Sets a function that returns the leaves whose copy differs from the state at the save."""
        self._find_changed = find_changed

    def watch(self, name: str, *tensors: torch.Tensor) -> None:
        """Adds a leaf, as one or two tensors over the same memory."""
        self._watched.append(_Watched(name, tensors))

    def concerns(self, optimizer: Any) -> bool:
        """Returns whether an optimizer updates a parameter of this save."""
        return not self._storages.isdisjoint(storages_of((optimizer,)))

    def run(self) -> None:
        """Copies, and lets waiting threads continue.

        Raises:
            SaveError: A leaf changed in spite of the fence; or the copy failed.
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
            self._unfenced.is_all = True  # torch does not count these changes
        if changed:
            raise self._failure(changed)

    def _failure(self, changed: Sequence[str]) -> errors.SaveError:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        next_time = "Everything is" if self._unfenced.is_all else "They are"
        return errors.SaveError(
            f"Saving step {self._step} failed: {', '.join(changed[:3])}{more} changed while "
            "being copied, by something other than a step of a torch optimizer or "
            f"load_state_dict. {next_time} copied before save returns from now on. Call "
            "manager.fence() before such an update, or make the manager with staging=fc.Eager().",
            step=self._step,
        )

    def _names_of_changed(self) -> list[str]:
        """Returns the leaves that changed before the first step that was let through."""
        with self._looking:
            if self._changed is None:
                found = (each.name_if_changed() for each in self._watched)
                self._changed = list(dict.fromkeys(name for name in found if name))
            return self._changed

    def give_up(self) -> None:
        """Lets every waiting thread continue; nothing more is copied."""
        try:
            self._transfers.synchronize()  # of a copy that failed, some may be under way
        finally:
            self._copy = None
            self._find_changed = None
            self._watched = []
            self._is_enqueued.set()
            self._done.set()

    def wait(self) -> None:
        """Returns when the copy is complete."""
        self._done.wait()

    def wait_to_step(self) -> None:
        """Returns when a step on the calling thread's current streams may start.

        The work that it enqueues on a device runs after the copy.
        """
        if not self._transfers:
            self.wait()
            return
        self._is_enqueued.wait()
        self._names_of_changed()
        self._transfers.make_stream_wait()

    @property
    def is_done(self) -> bool:
        """Whether the copy is complete or given up."""
        return self._done.is_set()


class Fence:
    """Holds up changes of a state that is still being copied.

    Attributes:
        unfenced: The leaves that have changed in spite of it.
    """

    def __init__(self) -> None:
        self.unfenced = UnfencedChanges()
        self._pending: PendingCopy | None = None
        self._guarded: weakref.WeakSet[Any] = weakref.WeakSet()
        self._handles: list[Any] = []
        _fences.add(self)

    def arm(self, pending: PendingCopy, loadable: Iterable[Any]) -> None:
        """Makes changes wait for a copy.

        `loadable` are the modules and optimizers whose `load_state_dict` would change the state.
        """
        _install()
        self._pending = pending
        for each in loadable:
            if each not in self._guarded:
                self._guarded.add(each)
                register = each.register_load_state_dict_pre_hook
                self._handles.append(register(_before_load))

    def copy(self) -> None:
        """Makes the copy that changes wait for; see `PendingCopy.run`."""
        if self._pending is not None:
            self._pending.run()

    def give_up(self) -> None:
        """Lets every change through: the copy was made, or never will be."""
        if self._pending is not None:
            self._pending.give_up()

    def wait(self, optimizer: Any = None) -> None:
        """Returns when a step of the optimizer may start; None: when the copy is complete.

        Only a step may run ahead of a device's copy. Other changes may be made on any stream, from
        any thread, or from the host.
        """
        pending = self._pending
        if pending is None or pending.is_done:
            return
        if optimizer is None:
            pending.wait()
        elif pending.concerns(optimizer):
            pending.wait_to_step()

    def disarm(self) -> None:
        """Waits for the copy and removes the hooks."""
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
    """Registers the hook once per process: torch's list of hooks is global.

    A compiled step leaves the graph for it: the compiler cannot trace events and addresses. To
    disable it imports the compiler, which every torch optimizer has imported when it was made.
    """
    global _is_installed
    if not _is_installed:
        _is_installed = True
        hook: Any = torch.compiler.disable(_before_step)
        register_optimizer_step_pre_hook(hook)


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    for fence in tuple(_fences):
        fence.wait(optimizer)


def wait_for_all() -> None:
    """Returns when the copies of all managers are complete."""
    for fence in tuple(_fences):
        fence.wait()


# A forked child has none of the threads that copy.
os.register_at_fork(after_in_child=_fences.clear)


# Functions of the module, not closures: a model is copied and pickled with its hooks.
def _before_load(*_: Any) -> None:
    wait_for_all()
