"""Tiers of committed steps, e.g. a local disk first, an object store second.

A save is complete when the first tier, the manager's own directory, holds the step. Each other tier
has policies that select steps, which are uploaded in the background. A step stays in the first tier
until all its uploads are complete.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Iterable, Mapping, Sequence

from functional_ckpt import errors
from functional_ckpt.distributed.collective import run_on_all
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.distributed.nodes import nodes_of
from functional_ckpt.events import Events
from functional_ckpt.policies import keep_rules, save_rules
from functional_ckpt.policies.checks import check_seconds
from functional_ckpt.policies.spelled import Spelled
from functional_ckpt.steps import orbax_adapters
from functional_ckpt.steps.names import NameFormat, is_taken_name
from functional_ckpt.steps.remote_tier import RemoteTier, is_outage, open_reachable
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.steps.upload_helper import UploadHelper
from functional_ckpt.steps.upload_shares import Shares
from functional_ckpt.steps.uploads import Uploads
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.open import check_storage, connect
from functional_ckpt.storage.paths import is_remote, resolve

# As long as requests to object stores are retried.
_PATIENCE_SECONDS = 300.0
_LOOK_SECONDS = 1.0
_BOARD = "uploads"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Tier(Spelled):
    """A directory or URI to which committed steps are copied.

    Attributes:
        path: A local path or the URI of an object store.
        save: Selects the committed steps to upload: a policy, or a list of them (any). None: all.
        keep: Selects the steps to keep there: a policy, or a list of them (any). None: all.
        max_delay_seconds: If the upload of a step is delayed for longer, the manager's next call
            raises. None: delays are only logged.
        storage: The store, if the caller has connected to it.
    """

    path: str | os.PathLike[str]
    save: save_rules.SavePolicies | None = None
    keep: keep_rules.KeepPolicies | None = None
    max_delay_seconds: float | None = None
    storage: Storage | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a negative delay, and for anything but a path and a store."""
        resolve(self.path)
        if self.storage is not None:
            check_storage(self.storage)
        check_seconds("max_delay_seconds", self.max_delay_seconds)


def as_tiers(tiers: Sequence[Tier | str | os.PathLike[str]]) -> tuple[Tier, ...]:
    """Returns a user's tiers; a bare path means `Tier(path=path)`."""
    if isinstance(tiers, (str, os.PathLike, Mapping)) or not isinstance(tiers, Iterable):
        raise errors.UsageError(f"tiers must be a list of tiers or paths; got {tiers!r}.")
    return tuple(tier if isinstance(tier, Tier) else Tier(path=tier) for tier in tiers)


def open_tiers(
    local: Steps,
    tiers: Sequence[Tier],
    names: NameFormat,
    coordinator: Coordinator,
    *,
    read_only: bool,
    overwrite: bool,
    owner: object,
) -> tuple[Uploads | None, tuple[UploadHelper, ...]]:
    """Registers the tiers' steps with `local`, and starts pending uploads.

    An unreachable tier is opened later; calls that need its steps wait for it.

    Returns:
        The uploads, on the primary of a writer, else None; and the helpers of other nodes' uploads,
        on the first rank of each node but the primary's.

    Raises:
        StorageError: A tier's store refuses.
        LockedError: Another live writer holds a tier.
        UsageError: Two tiers are the same directory, or one is inside another.
    """
    if not tiers:
        return None, ()
    is_writer = coordinator.rank == 0 and not read_only
    remote = [_remote_tier(tier, names, local.events, is_writer=is_writer) for tier in tiers]
    _check_apart([local.root, *(tier.root for tier in remote)], names)

    def show_open() -> None:
        opened = [tier.steps for tier in remote if tier.steps is not None]
        local.remote = tuple(opened)

    def reach(must: bool) -> None:
        for tier in remote:
            if tier.steps is None and (must or not is_writer):
                _reach(tier, must=must)

    for tier in remote:
        tier.on_open = show_open
    local.reach, local.has_tiers = reach, True
    local.has_stores = any(is_remote(tier.root) for tier in remote)
    ranks = () if read_only else (local.first.nodes or nodes_of(coordinator)).heads
    shares: list[Shares] = []
    if is_writer and len(ranks) > 1:
        board = coordinator.board(_BOARD)
        held = local.first.ranks_with
        shares = [
            Shares(board, n, ranks[1:], each.check_lock, held) for n, each in enumerate(remote)
        ]
    uploads = None
    if is_writer:
        uploads = Uploads(local, remote, overwrite=overwrite, owner=owner, shares=shares)
    begin = functools.partial(open_reachable, remote) if uploads is None else uploads.begin
    try:
        run_on_all(coordinator, "opening the tiers", begin)
    except BaseException:
        if uploads is not None:
            uploads.release()
        raise
    if is_writer or coordinator.rank not in ranks:
        return uploads, ()
    board, rank = coordinator.board(_BOARD), coordinator.rank
    return None, tuple(UploadHelper(local, each, board, n, rank) for n, each in enumerate(remote))


def _remote_tier(tier: Tier, names: NameFormat, events: Events, *, is_writer: bool) -> RemoteTier:
    keep = orbax_adapters.adapted_keep_policies(tier.keep)
    keep_rules.check_not_passing(f"keep of the tier {tier.path}", keep)

    def connect_once() -> TierSteps:
        storage, root = connect(tier.path, tier.storage, is_patient=False)
        if tier.storage is not None or storage.objects is None:
            queries.exists(storage, root)
        link = "latest" if is_writer else None
        return TierSteps(storage, root, names, events, read_only=not is_writer, latest_link=link)

    return RemoteTier(
        resolve(tier.path),
        connect_once,
        rule=orbax_adapters.adapted_save_rule(tier.save),
        keep=keep,
        max_delay_seconds=tier.max_delay_seconds,
    )


def _reach(tier: RemoteTier, *, must: bool) -> None:
    """Opens a tier that was unreachable; waits for it if its steps are needed."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            tier.open()
        except errors.CheckpointError as error:
            if not must and is_outage(error):
                return
            if not is_outage(error) or time.monotonic() >= deadline:
                error.add_note(f"Which steps {tier.root} holds must be known here.")
                raise
        else:
            return
        time.sleep(_LOOK_SECONDS)


def _check_apart(roots: Sequence[str], names: NameFormat) -> None:
    """Raises if a tier is inside another under a step's or a hidden name, or is the same."""
    known = [root if is_remote(root) else os.path.realpath(root) for root in roots]
    for number, root in enumerate(known):
        for other in known[:number]:
            if root == other:
                raise errors.UsageError(
                    f"{root} is two tiers at once: give each its own directory.", path=root
                )
            outer, inner = sorted((root, other), key=len)
            part = inner[len(outer) + 1 :].split("/")[0]
            if inner.startswith(f"{outer}/") and is_taken_name(part, names):
                raise errors.UsageError(
                    f"{inner} is in {outer}, which would take {part!r} for a step or for a file of "
                    "its own: give each tier its own directory.",
                    path=inner,
                )
