"""The caller's half of a save: decide, lower, plan, stage, and hand over to the background."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format import write_direct
from functional_ckpt.handlers.base import Registry
from functional_ckpt.policies import lines
from functional_ckpt.policies.base import KeepPolicy
from functional_ckpt.policies.progress import Progress
from functional_ckpt.policies.rules import SaveRule
from functional_ckpt.runtime import threads
from functional_ckpt.runtime.fence import Fence, PendingCopy
from functional_ckpt.saving import background, commit, finalize, lower, stage, stage_overlapped
from functional_ckpt.saving import plan as plan_lib
from functional_ckpt.steps import decide, rollback
from functional_ckpt.steps.directory import Steps
from functional_ckpt.steps.tiers import Tier
from functional_ckpt.steps.uploads import Uploads

__all__ = ["StepExtras", "SaveOptions", "Saver", "as_json", "checked_progress"]

_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """How a manager saves; its arguments of the same names."""

    save_rule: SaveRule | None
    keep_policies: tuple[KeepPolicy, ...]
    overwrite: bool
    asynchronous: bool
    on_busy: Literal["wait", "skip"]
    staging: Literal["eager", "overlapped", "overlapped-checked"] = "eager"
    staging_budget_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.staging not in ("eager", "overlapped", "overlapped-checked"):
            raise errors.UsageError(
                "staging must be 'eager', 'overlapped' or 'overlapped-checked'; got "
                f"{self.staging!r}."
            )
        if self.is_overlapped and not self.asynchronous:
            raise errors.UsageError(f"staging={self.staging!r} needs asynchronous=True.")
        budget_bytes = self.staging_budget_bytes
        if budget_bytes is not None:
            if type(budget_bytes) is not int or budget_bytes < 0:
                raise errors.UsageError(
                    f"staging_budget_bytes must be a number of bytes; got {budget_bytes!r}."
                )
            if self.is_overlapped:
                raise errors.UsageError(
                    "staging_budget_bytes is for staging='eager': overlapped staging needs room "
                    "for everything that it copies later."
                )
        if self.on_busy not in ("wait", "skip"):
            raise errors.UsageError(f"on_busy must be 'wait' or 'skip'; got {self.on_busy!r}.")

    @property
    def is_overlapped(self) -> bool:
        """Whether parameters and optimizer state are copied after `save` returned."""
        return self.staging != "eager"

    def compared(self, steps: Steps, step_name: object, tiers: Sequence[Tier]) -> dict[str, Any]:
        """The options that all ranks must have alike. A host's staging memory is its own matter."""
        return {
            "read_only": steps.read_only,
            "step_name": step_name,
            "latest_link": steps.latest_link,
            "tiers": [dataclasses.replace(tier, storage=None) for tier in tiers],
            "save_policy": self.save_rule,
            "keep_policy": self.keep_policies,
            "overwrite": self.overwrite,
            "asynchronous": self.asynchronous,
            "on_busy": self.on_busy,
            "staging": self.staging,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepExtras:
    """What a step says besides its items; the arguments of `save` of the same names."""

    metrics: Mapping[str, Any] | None
    progress: Progress | None
    custom_metadata: Mapping[str, Any] | None


class Saver:
    """Saves the steps of one run, on every rank.

    Attributes:
        decider: Whether to save.
        committer: What is under way in the background.
    """

    def __init__(
        self, steps: Steps, registry: Registry, coordinator: Coordinator, options: SaveOptions
    ) -> None:
        self._steps = steps
        self._registry = registry
        self._coordinator = coordinator
        self._options = options
        self._room = stage.StagingMemory()
        self._fence = Fence() if options.is_overlapped else None
        self._planner = plan_lib.SavePlanner(coordinator)
        self.committer = background.CommitThread()
        in_background = coordinator.background()
        busy = threads.num_spare_cores() if options.asynchronous else write_direct.NUM_THREADS
        self._writer = commit.StepCommitter(
            steps,
            options.keep_policies,
            in_background,
            overwrite=options.overwrite,
            num_threads=busy,
        )
        self.decider = decide.SaveDecider(
            options.save_rule,
            steps,
            lambda: self.committer.step,
            (coordinator, in_background),
        )

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        *,
        about: StepExtras,
        force: bool,
    ) -> background.Commit | None:
        """Saves a step if the policy says so; `CheckpointManager.save` says what is what."""
        started = time.monotonic()
        progress = checked_progress(about.progress)
        # Ranks may learn of a failure at different calls. None leaves the others alone in a round.
        failure = self.committer.take_error()
        if not self.decider.should_save(step, progress, force=force):
            return self._refuse(step, failure)
        self._steps.check_writable()
        skips = self._options.on_busy == "skip" and not self.decider.is_preempted(step)
        if skips and self._is_any_busy(step):
            _log.info("step %d skipped: another is still being committed", step)
            return self._refuse(step, failure)
        self.committer.wait()
        failure = failure or self.committer.take_error()
        is_repeat = force and step == self.decider.last_saved
        prepared = failure or self._prepare(step, items, about, is_repeat=is_repeat)
        plan = self._planner.plan(
            prepared if isinstance(prepared, BaseException) else prepared[0], step
        )
        if isinstance(prepared, BaseException):
            raise prepared
        lowered, info = prepared
        with contextlib.ExitStack() as cleanup:
            interrupted = threading.Event()
            staged, pending, through = self._stage_or_abort(step, lowered, plan, cleanup)
            work = functools.partial(
                *(self._writer.commit, step, staged, info, pending),
                is_repeat=is_repeat,
                is_interrupted=interrupted.is_set,
            )
            interruption = self._emit_staged(step, staged, time.monotonic() - started)
            # From here on the commit cleans up, or its cancellation does.
            closing = cleanup.pop_all()
        work = functools.partial(_run_and_close, work, closing)
        is_awaited = is_repeat or not self._options.asynchronous
        try:
            handle = self.committer.start(step, work, closing.close)
            self.decider.mark_saved(step, progress)
            if interruption is not None:
                raise interruption
            if through is not None:
                through.wait()
            if is_awaited:
                self.committer.wait()
        except BaseException:
            # The caller may change what the commit has not read yet.
            if through is not None or not self._options.asynchronous:
                interrupted.set()
            raise
        if is_awaited and (error := self.committer.take_error()) is not None:
            cause = error.__cause__
            raise cause if isinstance(cause, errors.StepExistsError) else error
        return handle

    def _stage_or_abort(
        self,
        step: int,
        lowered: tuple[lower.LoweredItem, ...],
        plan: plan_lib.SavePlan,
        cleanup: contextlib.ExitStack,
    ) -> tuple[tuple[stage.StagedItem, ...], PendingCopy | None, stage.CopyLatch | None]:
        """Stages the items; where that fails, the other ranks are told.

        Args:
            step: The step.
            lowered: What to stage.
            plan: This rank's part.
            cleanup: Gets what is to be done after the commit, or instead of it.
        """
        if (lock := self._steps.lock) is not None:
            cleanup.callback(lock.leave, lock.enter())
        if self._fence is not None:
            # Else the next step would wait forever. And it keeps the fence where the manager is
            # dropped before all is copied.
            cleanup.callback(self._fence.give_up)
        try:
            staged, pending, through = self._stage(step, lowered, plan)
        except Exception as error:
            self._writer.abort(step, error)
            raise
        if through is not None:
            cleanup.callback(through.release)
        return staged, pending, through

    def _emit_staged(
        self, step: int, staged: Sequence[stage.StagedItem], seconds: float
    ) -> BaseException | None:
        """Tells the listeners; returns what interrupted them.

        The commit starts all the same: the other ranks take part in it already.
        """
        num_bytes = sum(item.num_bytes for item in staged)
        try:
            self._steps.emit("staged", step, seconds=seconds, num_bytes=num_bytes)
        except BaseException as error:  # noqa: BLE001 - raised once the commit has started
            return error
        return None

    def _stage(
        self, step: int, lowered: tuple[lower.LoweredItem, ...], plan: plan_lib.SavePlan
    ) -> tuple[tuple[stage.StagedItem, ...], PendingCopy | None, stage.CopyLatch | None]:
        """What to write, what of it is still to be copied, and what `save` must wait for."""
        budget_bytes = self._options.staging_budget_bytes
        if self._fence is None and self._options.asynchronous and budget_bytes is not None:
            staged, through = stage.stage_within(lowered, plan, self._room, budget_bytes)
            return staged, None, through
        if self._fence is None:
            room = self._room if self._options.asynchronous else None
            return stage.stage(lowered, plan, room), None, None
        staged, pending = stage_overlapped.stage_overlapped(
            lowered,
            plan,
            self._room,
            step,
            self._fence.unfenced,
            is_checked=self._options.staging == "overlapped-checked",
        )
        modules = [item.value for item in lowered if isinstance(item.value, torch.nn.Module)]
        loadable = [each for module in modules for each in module.modules()]
        optimizers = [optimizer for item in lowered for optimizer in item.optimizers]
        self._fence.arm(pending, [*loadable, *optimizers])
        return staged, pending, None

    def is_in_background(self) -> bool:
        """Whether the current thread commits for this manager, or calls a listener."""
        return self.committer.is_current() or self._steps.events.is_telling()

    def fence(self) -> None:
        """Returns when nothing is left to be copied."""
        if self._fence is not None:
            self._fence.wait()

    def upload_by(self, uploads: Uploads | None) -> None:
        """Committed steps go to the other tiers from now on."""
        self._writer.uploads = uploads
        if uploads is not None:
            uploads.on_arrived = self._writer.prune_uploaded
            self._writer.prune_uploaded()  # what arrived when the last manager was closing

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """On the primary: records metrics of a committed step in the tiers that hold it.

        The first tier's go to the others as its steps do; what it does not hold is recorded there.
        """
        uploads = self._writer.uploads
        self._steps.check_lock()  # of a directory that was moved away, only other tiers would know
        with contextlib.nullcontext() if uploads is None else uploads.exclusive():
            holders = self._steps.tiers_with(step)
            if holders[0] is self._steps:
                self._steps.record(step, metrics)
                if uploads is not None:
                    uploads.recorded()  # before anybody can remove the step
                return
        for each in holders:
            each.record(step, metrics)

    def delete(self, steps: Sequence[int], *, together: bool = False) -> None:
        """On the primary: removes steps from every tier, the first one last.

        Args:
            steps: In the order in which they are removed.
            together: Take all of them out of sight in one step.
        """
        uploads = self._writer.uploads
        with contextlib.nullcontext() if uploads is None else uploads.exclusive():
            remote = () if uploads is None else uploads.withdraw(steps)
            rollback.remove((*reversed(remote), self._steps), steps, together=together)

    def discard_later(self, step: int) -> None:
        """On the primary: removes every step that is newer than one, which was restored."""
        self.delete(rollback.later(self._steps, step), together=True)
        self._steps.resume_from(step)

    def wait_for(self, step: int) -> None:
        """Waits for the commit of a step, if it is under way; an error is raised by `wait`."""
        if self.committer.step == step and not self.is_in_background():
            self.committer.wait()

    def wait(self) -> None:
        """Waits for the commit under way and for the tiers; raises what failed."""
        self.committer.wait()
        self.raise_errors()
        if (uploads := self._writer.uploads) is not None:
            uploads.wait()
            uploads.raise_error()

    def raise_errors(self) -> None:
        """Raises, once, what failed in the background."""
        self.committer.raise_error()
        if (uploads := self._writer.uploads) is not None:
            uploads.raise_error()

    def finish_uploads(self) -> None:
        """Waits for what is on its way to further tiers; what fails now waits for the next run."""
        if (uploads := self._writer.uploads) is not None:
            uploads.close()

    def release(self) -> None:
        """Listens for signals no more, and gives the staging memory back."""
        if (uploads := self._writer.uploads) is not None:
            uploads.release()
        if self._fence is not None:
            self._fence.disarm()
        self.decider.stop()
        self._room.release()

    def _refuse(self, step: int, failure: BaseException | None) -> None:
        """The step is not saved; an earlier one's failure is raised all the same."""
        self.decider.mark_skipped(step)
        if failure is not None:
            raise failure

    def _is_any_busy(self, step: int) -> bool:
        """Whether a rank is still committing; all ranks get the same answer."""
        busy = b"1" if self.committer.is_busy else b""
        group = self._coordinator
        return group.gather_broadcast(f"whether to skip step {step}", busy, b"".join) != b""

    def _prepare(
        self,
        step: int,
        items: Mapping[str, Any],
        about: StepExtras,
        *,
        is_repeat: bool,
    ) -> tuple[tuple[lower.LoweredItem, ...], finalize.CheckpointInfo] | BaseException:
        """What this rank can do alone; an error is for all ranks to hear of, so it is returned."""
        coordinator = self._coordinator
        try:
            line = lines.Line()
            if coordinator.rank == 0:
                self._steps.check_lock()
                may_be_there = self._options.overwrite or is_repeat
                self._steps.check_free(step, about.progress, overwrite=may_be_there)
                line = self._steps.next_line()
                self._steps.warn_of_newer(step)
            info = finalize.CheckpointInfo(
                step=step,
                init_time_ns=time.time_ns(),
                metrics=as_json(about.metrics, "metrics"),
                progress=about.progress,
                custom_metadata=as_json(about.custom_metadata, "custom_metadata") or {},
                line=line,
            )
            lowered = lower.lower(
                items, self._registry, rank=coordinator.rank, ranks=coordinator.global_ranks
            )
        except Exception as error:  # noqa: BLE001 - handed to every rank by the planner, raised on this one
            return error
        return lowered, info


def _run_and_close(
    commit: Callable[[], errors.SaveError | None], closing: contextlib.ExitStack
) -> errors.SaveError | None:
    with closing:
        return commit()


def as_json(value: Mapping[str, Any] | None, what: str) -> Mapping[str, Any] | None:
    """The mapping, once it is known to be JSON; `what` it is, for the message."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise errors.UsageError(f"{what} must be a mapping with str keys; got {value!r:.80}.")
    plain = {key: _plain_number(each) for key, each in value.items()}
    lower.to_json(plain, what)
    return plain


def _plain_number(value: Any) -> Any:
    """A tensor or numpy scalar of one element as the number that it holds; the rest as it is."""
    is_scalar = callable(getattr(value, "item", None)) and getattr(value, "size", None) is not None
    if not is_scalar or (value.numel() if isinstance(value, torch.Tensor) else value.size) != 1:
        return value
    return value.item()


def checked_progress(progress: Progress | None) -> Progress | None:
    """The progress, once it is known to be one."""
    if progress is not None and not isinstance(progress, Progress):
        raise errors.UsageError(f"progress must be an fc.Progress or None; got {progress!r:.80}.")
    return progress
