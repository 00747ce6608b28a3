"""Selects the steps to upload to each tier, by its policies; recorded before any is pruned."""

from __future__ import annotations

from collections.abc import Sequence

from functional_ckpt.policies import lines, save_rules
from functional_ckpt.policies.base import SaveContext, StepInfo
from functional_ckpt.steps.promises import lacks_metrics
from functional_ckpt.steps.remote_tier import RemoteTier
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.steps.upload_queue import UploadQueue


class UploadChoice:
    """Decides which steps to upload to each tier. Call it with the queue's mutex held."""

    def __init__(
        self, local: Steps, tiers: Sequence[RemoteTier], queue: UploadQueue, *, overwrite: bool
    ) -> None:
        self._local = local
        self._tiers = tuple(tiers)
        self._queue = queue
        self._book = queue.book
        self._overwrite = overwrite

    def write(self) -> None:
        """Writes the record of promises durably."""
        self._local.check_lock()
        self._book.write(info.step for info in self._local.infos)

    def committed(self, info: StepInfo) -> None:
        """Promises a step that was committed to the tiers that want it."""
        self._queue.deleted.discard(info.step)
        for tier in self._tiers:
            self._book.decided[tier.root].pop(info.step, None)  # if it was overwritten
            self._queue.refused[tier.root].discard(info.step)
            if self._overwrite:
                self._book.replacing[tier.root].setdefault(info.step)
            self.consider(tier, tier.steps, info)
        self.promise_metrics()

    def may_replace(self, root: str, step: int) -> bool:
        """Returns whether a step may replace another commit of its number in a tier."""
        return self._overwrite or step in self._book.replacing[root]

    def consider(self, tier: RemoteTier, steps: TierSteps | None, info: StepInfo) -> None:
        """Decides whether to upload a step to a tier; later, if the tier must be opened first."""
        if info.step in self._book.decided[tier.root]:
            return
        wanted = True if tier.rule is None else tier.rule.decide_step(info.step)
        if wanted is None and self._book.was_damaged:
            wanted = True  # it may have been promised
        if wanted is None and steps is None:
            return
        if wanted is None and steps is not None and tier.rule is not None:
            wanted = self._is_wanted(tier.root, tier.rule, steps, info)
        self._book.decided[tier.root].setdefault(info.step)
        if wanted:
            self._book.promise(tier.root, info.step)

    def _is_wanted(
        self, root: str, rule: save_rules.SaveRule, steps: TierSteps, info: StepInfo
    ) -> bool:
        promised = self._book.promised[root]
        known = {each.step: each for each in self._local.infos if each.step in promised}
        known |= {each.step: each for each in steps.infos}
        known.pop(info.step, None)
        line = lines.line_of(info)
        history = [known[step] for step in sorted(known) if line.holds(known[step])]
        return save_rules.decide_save(rule, info, history, context=SaveContext()) is not None

    def promise_metrics(self) -> bool:
        """Promises steps again whose copies lack metrics; returns whether there are any."""
        infos = self._local.with_late_metrics()
        found = [
            self.promise_metrics_to(tier, tier.steps, infos)
            for tier in self._tiers
            if tier.steps is not None
        ]
        return any(found)

    def promise_metrics_to(
        self, tier: RemoteTier, steps: TierSteps, infos: Sequence[StepInfo]
    ) -> bool:
        """As `promise_metrics`, for one tier."""
        held = {(info.step, info.time): info for info in steps.infos}
        found = False
        for info in infos:
            copy = held.get((info.step, info.time))
            if copy is not None and lacks_metrics(copy, info):
                found = self._book.promise(tier.root, info.step) or found
        return found

    def undecided(self, root: str) -> set[int]:
        """Returns the steps that may have to be uploaded to a tier that is not open yet."""
        decided = self._book.decided[root]
        return {info.step for info in self._local.infos if info.step not in decided}

    def pinned(self) -> set[int]:
        """Returns the steps that must not be removed from the first tier yet."""
        promised = {step for steps in self._book.promised.values() for step in steps}
        return promised.union(*(self.undecided(tier.root) for tier in self._tiers))

    def is_pending(self, root: str) -> bool:
        """Returns whether a tier still waits for a step."""
        is_open = any(tier.root == root and tier.steps is not None for tier in self._tiers)
        is_promised = self._queue.next(root) is not None
        return is_promised or (not is_open and bool(self.undecided(root)))
