"""`CheckpointManager`: the steps of one run, saved, kept and restored."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.events import Listeners
from functional_ckpt.handlers import default_registry
from functional_ckpt.handlers.base import Registry
from functional_ckpt.policies import keep, rules
from functional_ckpt.policies.progress import Progress
from functional_ckpt.restoring import restore as restore_lib
from functional_ckpt.restoring.match import RestoreArguments
from functional_ckpt.restoring.restorer import check_step
from functional_ckpt.run import open_run
from functional_ckpt.saving import background, saver
from functional_ckpt.saving.calls import Calls, exclusive
from functional_ckpt.saving.options import Eager, SaveOptions, Staging, StepExtras
from functional_ckpt.steps import acquire, names, orbax_adapters
from functional_ckpt.steps.metadata import StepMetadata
from functional_ckpt.steps.tiers import Tier
from functional_ckpt.storage.base import Storage

__all__ = ["CheckpointManager"]


class CheckpointManager:
    """Keeps the steps of one training run in one directory.

    A step that was reported (by `Commit.result`, by the lists of steps) is complete and durable. A
    failure in the background is raised once, by the next `save`, `check_for_errors`,
    `wait_until_finished` or `close`. Calls from several threads wait for each other; one made
    within another, by a signal handler or a listener, is refused. A manager that is dropped without
    `close` keeps other writers out until its commit is over.

    Args:
        directory: A local path or the URI of an object store; created by a writer.
        save_policy: When `save` saves: a policy, or a list of them (any). Default: every call.
        keep_policy: Which steps stay: a policy, or a list of them (any). Default: all.
        registry: Chooses handlers for plain values.
        step_name: How a step's directory is named.
        latest_link: Name of a link in the directory to the latest step; None for no link.
        tiers: Where committed steps are copied to in the background, the nearest first; see `Tier`.
            Steps that `directory` no longer has are restored from there.
        overwrite: Whether a step that exists may be saved again; it is replaced atomically.
        read_only: Restore and look only, beside a live writer if there is one.
        staging: How a save copies the state. `fc.Eager()`: `save` copies all of it into host memory
            and returns, optionally within a memory budget. `fc.Overlapped()`: parameters and
            optimizer state are copied after `save` has returned, and the next optimizer step waits
            for the copy; see `fence`. `fc.Blocking()`: no copy; `save` returns when the step is
            durable.
        on_busy: Behaviour when a save is already in progress: `wait` for it, or `skip` this one.
        process_group: The ranks that save and restore together: a group of torch.distributed, for
            a replica that checkpoints alone; None for the default group, if there is one. They all
            make their managers alike, and call the methods in the same order.
        coordinator: How they agree, in place of `process_group`.
        on_event: Called with an `Event` when a step was staged, written, committed, uploaded or
            pruned; a function or several, which must be quick. Their errors are logged.
        storage: The file system; tests inject faults here.

    Raises:
        LockedError: Another live writer holds the directory.
        UsageError: An argument is wrong.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        save_policy: rules.SavePolicies | None = None,
        keep_policy: rules.KeepPolicies | None = None,
        registry: Registry | None = None,
        step_name: names.NameFormat | str | None = None,
        latest_link: str | None = None,
        tiers: Sequence[Tier | str | os.PathLike[str]] = (),
        overwrite: bool = False,
        read_only: bool = False,
        staging: Staging = Eager(),  # noqa: B008 - frozen
        on_busy: Literal["wait", "skip"] = "wait",
        process_group: Any = None,
        coordinator: Coordinator | None = None,
        on_event: Listeners | None = None,
        storage: Storage | None = None,
    ) -> None:
        options = SaveOptions(
            save_rule=orbax_adapters.adapted_save_rule(save_policy),
            keep_policies=orbax_adapters.adapted_keep_policies(keep_policy),
            overwrite=overwrite,
            on_busy=on_busy,
            staging=staging,
        )
        self._run = open_run(
            directory,
            options,
            registry=registry or default_registry(),
            step_name=step_name,
            latest_link=latest_link,
            tiers=tiers,
            read_only=read_only,
            coordinator=acquire.coordinator_of(coordinator, process_group),
            on_event=on_event,
            storage=storage,
            owner=self,
        )
        self._steps, self._saver = self._run.steps, self._run.saver
        self._calls = Calls(self._steps.root, self._saver.is_in_background)

    # ------------------------------------------------------------------------------ saving

    @exclusive
    def should_save(self, step: int, *, progress: Progress | None = None) -> bool:
        """Whether `save` would save this step now."""
        return self._saver.decider.should_save(check_step(step), saver.checked_progress(progress))

    @exclusive
    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        *,
        metrics: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> background.Commit | None:
        """Saves a step if the policy says so.

        When it returns, the caller may change every object it passed: the values at the moment of
            the call are stored.

        Args:
            step: Its number; any order.
            items: Name -> value or `CheckpointItem`.
            metrics: Measured at this step; JSON. Policies rank by them.
            progress: How far the training is. Policies such as `every("1ep")` decide by it, and a
                batch that was just saved, or that the run has gone on from, is not saved again.
            custom_metadata: Anything to keep beside it; JSON.
            force: Save whatever the policy says.

        Returns:
            A handle of the commit; None when the policy, or `on_busy="skip"`, said no.

        Raises:
            SaveError: An earlier save failed in the background.
            StepExistsError: The step exists, and the manager was made without `overwrite`.
            UnsupportedLeafError: Something cannot be stored; nothing was written.
        """
        return self._saver.save(
            check_step(step),
            items,
            about=StepExtras(metrics=metrics, progress=progress, custom_metadata=custom_metadata),
            force=force,
        )

    def check_start(self, step: int) -> None:
        """Raises `StepExistsError` if a run that starts at `step` would overwrite steps.

        Call it before the run starts; no effect with `overwrite`.
        """
        self._calls.check_usable()
        self._steps.check_start(check_step(step), overwrite=self._run.options.overwrite)

    @exclusive
    def record_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records metrics of a committed step that are known only now; durable when it returns.

        A read-only manager may do this too, so that an evaluator beside the trainer can: the
        trainer's keep policies see them at its next commit.

        Raises:
            StepNotFoundError: There is no such step.
        """
        self._run.record_metrics(check_step(step), saver.as_json(metrics, "metrics") or {})

    @exclusive
    def delete(self, step: int) -> None:
        """Removes a step from every tier: out of sight in one rename, then from disk.

        Raises:
            StepNotFoundError: There is no such step.
            StorageError: A tier refuses, or cannot be reached: the step is still in the first.
        """
        self._run.delete(check_step(step))

    # ------------------------------------------------------------------------------ restoring

    @exclusive
    def restore(
        self,
        step: int | None = None,
        items: Mapping[str, Any] | None = None,
        *,
        discard_later: bool = False,
        **options: Unpack[RestoreArguments],
    ) -> restore_lib.Restored:
        """Restores a step.

        Later steps stay as they are. Once a step is saved after the restore, they are *abandoned*:
        the latest step is the one that was saved, whatever its number.

        Without `items`, everything comes back as it was saved, as pytrees of CPU tensors. With
        `items`, stateful objects are filled in place and pytrees come back new, like the ones
        given.

        Args:
            step: Its number; None for the latest. One that is still being committed by this manager
                is waited for.
            items: The targets by item name; None restores the item as saved.
            discard_later: Remove the later steps from every tier, once this one was restored.
            options: The fields of `RestoreOptions`: `only`, `ignore`, `key_map`, `strict`, `cast`,
                `verify`, `share_reads`.

        Raises:
            StepNotFoundError: No such step or item.
            MismatchError: Checkpoint and target differ; nothing was touched.
            CorruptCheckpointError: Damaged bytes; `.touched` says whether the target was written
                into.
        """
        how = restore_lib.RestoreOptions(**options)
        number = None if step is None else check_step(step)
        return self._run.restore(number, items, how, discard_later=discard_later)

    @exclusive
    def restore_or(
        self, initial: Mapping[str, Any], **options: Unpack[RestoreArguments]
    ) -> restore_lib.Restored:
        """Resumes from the latest step if there is one, otherwise returns the initial values.

        The decision is logged, and is that of all ranks. Only in a directory without steps a run
        starts from scratch: a step that cannot be restored is an error.

        Args:
            initial: The items, as `restore` takes them; where there is no step, their values come
                back as they are, and `.step` is None.
            options: As of `restore`.

        Raises:
            MismatchError, CorruptCheckpointError: As `restore` does.
        """
        return self._run.restorer.restore_or(initial, restore_lib.RestoreOptions(**options))

    def metadata(self, step: int | None = None) -> StepMetadata:
        """Returns the metadata of a step (None: the latest), without reading its arrays."""
        self._calls.check_usable()
        return self._run.metadata(None if step is None else check_step(step))

    def metrics(self, step: int | None = None) -> Mapping[str, Any] | None:
        """The metrics of a step (None: the latest), late ones included, or None."""
        return self.metadata(step).metrics

    # ------------------------------------------------------------------------------ looking

    def all_steps(self) -> list[int]:
        """The committed steps, ascending; those that a rollback abandoned are among them.

        A read-only manager reads the directory again.
        """
        self._calls.check_usable()
        return self._steps.all()

    def latest_step(self) -> int | None:
        """The step that a run resumes from, or None: the highest of the present line.

        After a rollback that is the newest step saved since, though an abandoned one is higher.
        """
        self._calls.check_usable()
        return self._steps.newest()

    def best_step(
        self, metric: str | None = None, *, mode: Literal["max", "min"] = "max"
    ) -> int | None:
        """The step with the best metric, or None where no step has it.

        Args:
            metric: Its key; None for that of the keep policy's `best_n`.
            mode: Whether the highest or the lowest is best.

        Raises:
            CorruptCheckpointError: The metrics of a step are damaged: it may be the best.
        """
        self._calls.check_usable()
        if self._steps.read_only or any(info.problem for info in self._steps.all_infos()):
            self.reload()
        return keep.best_step(
            self._steps.all_infos(), metric, mode, self._run.options.keep_policies
        )

    def reload(self) -> None:
        """Reads the history from disk again."""
        self._calls.check_usable()
        self._steps.reload()

    def wait_for_new_step(
        self, after: int | None = None, *, timeout: float | None = None, poll: float = 1.0
    ) -> int | None:
        """Waits until the latest step comes after `after`, for evaluators that follow a run.

        After a rollback that may be a lower step, on the new line.

        Args:
            after: The step seen last; None for any step.
            timeout: Seconds to wait; None for no limit.
            poll: Seconds between looks.

        Returns:
            The latest step, or None when the time is up.
        """
        self._calls.check_usable()
        return self._steps.wait_for_new(after, timeout, poll)

    @property
    def directory(self) -> str:
        """Where the steps are."""
        return self._steps.root

    @property
    def num_ranks(self) -> int:
        """How many ranks save and restore together."""
        return self._run.coordinator.num_ranks

    # ------------------------------------------------------------------------------ life

    def is_saving_in_progress(self) -> bool:
        """Whether a commit is under way."""
        self._calls.check_process()
        return self._saver.committer.is_busy

    def fence(self) -> None:
        """Waits until the last save with `staging=fc.Overlapped()` has copied the state.

        Steps of torch's optimizers and `load_state_dict` wait by themselves. Call it before any
        other change of parameters or optimizer state: by hand, through `.data` or a numpy view.
        """
        self._calls.check_usable()
        self._saver.fence()

    def wait_until_finished(self) -> None:
        """Waits for the commit under way and for the tiers; raises what failed."""
        self._calls.check_usable()
        self._calls.check_not_within("wait_until_finished")
        self._saver.wait()

    def check_for_errors(self) -> None:
        """Raises the error of a save that failed in the background, once."""
        self._calls.check_usable()
        self._saver.raise_errors()

    @exclusive
    def reached_preemption(self, step: int) -> bool:
        """Whether the process has received SIGTERM and this step was saved for it.

        Needs `policies.Preemption()` among the save policies. False for a step that `save` has just
        declined or skipped: the signal came too late for it, and leaving the loop now would lose
        all steps since the last save. The next `save` is accepted.
        """
        return self._saver.decider.is_preempted(check_step(step))

    def close(self) -> None:
        """Waits for pending work, releases the writer lock, raises an unreported error."""
        if self._calls.is_over:
            return
        with self._calls.turn("close"):
            if self._calls.is_over:
                return
            self._saver.committer.wait()
            self._calls.close()
            self._saver.finish_uploads()
            self._run.release()
        self._saver.raise_errors()

    def __enter__(self) -> Self:
        self._calls.check_usable()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except errors.CheckpointError as failure:
            if error is None:
                raise
            error.add_note(f"While leaving the manager: {failure}")
