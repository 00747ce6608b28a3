"""How the ranks of a run hold its first tier: in one directory, or in one on each node."""

from __future__ import annotations

import functools
import logging
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import Protocol

from functional_ckpt import errors
from functional_ckpt.distributed import same_options
from functional_ckpt.distributed.collective import run_on_primary
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.distributed.nodes import Nodes
from functional_ckpt.distributed.torch_store import num_unjoined
from functional_ckpt.format import parts
from functional_ckpt.policies import lines
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps import node_inventory, writer_lock
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.storage import commit

OPENING = "opening the directory"
_log = logging.getLogger("functional_ckpt")


class FirstTier(Protocol):
    """The directories of a first tier. A *head* is a rank that alone changes its directory.

    Attributes:
        on_replicated: Called, on the primary, with each step that other nodes have copied.
    """

    on_replicated: Callable[[int], None]

    @property
    def nodes(self) -> Nodes | None:
        """The nodes, each with a directory of its own; None for one directory of all ranks."""
        ...

    @property
    def is_head(self) -> bool:
        """Whether this rank is a head."""
        ...

    def open(self, steps: TierSteps, given: bytes) -> None:
        """Makes the heads the writers of their directories, unless `steps` is read-only.

        All ranks call; `given` are this rank's options, which must be equal.
        """
        ...

    def on_other_heads(self, group: Coordinator, what: str, action: Callable[[], object]) -> None:
        """Runs an action on every head but the primary; all ranks call."""
        ...

    def follow(self, group: Coordinator, what: str, steps: TierSteps) -> None:
        """Has the other heads remove the steps that the primary has removed; all ranks call."""
        ...

    def line(self, origin: StepInfo | None, line: lines.Line) -> lines.Line:
        """Returns the line of the next save.

        Args:
            origin: The step that was restored last, if any.
            line: The line that follows from the steps there are.
        """
        ...

    def restored(self, steps: TierSteps, group: Coordinator) -> None:
        """Notes durably that a step was restored; all ranks call."""
        ...

    def is_replicated(self, step: int, /) -> bool:
        """Returns whether other nodes hold verified copies of a step."""
        ...

    def ranks_with(self, step: int, /) -> Mapping[str, tuple[int, ...]] | None:
        """Returns the heads that hold each data file of a step; None if they share all files.

        All heads with a part of the step have its other files.
        """
        ...

    def held_back(self, infos: Iterable[StepInfo]) -> Set[int]:
        """Returns the steps that no policy may remove yet."""
        ...

    def forget(self, steps: Collection[int]) -> None:
        """Notes that steps were removed."""
        ...


class SharedTier:
    """One directory that all ranks see; the primary is its head. See `FirstTier`."""

    nodes: Nodes | None = None

    def __init__(self, group: Coordinator) -> None:
        self._group = group
        self.on_replicated: Callable[[int], None] = lambda _: None

    @property
    def is_head(self) -> bool:
        """See `FirstTier.is_head`."""
        return self._group.rank == 0

    def open(self, steps: TierSteps, given: bytes) -> None:
        """See `FirstTier.open`.

        Raises:
            LockedError: Another live writer holds the directory.
            UsageError: The directory is that of one node, and holds parts of steps.
            CoordinationError: The ranks have different options, or see different directories.
        """
        group, storage, hidden = self._group, steps.storage, steps.hidden
        mark = os.path.join(hidden, f"ranks.{uuid.uuid4().hex}.tmp")

        def become_writer(values: Sequence[bytes]) -> bytes:
            same_options.check(values)
            _check_no_parts(steps)
            lock_and_recover(steps, is_alone=group.num_ranks == 1)
            if group.num_ranks > 1:
                storage.write(mark, b"")
            return os.path.basename(mark).encode()

        if steps.read_only:
            group.gather_broadcast(OPENING, given, same_options.check)
            return
        name = group.gather_broadcast(OPENING, given, become_writer).decode()
        if group.num_ranks > 1:
            look = functools.partial(
                commit.check_visible, storage, os.path.join(hidden, name), group.rank
            )
            remove = functools.partial(storage.remove, mark)
            run_on_primary(
                group, "checking that all ranks share one directory", remove, prepare=look
            )

    def on_other_heads(self, group: Coordinator, what: str, action: Callable[[], object]) -> None:
        """Does nothing: there is no other head."""

    def follow(self, group: Coordinator, what: str, steps: TierSteps) -> None:
        """Does nothing: there is no other head."""

    def line(self, origin: StepInfo | None, line: lines.Line) -> lines.Line:
        """Returns the given line."""
        del origin
        return line

    def restored(self, steps: TierSteps, group: Coordinator) -> None:
        """Does nothing: nothing is written before the next save."""

    def is_replicated(self, step: int, /) -> bool:
        """Returns False: there is one directory."""
        del step
        return False

    def ranks_with(self, step: int, /) -> None:
        """Returns None: the ranks share one directory."""
        del step

    def held_back(self, infos: Iterable[StepInfo]) -> Set[int]:
        """Returns nothing."""
        del infos
        return frozenset()

    def forget(self, steps: Collection[int]) -> None:
        """Does nothing."""


def _check_no_parts(steps: TierSteps) -> None:
    """Raises UsageError for a node's directory: every node must take part in its changes."""
    storage, root = steps.storage, steps.root
    if storage.objects is not None or not parts.read_directory_id(storage, root):
        return
    if held := node_inventory.inventory(storage, root, steps.name_format):
        names = ", ".join(part.name for part in held[:10])
        raise errors.UsageError(
            f"{root} holds one node's parts of steps ({names}), which were saved with node_local. "
            "Pass node_local=fc.NodeLocal() on all nodes to continue the run, or read_only=True to "
            "read steps that are complete here.",
            path=root,
        )


def lock_and_recover(steps: TierSteps, *, is_alone: bool, keep: Set[str] = frozenset()) -> None:
    """Takes over a directory: locks it, then removes a dead writer's leftovers.

    Args:
        steps: The directory.
        is_alone: Whether this process has no other ranks, as far as it knows.
        keep: Names of unfinished directories that are kept.
    """
    commit.makedirs_durable(steps.storage, steps.hidden)
    is_alone = is_alone and num_unjoined() > 1
    try:
        steps.lock = writer_lock.take(steps.storage, os.path.join(steps.hidden, "lock"))
    except errors.LockedError as error:
        if is_alone:
            raise errors.LockedError(f"{error.message} {_NOT_JOINED}", path=error.path) from None
        raise
    if is_alone:
        _log.warning("%s: %s", steps.root, _NOT_JOINED)
    for line in steps.commits.recover(keep=keep):
        _log.warning("%s: %s", steps.root, line)


_NOT_JOINED = (
    "WORLD_SIZE is set and greater than 1, but torch.distributed is not initialized, so each "
    "process opens the directory alone: call torch.distributed.init_process_group before making "
    "the CheckpointManager."
)
