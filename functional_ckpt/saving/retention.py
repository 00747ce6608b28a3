"""Actions after a commit, on the primary: latest link, pending uploads, pruning.

The step is durable by now. Whatever fails here costs disk space or a link, never a step: so one
failure stops nothing else, and all of them are reported together at the end.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Generator, Sequence

from functional_ckpt import errors
from functional_ckpt.policies import lines, rules
from functional_ckpt.policies.base import KeepContext, KeepPolicy, StepInfo
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.uploads import Uploads

__all__ = ["clean_up", "prune"]


def clean_up(
    steps: Steps,
    keep_policies: Sequence[KeepPolicy],
    uploads: Uploads | None,
    info: StepInfo,
    replaced: str | None,
) -> list[str]:
    """Updates the link, enqueues the uploads, removes the steps that no policy keeps.

    Args:
        steps: The steps of the first tier.
        keep_policies: Which of them stay.
        uploads: Where committed steps go from here, if there are tiers.
        info: The step that was committed.
        replaced: Where the step is that it replaced, if it did.

    Returns:
        The failures, one line each.
    """
    failures: list[str] = []
    with _noting(failures):
        if uploads is not None:
            uploads.committed(info)
    is_promised = not failures  # otherwise a removed step could be in no tier
    with _noting(failures):
        steps.update_latest_link()
    with _noting(failures):
        if replaced is not None:
            steps.forget_late_metrics(info.step)
            steps.storage.remove(replaced)
    with _noting(failures):
        if is_promised:
            failures += prune(steps, keep_policies, uploads, committed=info.step)
    return failures


def prune(
    steps: Steps,
    keep_policies: Sequence[KeepPolicy],
    uploads: Uploads | None,
    *,
    committed: int | None = None,
    only_copied: bool = False,
) -> list[str]:
    """Removes the steps that the policies let go.

    Args:
        steps: The steps of the first tier.
        keep_policies: Which of them stay.
        uploads: Where committed steps go from here, if there are tiers.
        committed: The step that was just committed, if one was.
        only_copied: Keep steps that no other tier has.

    Returns:
        Why steps could not be removed, one line each.
    """
    if not keep_policies:
        return []
    alone = contextlib.nullcontext(set[int]()) if uploads is None else uploads.exclusive()
    with alone as promised:
        copied = {(info.step, info.time) for each in steps.remote for info in each.infos}

        def chosen() -> list[int]:
            known = [
                info
                for info in _let_go(steps, keep_policies, copied, committed)
                if not (info.step in promised or steps.is_being_read(info.step))
            ]
            return [i.step for i in known if not only_copied or (i.step, i.time) in copied]

        doomed = chosen()
        if doomed and steps.forget_missing():
            doomed = chosen()  # others removed steps that were counted as kept
        return [str(error) for error in steps.prune(doomed).values()]


def _let_go(
    steps: Steps,
    keep_policies: Sequence[KeepPolicy],
    copied: set[tuple[int, datetime.datetime]],
    committed: int | None,
) -> list[StepInfo]:
    """The steps that no policy keeps; the newest step only if another tier has it."""
    known = steps.with_late_metrics()
    context = KeepContext(now=datetime.datetime.now(datetime.UTC))
    gone = {*rules.steps_to_prune_after(committed, keep_policies, known, context=context)}
    present = [info for info in known if not info.is_abandoned]
    newest = lines.newest(present)
    if (
        newest is not None
        and (newest.step, newest.time) in copied
        and not rules.keeps_newest(keep_policies, present, context=context)
    ):
        gone.add(newest.step)
    return [info for info in known if info.step in gone]


@contextlib.contextmanager
def _noting(failures: list[str]) -> Generator[None]:
    try:
        yield
    except errors.CheckpointError as error:
        failures.append(str(error))
