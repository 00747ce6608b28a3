"""Whether to save a step: by every rank for itself where the number says it all, else by the primary for all."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Sequence

from functional_ckpt import preemption
from functional_ckpt.core import save_rule
from functional_ckpt.core.policy import SaveContext, StepInfo
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.steps import Steps

__all__ = ["Decider"]

# After a SIGTERM a peer may be gone for good, and the agent kills what is left after 30 seconds.
_PREEMPTED_TIMEOUT_SECONDS = 20.0


class Decider:
    """Asks the save policies.

    Args:
        rule: The policies; None saves every step.
        steps: The history.
        busy_step: Returns the step that is being committed, or None.
        coordinators: Told to hurry once the job is about to be killed; the first decides.
    """

    def __init__(
        self,
        rule: save_rule.SaveRule | None,
        steps: Steps,
        busy_step: Callable[[], int | None],
        coordinators: Sequence[Coordinator],
    ) -> None:
        self._rule = rule
        self._steps = steps
        self._busy_step = busy_step
        self._coordinators = tuple(coordinators)
        self._watch = preemption.Watch()
        self._start_time = datetime.datetime.now(datetime.UTC)
        self._agreed = False
        self._refused: int | None = None

    def start(self) -> None:
        """Listens for SIGTERM, if a policy waits for it."""
        if self._rule is not None and any(map(preemption.is_preemption, self._rule.policies)):
            self._watch.start()

    def stop(self) -> None:
        """Listens no more."""
        self._watch.stop()

    def is_preempted(self, step: int) -> bool:
        """Whether the job was told to stop and `step` is, or can still be, saved.

        False for a step that was just refused: the signal came too late for it, and whoever left the
        loop now would lose the steps since the last save. With many ranks, as all agreed at the last
        decision.
        """
        if step == self._refused:
            return False
        alone = self._coordinators[0].num_ranks == 1
        return self._agreed or (alone and self._watch.is_reached)

    def refuse(self, step: int) -> None:
        """Notes that a step was not saved."""
        self._refused = step

    def wants(self, step: int) -> bool:
        """Whether to save; one round between the ranks only where the step alone does not tell."""
        if self._rule is None:
            return True
        decided = self._rule.decide_step(step)
        if decided is not None:
            return decided
        told = b"1" if self._watch.is_reached else b""
        verdict = self._coordinators[0].exchange(
            f"whether to save step {step}", told, functools.partial(self._decide, self._rule, step)
        )
        if verdict[1:] == b"1":
            self._agreed = True
            for coordinator in self._coordinators:
                coordinator.hurry(_PREEMPTED_TIMEOUT_SECONDS)
        return verdict[:1] == b"1"

    def _decide(self, rule: save_rule.SaveRule, step: int, told: Sequence[bytes]) -> bytes:
        """On the primary: what the policies say, and whether any rank was told to stop."""
        reached = b"1" in told
        now = datetime.datetime.now(datetime.UTC)
        known = self._steps.infos
        busy = self._busy_step()
        if busy is not None:
            known = (*known, StepInfo(step=busy, time=now))
        context = SaveContext(
            is_saving_in_progress=busy is not None,
            reached_preemption=reached,
            start_time=self._start_time,
        )
        info = StepInfo(step=step, time=now)
        wanted = save_rule.decide_save(rule, info, known, context=context) is not None
        return (b"1" if wanted else b"0") + (b"1" if reached else b"0")
