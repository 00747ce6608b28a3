"""Chooses the step to resume from, consistently on all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

from functional_ckpt import errors
from functional_ckpt.distributed import same_options
from functional_ckpt.distributed.collective import collective, fails_on_all
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.handlers import nested
from functional_ckpt.handlers.base import Item, Registry
from functional_ckpt.handlers.pytree import PyTree
from functional_ckpt.policies.checks import check_bool
from functional_ckpt.restoring import node_sources
from functional_ckpt.restoring import restore as restore_lib
from functional_ckpt.restoring.match import RestoreArguments, RestoreOptions
from functional_ckpt.steps import decide, history, rollback
from functional_ckpt.steps.last_files import LastFiles
from functional_ckpt.steps.names import check_step
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.storage import queries

_WHICH = "which step to restore"
_WHETHER = "whether there is a step to resume from"
_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True)
class Restorer:
    """Restores the steps of one run, on every rank."""

    steps: Steps
    registry: Registry
    coordinator: Coordinator
    decider: decide.SaveDecider
    last_files: LastFiles

    def restore(
        self,
        step: int | None,
        into: Mapping[str, Any] | None,
        options: RestoreArguments,
        *,
        discard_later: bool = False,
    ) -> restore_lib.Restored:
        """Restores a step; see `CheckpointManager.restore`."""
        with fails_on_all(self.coordinator, _WHICH):
            step = None if step is None else check_step(step)
            check_bool("discard_later", discard_later)
            how = RestoreOptions(**options)
        asked = {"step": step, "discard_later": discard_later, **options}
        number, holders = self._agree(step, asked)
        restored = self._restore(number, holders, into, how)
        if not discard_later:
            self._warn_of_later(number)
        return restored

    def restore_or(
        self,
        initial: Mapping[str, Any],
        options: RestoreArguments,
        *,
        fallback: str | os.PathLike[str] | None,
        on_corrupt: Literal["raise", "older"] = "raise",
    ) -> restore_lib.Restored:
        """Restores the latest step, or returns the initial values if there is none."""
        num_steps = 0

        def combine(values: Sequence[bytes]) -> bytes:
            same_options.check(values)
            return b"%d" % num_steps

        with collective(self.coordinator, _WHETHER, combine) as turn:
            _check_arguments(initial, on_corrupt)
            how = RestoreOptions(**options)
            turn.value = same_options.to_bytes(
                {"fallback": fallback, "on_corrupt": on_corrupt, **options}
            )
            num_steps = len(self.steps.all())
        if turn.outcome != b"0":
            number, holders = self._agree(None)
            self._tell("resuming from step %d (latest of %d)", number, int(turn.outcome))
            return self._restore_sound(number, holders, initial, how, on_corrupt)
        self._tell("no checkpoint found: starting from the initial values")
        self._check_others()
        return initial_values(initial)

    def _restore_sound(
        self,
        step: int,
        holders: Sequence[TierSteps],
        initial: Mapping[str, Any],
        options: RestoreOptions,
        on_corrupt: Literal["raise", "older"],
    ) -> restore_lib.Restored:
        """Restores a step, or the newest older one of its line that is intact."""
        if on_corrupt == "older" and not options.strict:
            # A leaf that an older step lacks would keep the data of the damaged one.
            options = dataclasses.replace(options, verify="first")
        latest = step
        damage: errors.CheckpointError | None = None
        while True:
            try:
                with _touched_by(damage):
                    restored = self._restore(step, holders, initial, options)
                break
            except errors.CorruptCheckpointError as error:
                damage = error
                older = self._older(step) if on_corrupt == "older" else None
                if older is None:
                    raise
                if self.coordinator.rank == 0:
                    _log.error("step %d is damaged, trying step %d: %s", step, older, error)
                    self.steps.emit("skipped", step)
            step, holders = self._agree(older)
        if step != latest:
            self._warn_of_later(step)
        return restored

    def _older(self, step: int) -> int | None:
        """Returns the step before this one on the current line, as the primary knows it."""

        def find(_: Sequence[bytes]) -> bytes:
            infos = self.steps.all_infos()
            known = [info.step for info in infos if info.step < step and not info.is_abandoned]
            return b"%d" % max(known) if known else b""

        found = self.coordinator.gather_broadcast("which step is older", b"", find)
        return int(found) if found else None

    def _tell(self, text: str, *values: object) -> None:
        if self.coordinator.rank == 0:
            _log.info(f"%s: {text}", self.steps.root, *values)

    def _check_others(self) -> None:
        """Warns of directories that look like steps when a run starts from scratch.

        Raises:
            StepNotFoundError: There are links to steps: they do not count, but their run must not
                start from scratch unnoticed.
        """
        storage, root = self.steps.storage, self.steps.root
        if linked := self.steps.linked():
            raise errors.StepNotFoundError(
                f"{root} has no steps, only links to steps ({', '.join(linked[:5])}), which do not "
                "count. Move the steps back, restore one by its number, or use another directory "
                "to start from scratch.",
                path=root,
            )
        others = [
            name
            for name in storage.list(root)
            if not name.startswith(".") and queries.is_directory(storage, os.path.join(root, name))
        ]
        if others and self.coordinator.rank == 0:
            _log.warning(
                "%s: starting from scratch, but %d subdirectories do not match step_name (%s)",
                root,
                len(others),
                ", ".join(others[:5]),
            )

    def _warn_of_later(self, step: int) -> None:
        """Warns of later steps: until the next save, a run would still resume from the latest."""
        if self.steps.read_only or self.coordinator.rank:
            return
        if later := rollback.later(self.steps, step):
            _log.warning(
                "%s: back to step %d: the %d later steps (up to %d) are abandoned by the next "
                "save and stay until a policy or delete() removes them; a step among them is "
                "replaced only with overwrite=True. restore(%d, discard_later=True) removes them.",
                self.steps.root,
                step,
                len(later),
                max(later),
                step,
            )

    def _restore(
        self,
        step: int,
        holders: Sequence[TierSteps],
        into: Mapping[str, Any] | None,
        options: RestoreOptions,
    ) -> restore_lib.Restored:
        """Restores from the nearest tier with the step; from the next one if it cannot be read."""
        nearest, *others = holders
        # Errors of one rank are raised on all, as the same class: all continue with the next tier.
        failures = (errors.CorruptCheckpointError, errors.StorageError, errors.StepNotFoundError)
        with self.steps.reading(step):
            try:
                return self._restore_from(nearest, step, into, options, others)
            except failures as error:
                failure: errors.CheckpointError = error
                if isinstance(error, errors.CorruptCheckpointError):
                    self.last_files.forget()
            for holder in others:
                if self._is_other_save(step, nearest, holder):
                    failure = failure.replace(
                        f"{failure.message} {holder.root} holds another save of step {step}, which "
                        f"does not replace it; fc.restore({holder.path(step)!r}) restores that one."
                    )
                    continue
                _log.warning("step %d: trying the next tier: %s", step, failure)
                try:
                    with _touched_by(failure):
                        return self._restore_from(holder, step, into, options)
                except failures as error:
                    failure = error
        raise failure

    def _is_other_save(self, step: int, nearest: TierSteps, holder: TierSteps) -> bool:
        """Returns whether a tier's copy is known to be another save; the same on all ranks."""

        def compare(_: Sequence[bytes]) -> bytes:
            return b"1" if holder.holds_other_save(step, nearest) else b""

        what = f"whether {holder.root} holds the same save of step {step}"
        return self.coordinator.gather_broadcast(what, b"", compare) != b""

    def _restore_from(
        self,
        holder: TierSteps,
        step: int,
        into: Mapping[str, Any] | None,
        options: RestoreOptions,
        others: Sequence[TierSteps] = (),
    ) -> restore_lib.Restored:
        storage, path = holder.storage, holder.path(step)
        nodes = None
        if self.steps.first.nodes is not None and holder is self.steps:
            nodes = node_sources.of_step(self.steps, self.coordinator, step, others)

        def open_step() -> checkpoint_dir.OpenCheckpoint:
            checkpoint = checkpoint_dir.open_checkpoint(storage, path, step)
            time_ns = checkpoint.metadata.get("commit_timestamp_nsecs")
            if type(time_ns) is int:
                self.steps.restored_commits[step] = history.commit_at(time_ns)
            return checkpoint

        try:
            with self.steps.events.bar(f"restoring step {step}") as shown:
                restored = restore_lib.restore_checkpoint(
                    open_step, into, self.registry, options, self.coordinator, shown, nodes
                )
        except (errors.CorruptCheckpointError, errors.StorageError) as error:
            if not queries.is_directory(storage, path):
                raise errors.StepNotFoundError(
                    f"Step {step} was removed while it was being read; restore another.",
                    step=step,
                    path=path,
                ) from error
            raise
        self.decider.mark_resumed(step, restored.progress)
        if holder is self.steps and not holder.read_only and options.verify is not False:
            self.last_files.restored(path, restored.items_by_name)
        return restored

    def _agree(
        self, step: int | None, asked: Mapping[str, object] | None = None
    ) -> tuple[int, list[TierSteps]]:
        """Returns the step that every rank restores, and the tiers that hold it, the nearest first.

        All ranks raise if one cannot restore it, or has other arguments (`asked`). The primary
        names the tiers, since only it uploads and prunes.
        """
        number = 0

        def combine(values: Sequence[bytes]) -> bytes:
            same_options.check(values)
            # A rank may list a directory before or after the newest commit: the primary's latest
            # counts.
            holders = self.steps.tiers_with(number)
            names = {tier: name for name, tier in self.steps.tiers_by_name().items()}
            return json.dumps([number, [names[each] for each in holders]]).encode()

        with collective(self.coordinator, _WHICH, combine) as turn:
            number = self.steps.latest() if step is None else self._existing(step)
            turn.value = same_options.to_bytes({"step": step} if asked is None else asked)
        number, names = json.loads(turn.outcome)
        return number, self.steps.tiers_named(names)

    def _existing(self, step: int) -> int:
        """Returns the step, if this rank has one."""
        if self.coordinator.rank and self.steps.has_tiers:
            return step
        return self.steps.existing(step)


def _check_arguments(initial: object, on_corrupt: object) -> None:
    if not isinstance(initial, Mapping):
        raise errors.UsageError(
            f"initial must be a mapping of names to values; got {type(initial).__name__}."
        )
    if on_corrupt not in ("raise", "older"):
        raise errors.UsageError(f"on_corrupt must be 'raise' or 'older'; got {on_corrupt!r}.")


@contextlib.contextmanager
def _touched_by(earlier: errors.CheckpointError | None) -> Generator[None]:
    """Raises errors inside with `touched` if an earlier attempt modified the target."""
    try:
        yield
    except errors.CheckpointError as error:
        if earlier is None or not earlier.touched or error.touched:
            raise
        message = f"{error.message} An earlier attempt modified the target: {earlier.message}"
        raise error.replace(message, touched=True) from error.__cause__


def initial_values(initial: Mapping[str, Any]) -> restore_lib.Restored:
    """Returns the result if nothing is restored: the initial values."""
    registry = Registry()
    values = {
        name: nested.unchanged(registry, value if isinstance(value, Item) else PyTree(value))
        for name, value in initial.items()
    }
    return restore_lib.Restored(values, starts_at=0)
