"""Rollback to an earlier step: finds the later steps, and removes them from every tier."""

from __future__ import annotations

from collections.abc import Sequence

from functional_ckpt import errors
from functional_ckpt.policies import lines
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.tier_steps import TierSteps


def later(steps: Steps, step: int) -> list[int]:
    """Returns the steps that are later than one: higher ones, and those of later generations.

    The latest is removed first: after a crash the remaining steps are a consistent older state.
    """
    infos = steps.all_infos()
    generation = next((info.generation for info in infos if info.step == step), 0)
    found = [
        info
        for info in infos
        if info.step != step and (info.step > step or info.generation > generation)
    ]
    found.sort(key=lines.age, reverse=True)
    return [info.step for info in found]


def remove(all_tiers: Sequence[TierSteps], doomed: Sequence[int], *, together: bool) -> None:
    """Removes steps from every tier that holds them.

    Args:
        all_tiers: The tiers, the first one last.
        doomed: The steps to remove, in this order.
        together: Hide all of them in every tier before the first is removed. After a crash all of
            them are hidden, and the next writer removes them.

    Raises:
        StorageError: Some could not be removed; the message names them. The others are removed.
    """
    root = all_tiers[-1].root
    tiers = [(tier, tier.held(doomed)) for tier in all_tiers]
    tiers = [(tier, held) for tier, held in tiers if held]
    if together:
        _hide(tiers)
    failures: list[errors.CheckpointError] = []
    for tier, held in tiers:
        names = tier.names_of(held)
        failed = tier.remove(held)
        failures += failed.values()
        if failed and not together:
            break  # steps still in the first tier can be deleted again
        if together:
            tier.unhide(name for step, name in names.items() if step not in failed)
    if len(failures) == 1 and not together:
        raise failures[0]
    if failures:
        fate = "They are out of sight; the next writer tries again. " if together else ""
        raise errors.StorageError(
            f"{root}: steps could not be removed. {fate}{'; '.join(map(str, failures))}",
            step=failures[0].step,
            path=root,
        ) from failures[0]


def _hide(tiers: Sequence[tuple[TierSteps, Sequence[int]]]) -> None:
    """Hides steps in every tier, or in none."""
    hidden: list[tuple[TierSteps, Sequence[int]]] = []
    try:
        for tier, held in tiers:
            hidden.append((tier, held))
            tier.hide(tier.names_of(held).values())
    except BaseException as error:
        for tier, held in hidden:
            try:
                tier.unhide(tier.names_of(held).values())
            except errors.CheckpointError as failure:
                error.add_note(f"{tier.root}: they may stay out of sight there: {failure}")
        raise
