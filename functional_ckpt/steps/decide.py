"""Decides whether to save: locally if the policies depend on the step only, otherwise on rank 0.

With several ranks a decision of rank 0 takes a round. If the policies depend on the clock and on
signals but not on the step, there is a round only when the clock or a signal requests it; see
`distributed.turns`.
"""

from __future__ import annotations

import datetime
import functools
import weakref
from collections.abc import Callable, Sequence

from functional_ckpt.distributed.coordinator import Combine, Coordinator, Turns
from functional_ckpt.policies import save_rules
from functional_ckpt.policies.base import SaveContext, StepInfo
from functional_ckpt.policies.progress import Progress
from functional_ckpt.policies.save import AtEnd
from functional_ckpt.steps import preemption
from functional_ckpt.steps.run_steps import Steps

# After a SIGTERM a peer may never answer, and the agent kills the rest after 30 seconds.
_PREEMPTED_TIMEOUT_SECONDS = 20.0
_YES, _NO = b"1", b"0"
# How late a signal or the clock may be noticed, absolutely and as a part of an interval; and how
# often at most the ranks look.
_LATEST_SECONDS, _LATEST_PART, _SHORTEST_SECONDS = 1.0, 0.001, 0.05


class SaveDecider:
    """Asks the save policies.

    Args:
        rule: The policies; None saves every step.
        steps: The history.
        busy_step: Returns the step that is being committed, or None.
        coordinators: Their timeouts are shortened once the job is about to be killed; decisions are
            made with the first one.
    """

    def __init__(
        self,
        rule: save_rules.SaveRule | None,
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
        self._accepted: int | None = None
        self._turns: Turns | None = None
        self._last: StepInfo | None = None
        self._last_batch: tuple[int, int] | None = None

    @property
    def signals(self) -> preemption.Watch:
        """Whether SIGTERM was received."""
        return self._watch

    @property
    def waits_for_signal(self) -> bool:
        """Whether one of the policies is `Preemption`."""
        return self._rule is not None and any(map(preemption.is_preemption, self._rule.policies))

    def start(self) -> None:
        """Installs the SIGTERM handler and starts the clock's thread, if a policy needs them."""
        if self._rule is None or self._steps.read_only:
            return
        if self.waits_for_signal:
            self._watch.start(has_pipe=preemption.snapshot_policy(self._rule) is not None)
        if self._rule.ignores_step and self._coordinators[0].num_ranks > 1:
            seconds = min(self._rule.shortest_seconds * _LATEST_PART, _LATEST_SECONDS)
            wants_round = weakref.WeakMethod(self._wants_round)  # the thread keeps no manager
            self._turns = self._coordinators[0].turns(
                max(seconds, _SHORTEST_SECONDS),
                lambda: (ask := wants_round()) is not None and ask(),
            )

    def stop(self) -> None:
        """Removes the handler and ends the thread."""
        self._watch.stop()
        if self._turns is not None:
            self._turns.close()

    def is_preempted(self, step: int) -> bool:
        """Returns whether the job received SIGTERM and `step` is, or can still be, saved.

        False for a step that was just declined: the signal came too late for it, and leaving the
        loop now would lose all steps since the last save. All ranks return the result of the last
        round.
        """
        if step == self._refused:
            return False
        if not self._is_shared:
            return self._watch.is_reached
        if self._turns is not None and self._rule is not None:
            self._decide_in_turn(self._turns, self._rule, step, None, decided=False)
        elif self._decided_step != step and not self._stop_agreed:
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
        self._accepted = None
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
        """Returns whether to save; one round between the ranks if that may depend on the step.

        Args:
            step: The step.
            progress: The training progress. A batch that this run has just saved or restored is
                not saved again.
            force: Return True; the ranks still exchange received signals.
        """
        if progress is not None and not force and (step, progress.batch) == self._last_batch:
            return False
        decided = True if force or self._rule is None else self._rule.decide_step(step)
        if self._turns is not None and self._rule is not None:
            return self._decide_in_turn(
                self._turns, self._rule, step, progress, decided=bool(decided)
            )
        if self._rule is None or (decided is not None and not (decided and self._is_shared)):
            return bool(decided)
        combine = functools.partial(self._decide, self._rule, step, progress, bool(decided))
        return self._ask(f"whether to save step {step}", step, combine)[:1] == _YES

    @property
    def _is_shared(self) -> bool:
        """Whether a signal to one rank makes other ranks save."""
        return self._watch.is_on and self._coordinators[0].num_ranks > 1

    def _ask(self, what: str, step: int, combine: Combine) -> bytes:
        """Runs one round, in which ranks report SIGTERM: `_YES` at the end of the outcome."""
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
        if self._turns is not None:
            self._turns.wake()

    def _decide_in_turn(
        self,
        turns: Turns,
        rule: save_rules.SaveRule,
        step: int,
        progress: Progress | None,
        *,
        decided: bool,
    ) -> bool:
        """Returns whether to save, by a round if one is due at this step."""
        if not self._stop_agreed and turns.enter(step):
            try:
                combine = functools.partial(self._decide, rule, step, progress, decided)
                verdict = self._ask(f"whether to save step {step}", step, combine)
                # Before the next round can be requested.
                self._accepted = step if verdict[:1] == _YES else None
            finally:
                turns.finish()
        elif self._accepted != step:
            self._accepted = None
        return decided or self._stop_agreed or self._accepted == step

    def _wants_round(self) -> bool:
        """In a thread: returns whether this rank requests a round: for a signal or the clock."""
        if self._stop_agreed or self._rule is None:
            return False
        if self._watch.is_reached:
            return True
        if self._coordinators[0].rank or self._accepted is not None:
            return False
        now, busy = datetime.datetime.now(datetime.UTC), self._busy_step()
        info = StepInfo(step=0, time=now)
        known, context = self._past(busy), self._context(busy, reached=False)
        return any(each.should_save(info, known, context=context) for each in self._rule.by_state)

    def _decide(
        self,
        rule: save_rules.SaveRule,
        step: int,
        progress: Progress | None,
        decided: bool,
        told: Sequence[bytes],
    ) -> bytes:
        """On the primary: returns the policies' decision, and whether any rank got SIGTERM."""
        reached = _YES in told
        now = datetime.datetime.now(datetime.UTC)
        busy = self._busy_step()
        context = self._context(busy, reached=reached)
        info = StepInfo(step=step, time=now, progress=progress)
        known = self._past(busy)
        wanted = decided or save_rules.decide_save(rule, info, known, context=context) is not None
        return (_YES if wanted else _NO) + (_YES if reached else _NO)

    def _context(self, busy: int | None, *, reached: bool) -> SaveContext:
        return SaveContext(
            is_saving_in_progress=busy is not None,
            reached_preemption=reached,
            start_time=self._start_time,
        )

    def _past(self, busy: int | None) -> tuple[StepInfo, ...]:
        """Returns the earlier steps of the line that this run saves on."""
        line = self._steps.next_line()
        known = {info.step: info for info in self._steps.all_infos() if line.holds(info)}
        if busy is not None and self._last is not None:
            known[busy] = self._last
        return tuple(known[step] for step in sorted(known))
