"""Further places for committed steps: local ones are fast, remote ones are kept.

A save is over when the first tier, the manager's own directory, holds the step. From there it goes
to the others in the background, as each one's policies ask. A step stays in the first tier until
those hold it that it was promised to.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import Coordinator, run_on_primary
from functional_ckpt.events import Events
from functional_ckpt.policies import rules
from functional_ckpt.steps import orbax_adapters
from functional_ckpt.steps.directory import Steps
from functional_ckpt.steps.names import NameFormat
from functional_ckpt.steps.uploads import Uploads, UploadTarget
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.open import connect

__all__ = ["Tier", "open_tiers"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """A place that committed steps are copied to.

    Attributes:
        path: A local path or the URI of an object store.
        save: Which of the committed steps go there: a policy, or a list of which any says yes.
            None: every one.
        keep: Which of them stay there: a policy, or a list of which any says yes. None: all.
        max_delay_seconds: For how long a step may fail to arrive before that is an error, raised by
            the manager's next call. None: it is never one, only a warning.
        storage: The store, if the caller has made it.
    """

    path: str | os.PathLike[str]
    save: rules.SavePolicies | None = None
    keep: rules.KeepPolicies | None = None
    max_delay_seconds: float | None = None
    storage: Storage | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a delay that is none."""
        if self.max_delay_seconds is not None and not self.max_delay_seconds >= 0:
            raise errors.UsageError(
                f"max_delay_seconds must be None or >= 0; got {self.max_delay_seconds!r}."
            )


def open_tiers(
    local: Steps,
    tiers: Sequence[Tier],
    names: NameFormat,
    coordinator: Coordinator,
    *,
    read_only: bool,
) -> Uploads | None:
    """Makes the tiers' steps known to `local`, and begins to upload what they were promised.

    Returns:
        The uploads, on the primary of a writer; None elsewhere.

    Raises:
        StorageError: A tier's store refuses.
        LockedError: Another live writer holds a tier.
    """
    if not tiers:
        return None
    is_writer = coordinator.rank == 0 and not read_only
    remote = [_open(tier, names, local.events, is_writer=is_writer) for tier in tiers]
    local.remote = tuple(each.steps for each in remote)
    uploads = Uploads(local, remote) if is_writer else None
    try:
        run_on_primary(coordinator, "opening the tiers", uploads.begin if uploads else _nothing)
        for each in remote:
            each.steps.reload()
    except BaseException:
        if uploads is not None:
            uploads.release()
        raise
    return uploads


def _nothing() -> None:
    pass


def _open(tier: Tier, names: NameFormat, events: Events, *, is_writer: bool) -> UploadTarget:
    storage, root = connect(tier.path, tier.storage)
    rule = None
    if tier.save is not None:
        rule = rules.save_rule(tier.save, adapt=orbax_adapters.adapt_save_policy)
    return UploadTarget(
        steps=Steps(storage, root, names, events, read_only=not is_writer, latest_link="latest"),
        rule=rule,
        keep=orbax_adapters.adapted_keep_policies(tier.keep),
        max_delay_seconds=tier.max_delay_seconds,
    )
