"""`CheckpointManager`: the steps of one run, saved, kept and restored."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, Unpack

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.events import Listeners
from functional_ckpt.handlers.base import Registry
from functional_ckpt.handlers.registry import chosen
from functional_ckpt.policies import keep, keep_rules, save_rules
from functional_ckpt.policies.progress import Progress
from functional_ckpt.restoring import restore as restore_lib
from functional_ckpt.restoring.match import RestoreArguments
from functional_ckpt.run import open_run
from functional_ckpt.saving import background, saver
from functional_ckpt.saving.calls import Calls, NotCopied, exclusive
from functional_ckpt.saving.options import Eager, SaveOptions, Staging
from functional_ckpt.steps import acquire, names, orbax_adapters, shown
from functional_ckpt.steps.metadata import StepMetadata
from functional_ckpt.steps.names import check_step
from functional_ckpt.steps.node_local import NodeLocal
from functional_ckpt.steps.tiers import Tier
from functional_ckpt.storage.base import Storage


class CheckpointManager(NotCopied, shown.Shown):
    """Saves, keeps and restores the steps of one training run in one directory.

    A reported step (`Commit.result`, the lists of steps) is complete and durable. A failure in the
    background is raised once, by the next `save`, `check_for_errors`, `wait_until_finished` or
    `close`. Calls from several threads wait for each other; a call inside another one, from a
    signal handler or a listener, is refused. A manager that is dropped without `close` locks its
    directory until its commit has ended.

    Args:
        directory: A local path or the URI of an object store; a writer creates it.
        save_policy: When `save` saves: a policy, or a list of them (any). Default: every call.
        keep_policy: Which steps are kept: a policy, or a list of them (any). Default: all.
        registry: Chooses handlers for plain values.
        step_name: The names of step directories: see `fc.step_names`.
        latest_link: Name of a link in the directory to the latest step; None for no link.
        tiers: Where committed steps are uploaded in the background, the nearest first; see `Tier`.
            Steps that `directory` lacks are restored from there.
        node_local: `fc.NodeLocal()` if `directory` is on each node's own disks.
        overwrite: Whether an existing step may be saved again; it is replaced atomically.
        read_only: Only restore and list steps, also beside a live writer.
        staging: How a save copies the state. `fc.Eager()`: `save` copies all of it into host memory
            and returns, optionally within a memory budget. `fc.Overlapped()`: parameters and
            optimizer state are copied after `save` has returned, and the next optimizer step waits
            for the copy; see `fence`. `fc.Blocking()`: no copy; `save` returns when the step is
            durable.
        on_busy: The behaviour of a save during another commit: `wait` for it, or `skip` this step,
            unless it is forced, saved for SIGTERM, or accepted by `AtEnd`.
        share_unchanged: Whether a large file that stays the same is a link to the last step's.
        process_group: The ranks that save and restore together: a group of torch.distributed; None
            for the default group, if there is one. All ranks pass equal arguments, and call the
            methods in the same order.
        timeout_seconds: How long a rank waits for another one; None for as long as `process_group`.
        coordinator: Coordinates the ranks instead of these two.
        on_event: Called with an `Event` for each step staged, written, committed, uploaded, pruned
            or skipped: a callable or several, which must be quick. Their exceptions are logged.
        storage: The file system; for tests.

    Raises:
        LockedError: Another live writer holds the directory.
        UsageError: An argument is invalid.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        save_policy: save_rules.SavePolicies | None = None,
        keep_policy: keep_rules.KeepPolicies | None = None,
        registry: Registry | None = None,
        step_name: names.NameFormat | str | None = None,
        latest_link: str | None = None,
        tiers: Sequence[Tier | str | os.PathLike[str]] = (),
        node_local: NodeLocal | None = None,
        overwrite: bool = False,
        read_only: bool = False,
        staging: Staging = Eager(),  # noqa: B008 - frozen
        on_busy: Literal["wait", "skip"] = "wait",
        share_unchanged: bool = True,
        process_group: Any = None,
        timeout_seconds: float | None = None,
        coordinator: Coordinator | None = None,
        on_event: Listeners | None = None,
        storage: Storage | None = None,
    ) -> None:
        group = acquire.coordinator_of(coordinator, process_group, timeout_seconds)
        with acquire.checking_arguments(group):
            options = SaveOptions(
                save_rule=orbax_adapters.adapted_save_rule(save_policy),
                keep_policies=orbax_adapters.adapted_keep_policies(keep_policy),
                overwrite=overwrite,
                on_busy=on_busy,
                share_unchanged=share_unchanged,
                staging=staging,
            )
            registry = chosen(registry)
        self._run = open_run(
            directory,
            options,
            registry=registry,
            step_name=step_name,
            latest_link=latest_link,
            tiers=tiers,
            read_only=read_only,
            coordinator=group,
            on_event=on_event,
            storage=storage,
            node_local=node_local,
            owner=self,
        )
        self._steps, self._saver = self._run.steps, self._run.saver
        self._calls = Calls(self._steps.root, self._saver.is_in_background)

    # ------------------------------------------------------------------------------ saving

    @exclusive
    def should_save(self, step: int, *, progress: Progress | None = None) -> bool:
        """Returns whether `save` would save this step now."""
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
        """Saves a step if the policy accepts it: the state at the moment of the call.

        Args:
            step: The step number, >= 0; any order.
            items: Item name -> value or item.
            metrics: Name -> number, measured at this step; JSON. Policies rank steps by them.
            progress: The training progress. Policies such as `every("1ep")` use it. A batch that
                was just saved or restored is not saved again.
            custom_metadata: Other metadata; JSON.
            force: Save regardless of the policy.

        Returns:
            A handle of the commit; None if the policy or `on_busy="skip"` refused.

        Raises:
            SaveError: An earlier save failed in the background.
            StepExistsError: The step exists, and the manager has `overwrite=False`.
            UnsupportedLeafError: A value cannot be stored; nothing was written.
        """
        return self._saver.save(
            step,
            items,
            metrics=metrics,
            progress=progress,
            custom_metadata=custom_metadata,
            force=force,
        )

    def check_start(self, step: int) -> None:
        """Raises `StepExistsError` if a run from `step` would overwrite without `overwrite`."""
        self._calls.check_usable()
        self._steps.check_start(check_step(step), overwrite=self._run.options.overwrite)

    @exclusive
    def record_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds metrics to a committed step; durable when it returns.

        A read-only manager may do this too; the trainer's keep policies see it at the next commit.

        Raises:
            StepNotFoundError: There is no such step.
        """
        self._run.record_metrics(step, metrics)

    @exclusive
    def delete(self, step: int) -> None:
        """Removes a step from every tier: hidden by one rename, then removed from disk.

        Raises:
            StepNotFoundError: There is no such step.
            StorageError: A tier refused or is unreachable: the first tier still has the step.
        """
        self._run.delete(step)

    # ------------------------------------------------------------------------------ restoring

    @exclusive
    def restore(
        self,
        step: int | None = None,
        into: Mapping[str, Any] | None = None,
        *,
        discard_later: bool = False,
        **options: Unpack[RestoreArguments],
    ) -> restore_lib.Restored:
        """Restores a step.

        Later steps stay. The next save abandons them: `latest_step` is then the saved step.

        Without `into`, everything is returned as it was saved, as pytrees of CPU tensors. With
        `into`, stateful objects are filled in place; pytrees are returned new, like the targets.
        `Restored.over(items)` returns the mapping for the next save.

        Args:
            step: The step number; None for the latest. Waits for a commit of this step.
            into: Item name -> target: a value or an item such as `fc.Optimizer(...)`. The target
                None restores an item as it was saved.
            discard_later: Remove the later steps from every tier after the restore: those with a
                higher number, and those of a line that started later.
            options: The fields of `RestoreOptions`: `only`, `ignore`, `key_map`, `strict`, `cast`,
                `verify`, `share_reads`.

        Raises:
            StepNotFoundError: No such step or item.
            MismatchError: Checkpoint and target differ; nothing was touched.
            CorruptCheckpointError: Damaged bytes; `.touched` says whether the target was changed.
        """
        return self._run.restore(step, into, options, discard_later=discard_later)

    @exclusive
    def restore_or(
        self,
        initial: Mapping[str, Any],
        *,
        fallback: str | os.PathLike[str] | None = None,
        on_corrupt: Literal["raise", "older"] = "raise",
        **options: Unpack[RestoreArguments],
    ) -> restore_lib.Restored:
        """Resumes from the latest step, or returns the initial values; logged, equal on all ranks.

        Args:
            initial: The targets, as of `restore`. Where there is no step, their values are returned
                as they are; `.step` is None and `.next_step` 0.
            fallback: A checkpoint, such as pretrained weights, restored where there is no step;
                `.next_step` is 0. With `strict=False` it may lack items.
            on_corrupt: For a damaged step: `raise`, or restore the newest `older` one that is
                intact. The damaged step stays; an error is logged and a `skipped` event sent.
            options: As of `restore`.

        Raises:
            MismatchError, CorruptCheckpointError: As `restore` does.
        """
        return self._run.restore_or(initial, options, fallback=fallback, on_corrupt=on_corrupt)

    def metadata(self, step: int | None = None) -> StepMetadata:
        """Returns the metadata of a step (None: the latest), with its metrics; reads no arrays."""
        self._calls.check_usable()
        return self._run.metadata(None if step is None else check_step(step))

    def path(self, step: int) -> str:
        """Returns the directory of a step, for `fc.restore` and tools: a path or a URI."""
        self._calls.check_usable()
        return self._run.path(check_step(step))

    # ------------------------------------------------------------------------------ looking

    def all_steps(self) -> list[int]:
        """Returns the committed steps, abandoned ones too; a read-only manager looks again."""
        self._calls.check_usable()
        return self._steps.all()

    def latest_step(self) -> int | None:
        """Returns the step that a run resumes from: the highest one since the last rollback."""
        self._calls.check_usable()
        return self._steps.newest()

    def best_step(
        self, metric: str | None = None, *, mode: Literal["max", "min"] = "max"
    ) -> int | None:
        """Returns the step with the best metric, or None if no step has it.

        Args:
            metric: Its name; None for the metric of the keep policy.
            mode: Whether the highest or the lowest value is best.

        Raises:
            CorruptCheckpointError: The metrics of a step are damaged: it may be the best.
        """
        self._calls.check_usable()
        if self._steps.read_only or any(info.problem for info in self._steps.all_infos()):
            self._steps.reload()
        policies = self._run.options.keep_policies
        return keep.best_step(self._steps.all_infos(), metric, mode, policies)

    def reload(self) -> None:
        """Reads every step from disk again."""
        self._calls.check_usable()
        self._steps.reload(reread=True)

    def wait_for_new_step(
        self, after: int | None = None, *, timeout: float | None = None, poll: float = 1.0
    ) -> int | None:
        """Waits until the latest step is newer than `after`, for evaluators that follow a run.

        Args:
            after: The last step seen; None for any step.
            timeout: Seconds to wait; None for no limit.
            poll: Seconds between looks at the directory.

        Returns:
            The latest step, after a rollback maybe a lower one; None after the timeout.
        """
        self._calls.check_usable()
        after = None if after is None else check_step(after)
        return self._steps.wait_for_new(after, timeout, poll)

    @property
    def directory(self) -> str:
        """The directory: an absolute path or a URI."""
        return self._steps.root

    @property
    def num_ranks(self) -> int:
        """The number of ranks that save and restore together."""
        return self._run.coordinator.num_ranks

    @property
    def waits_for_signal(self) -> bool:
        """Whether `policies.Preemption()` is among the save policies: SIGTERM is the manager's."""
        return self._saver.decider.waits_for_signal

    # ------------------------------------------------------------------------------ life

    def is_saving_in_progress(self) -> bool:
        """Returns whether a commit is in progress."""
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
        """Waits for the commit and the uploads in progress; raises their errors."""
        self._calls.check_usable()
        self._calls.check_not_within("wait_until_finished")
        self._saver.wait()

    def check_for_errors(self) -> None:
        """Raises the error of a save that failed in the background, once."""
        self._calls.check_usable()
        self._saver.raise_errors()

    @exclusive
    def reached_preemption(self, step: int) -> bool:
        """Returns whether SIGTERM has arrived and this step was saved for it.

        Needs `policies.Preemption()` among the save policies. False for a step that `save` has
        refused or skipped before the signal: leaving the loop now would lose all steps since the
        last save. The next `save` is taken.
        """
        return self._saver.decider.is_preempted(check_step(step))

    def close(self) -> None:
        """Waits for the commit, releases the writer lock, raises errors not yet raised."""
        if self._calls.is_over:
            return
        with self._calls.turn("close"):
            if self._calls.is_over:
                return
            self._saver.finish_commits()
            self._calls.close()
            self._saver.finish_uploads()
            self._run.release()
        self._saver.raise_errors()

    def _shown(self) -> shown.State:
        saving, policies = self._saver.committer.step, self._run.options.keep_policies
        return shown.State(self._steps, policies, saving, self._calls.is_over)

    def __enter__(self) -> Self:
        self._calls.check_usable()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except errors.CheckpointError as failure:
            if error is None:
                raise
            error.add_note(f"While leaving the manager: {failure}")
