"""Copies live tensors into host memory, the only copy that a save makes."""

from __future__ import annotations

import dataclasses
import mmap
import threading
from collections.abc import Sequence

from functional_ckpt.format import process
from functional_ckpt.format.write_files import ArrayWrite
from functional_ckpt.runtime import threads
from functional_ckpt.runtime.fence import Fence
from functional_ckpt.saving import parts as parts_lib
from functional_ckpt.saving import stage_overlapped
from functional_ckpt.saving.lower import LoweredItem
from functional_ckpt.saving.options import Blocking, Eager, Overlapped, Staging
from functional_ckpt.saving.parts import Array, Part, StagedItem, StagingMemory
from functional_ckpt.saving.plan import SavePlan


class LiveMemory:
    """Live memory that a commit reads while `save` waits.

    Args:
        size_bytes: The number of bytes that `wait` waits for.
    """

    def __init__(self, size_bytes: int) -> None:
        self._left_bytes = size_bytes
        self._lock = threading.Lock()
        self._done = threading.Event()
        self.is_interrupted = False

    def count_down(self, num_bytes: int) -> None:
        """Counts bytes that were read."""
        with self._lock:
            self._left_bytes -= num_bytes
            if self._left_bytes <= 0:
                self._done.set()

    def wait(self) -> None:
        """Waits until live memory may change."""
        self._done.wait()

    def interrupt(self) -> None:
        """Notes that the caller has stopped waiting, so that data read later may have changed."""
        self.is_interrupted = True

    def release(self) -> None:
        """Ends `wait`: nothing else is read."""
        self._done.set()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """The staged copies of a save, and the data it still reads from live memory.

    Attributes:
        items: The items to write.
        fence: Delays changes of values that are copied after `save` has returned, or None.
        live: The live memory that is written without a copy, or None.
    """

    items: tuple[StagedItem, ...]
    fence: Fence | None = None
    live: LiveMemory | None = None

    @property
    def num_bytes(self) -> int:
        """The size of the arrays that this rank writes."""
        return sum(item.num_bytes for item in self.items)

    @property
    def blocks_caller(self) -> bool:
        """Whether `save` returns once live memory is written, and not later."""
        return any(item.blocks_caller for item in self.items)

    @property
    def is_interrupted(self) -> bool:
        """Whether live memory may have changed while it was read."""
        return self.live is not None and self.live.is_interrupted

    def finish(self) -> None:
        """Copies the remaining values; the commit calls it first."""
        if self.fence is not None:
            self.fence.copy()

    def wait(self) -> None:
        """Waits until the caller may change the state; `save` calls it last."""
        if self.blocks_caller and self.live is not None:
            self.live.wait()

    def interrupt(self) -> None:
        """Notes that the caller was interrupted in `wait`, and may change the state."""
        if self.live is not None:
            self.live.interrupt()

    def abort(self) -> None:
        """Releases every waiting thread: after the commit, or instead of it."""
        if self.fence is not None:
            self.fence.give_up()
        if self.live is not None:
            self.live.release()


class Stager:
    """Stages the saves of one manager."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._memory = StagingMemory()
        self._fence = Fence() if isinstance(staging, Overlapped) else None

    def stage(self, items: Sequence[LoweredItem], plan: SavePlan, step: int | None) -> Staged:
        """Copies this rank's part, or prepares to copy or read it later."""
        process.check_process()
        staging = self._staging
        with threads.gc_paused():
            parts = [list(parts_lib.parts_of(item, plan[item.name])) for item in items]
        if isinstance(staging, Overlapped) and self._fence is not None:
            try:
                hosts = stage_overlapped.stage(
                    items, parts, self._memory, self._fence, step, is_checked=staging.checked
                )
            except BaseException:
                self._fence.give_up()  # else the next step would wait forever
                raise
            writes = [
                [part.write(host, is_stable=True) for part, host in _pairs(*each)]
                for each in zip(parts, hosts, strict=True)
            ]
            return Staged(items=_staged_items(items, plan, writes), fence=self._fence)
        budget_bytes = staging.budget_bytes if isinstance(staging, Eager) else 0
        return self._stage_within(items, plan, parts, budget_bytes)

    def _stage_within(
        self,
        items: Sequence[LoweredItem],
        plan: SavePlan,
        parts: Sequence[Sequence[Part]],
        budget_bytes: int | None,
    ) -> Staged:
        """Copies values up to the budget; the rest is written from live memory."""
        copied, referred = _split(parts, budget_bytes)
        live = None
        with threads.gc_paused():
            hosts = self._memory.reserve(copied)
            writes = [part.write(host, is_stable=True) for part, host in _pairs(copied, hosts)]
        if referred:
            arrays = parts_lib.refer(referred)
            live = LiveMemory(sum(array.nbytes for array in arrays))
            # A blocking save waits for the commit, and needs no count of read bytes.
            on_copied = None if isinstance(self._staging, Blocking) else live.count_down
            writes += [
                part.write(host, on_copied=on_copied) for part, host in _pairs(referred, arrays)
            ]
        parts_lib.copy(_pairs(copied, hosts), self._memory)
        by_part = dict(zip(map(id, (*copied, *referred)), writes, strict=True))
        ordered = [[by_part[id(part)] for part in item_parts] for item_parts in parts]
        return Staged(items=_staged_items(items, plan, ordered), live=live)

    def wait(self) -> None:
        """Waits until the overlapped copy is complete."""
        if self._fence is not None:
            self._fence.wait()

    def release(self) -> None:
        """Removes the fence's hooks and frees the memory."""
        if self._fence is not None:
            self._fence.disarm()
        self._memory.release()


def _split(
    parts: Sequence[Sequence[Part]], budget_bytes: int | None
) -> tuple[list[Part], list[Part]]:
    """Returns the parts within the budget, and the rest."""
    flat = [part for item_parts in parts for part in item_parts]
    if budget_bytes is None:
        return flat, []
    left = budget_bytes
    copied: list[Part] = []
    referred: list[Part] = []
    end = -1
    for part in flat:
        # The first of consecutive parts is aligned as in its file.
        size_bytes = part.slot.size_bytes + mmap.PAGESIZE * (part.planned.offset != end)
        is_within = size_bytes <= left
        end = part.planned.offset + part.slot.size_bytes if is_within else -1
        left -= size_bytes if is_within else 0
        (copied if is_within else referred).append(part)
    return copied, referred


def _pairs(parts: Sequence[Part], hosts: Sequence[Array]) -> list[tuple[Part, Array]]:
    return list(zip(parts, hosts, strict=True))


def _staged_items(
    items: Sequence[LoweredItem],
    plan: SavePlan,
    writes: Sequence[Sequence[ArrayWrite]],
) -> tuple[StagedItem, ...]:
    return tuple(
        StagedItem(lowered=item, files=plan[item.name].files, writes=tuple(own))
        for item, own in zip(items, writes, strict=True)
    )
