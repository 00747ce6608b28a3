"""Decides whether to save: locally if the policies depend on the step only, otherwise on rank 0."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Sequence

from functional_ckpt.distributed.coordinator import Combine, Coordinator
from functional_ckpt.policies import rules
from functional_ckpt.policies.base import SaveContext, StepInfo
from functional_ckpt.policies.progress import Progress
from functional_ckpt.policies.save import AtEnd
from functional_ckpt.steps import preemption
from functional_ckpt.steps.run_steps import Steps

__all__ = ["SaveDecider"]

# After a SIGTERM a peer may never answer, and the agent kills the rest after 30 seconds.
_PREEMPTED_TIMEOUT_SECONDS = 20.0
_YES, _NO = b"1", b"0"


class SaveDecider:
    """Asks the save policies.

    Args:
        rule: The policies; None saves every step.
        steps: The history.
        busy_step: Returns the step that is being committed, or None.
        coordinators: Their time-outs are shortened once the job is about to be killed; the first
            decides.
    """

    def __init__(
        self,
        rule: rules.SaveRule | None,
        steps: Steps,
        busy_step: Callable[[], int | None],
        coordinators: Sequence[Coordinator],
    ) -> None:
        self._rule = rule
        self._steps = steps
        self._busy_step = busy_step
        self._coordinators = tuple(coordinators)
        self._watch = preemption.Watch(self._hurry)
        self._start_time = datetime.datetime.now(datetime.UTC)
        self._stop_agreed = False
        self._refused: int | None = None
        self._decided_step: int | None = None
        self._last: StepInfo | None = None
        self._last_batch: tuple[int, int] | None = None

    @property
    def waits_for_signal(self) -> bool:
        """Whether one of the policies is `Preemption`."""
        return self._rule is not None and any(map(preemption.is_preemption, self._rule.policies))

    def start(self) -> None:
        """Listens for SIGTERM, if a policy waits for it and steps are saved at all."""
        if self.waits_for_signal and not self._steps.read_only:
            self._watch.start()

    def stop(self) -> None:
        """Listens no more."""
        self._watch.stop()

    def is_preempted(self, step: int) -> bool:
        """Returns whether the job received SIGTERM and `step` is, or can still be, saved.

        False for a step that was just declined: the signal came too late for it, and leaving the
        loop now would lose all steps since the last save. With many ranks all get the same answer:
        that of the decision about this step, or where there was none, one round's.
        """
        if step == self._refused:
            return False
        if not self._is_shared:
            return self._watch.is_reached
        if self._decided_step != step and not self._stop_agreed:
            self._ask(f"whether to stop at step {step}", step, b"".join)
        return self._stop_agreed

    def is_last_chance(self, step: int, progress: Progress | None) -> bool:
        """Returns whether a step must not be skipped: the job ends here, by a signal or `AtEnd`."""
        info = StepInfo(step=step, time=datetime.datetime.now(datetime.UTC), progress=progress)
        policies = () if self._rule is None else self._rule.policies
        ends = [each for each in policies if isinstance(each, AtEnd)]
        is_end = any(each.should_save(info, (), context=SaveContext()) for each in ends)
        return is_end or self.is_preempted(step)

    @property
    def last_saved(self) -> int | None:
        """The step that this run saved last."""
        return None if self._last is None else self._last.step

    def mark_skipped(self, step: int) -> None:
        """Notes that a step was not saved."""
        self._refused = step

    def mark_saved(self, step: int, progress: Progress | None) -> None:
        """Notes that this run is saving a step."""
        now = datetime.datetime.now(datetime.UTC)
        self._last = StepInfo(step=step, time=now, progress=progress)
        self._last_batch = None if progress is None else (step, progress.batch)

    def mark_resumed(self, step: int, progress: Progress | None) -> None:
        """Notes that this run continues from a step."""
        self._steps.resume_from(step)
        self._last_batch = None if progress is None else (step, progress.batch)

    def should_save(
        self, step: int, progress: Progress | None = None, *, force: bool = False
    ) -> bool:
        """Returns whether to save; one round between the ranks unless the step alone decides.

        Args:
            step: The step.
            progress: How far the training is at it. A batch that this run has just saved, or has
                gone on from, is there already: the answer is no.
            force: The answer is yes, and the ranks still hear of a signal.
        """
        if progress is not None and not force and (step, progress.batch) == self._last_batch:
            return False
        decided = True if force or self._rule is None else self._rule.decide_step(step)
        if self._rule is None or (decided is not None and not (decided and self._is_shared)):
            return bool(decided)
        combine = functools.partial(self._decide, self._rule, step, progress, bool(decided))
        return self._ask(f"whether to save step {step}", step, combine)[:1] == _YES

    @property
    def _is_shared(self) -> bool:
        """Whether a signal to one rank concerns others."""
        return self._watch.is_on and self._coordinators[0].num_ranks > 1

    def _ask(self, what: str, step: int, combine: Combine) -> bytes:
        """One round in which every rank reports a received SIGTERM: `_YES` ends the outcome."""
        self._decided_step = step
        told = _YES if self._watch.is_reached else b""
        verdict = self._coordinators[0].gather_broadcast(what, told, combine)
        if verdict[-1:] == _YES:
            self._stop_agreed = True
            self._hurry()
        return verdict

    def _hurry(self) -> None:
        for coordinator in self._coordinators:
            coordinator.shorten_timeout(_PREEMPTED_TIMEOUT_SECONDS)

    def _decide(
        self,
        rule: rules.SaveRule,
        step: int,
        progress: Progress | None,
        decided: bool,
        told: Sequence[bytes],
    ) -> bytes:
        """On the primary: the policies' decision, and whether any rank received SIGTERM."""
        reached = _YES in told
        now = datetime.datetime.now(datetime.UTC)
        busy = self._busy_step()
        context = SaveContext(
            is_saving_in_progress=busy is not None,
            reached_preemption=reached,
            start_time=self._start_time,
        )
        info = StepInfo(step=step, time=now, progress=progress)
        known = self._past(busy)
        wanted = decided or rules.decide_save(rule, info, known, context=context) is not None
        return (_YES if wanted else _NO) + (_YES if reached else _NO)

    def _past(self, busy: int | None) -> tuple[StepInfo, ...]:
        """Returns the steps that came before in this run: those on the line that it saves on."""
        line = self._steps.next_line()
        known = {info.step: info for info in self._steps.all_infos() if line.holds(info)}
        if busy is not None and self._last is not None:
            known[busy] = self._last
        return tuple(known[step] for step in sorted(known))
