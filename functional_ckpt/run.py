"""The parts of one run: its steps, the two flows, and the coordinator."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from functional_ckpt import checkpoint
from functional_ckpt.distributed.collective import run_on_all, run_on_primary
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.events import Events, Listeners
from functional_ckpt.handlers.base import Registry
from functional_ckpt.policies import keep_rules
from functional_ckpt.policies.checks import check_bool
from functional_ckpt.restoring import restore as restore_lib
from functional_ckpt.restoring.match import RestoreArguments
from functional_ckpt.restoring.restorer import Restorer
from functional_ckpt.saving import saver
from functional_ckpt.saving.node_publishing import NodePublishing
from functional_ckpt.saving.options import SaveOptions
from functional_ckpt.saving.publishing import SharedPublishing
from functional_ckpt.steps import acquire, names, orbax_adapters, template
from functional_ckpt.steps.fetch_parts import fetch_for_primary
from functional_ckpt.steps.first_tier import SharedTier
from functional_ckpt.steps.metadata import StepMetadata, step_metadata
from functional_ckpt.steps.names import check_step
from functional_ckpt.steps.node_local import NodeLocal
from functional_ckpt.steps.replication import start_replication
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.tiers import Tier, as_tiers, open_tiers
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.open import connect
from functional_ckpt.storage.paths import check_no_variables

_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """The parts of a manager, and the operations that need several of them.

    Attributes:
        steps: The directory, and those of the other tiers.
        options: How it saves.
        coordinator: How the ranks agree.
        saver: The save flow.
        restorer: The restore flow.
    """

    steps: Steps
    options: SaveOptions
    coordinator: Coordinator
    saver: saver.Saver
    restorer: Restorer

    def record_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records metrics of a committed step; one that is still being committed is waited for."""
        self.saver.wait_for(step)

        def prepare() -> None:
            self.steps.existing(check_step(step))
            saver.as_json(metrics, "metrics")

        def record() -> None:
            self.saver.record(check_step(step), saver.as_json(metrics, "metrics") or {})

        what = f"recording metrics of step {step}"
        run_on_primary(
            self.coordinator, what, record, prepare=prepare, after=self.steps.reload_local
        )

        def record_too() -> None:
            if self.steps.info(step) is not None:
                self.steps.record(step, saver.as_json(metrics, "metrics") or {})

        self.steps.first.on_other_heads(self.coordinator, what, record_too)

    def delete(self, step: int) -> None:
        """Removes a step from every tier, once no commit is under way."""
        self.steps.check_writable()

        def prepare() -> None:
            if self.saver.committer.is_busy:
                self.saver.wait()
            self.steps.existing(check_step(step))

        what, delete = f"deleting step {step}", functools.partial(self.saver.delete, [step])
        run_on_primary(self.coordinator, what, delete, prepare=prepare, after=self.steps.reload)
        self.steps.first.follow(self.coordinator, what, self.steps)

    def restore(
        self,
        step: int | None,
        into: Mapping[str, Any] | None,
        options: RestoreArguments,
        *,
        discard_later: bool,
    ) -> restore_lib.Restored:
        """Restores a step (None: the latest), and then removes the later ones if asked to."""
        if discard_later is True:
            self.steps.check_writable()
            self.saver.committer.wait()
        if step is not None:
            self.saver.wait_for(step)
        restored = self.restorer.restore(step, into, options, discard_later=discard_later)
        if discard_later and restored.step is not None:
            what = f"discarding steps later than {restored.step}"
            discard = functools.partial(self.saver.discard_later, restored.step)
            run_on_primary(self.coordinator, what, discard, after=self.steps.reload)
            self.steps.first.follow(self.coordinator, what, self.steps)
        self.steps.first.restored(self.steps, self.coordinator)
        return restored

    def restore_or(
        self,
        initial: Mapping[str, Any],
        options: RestoreArguments,
        *,
        fallback: str | os.PathLike[str] | None,
        on_corrupt: Literal["raise", "older"],
    ) -> restore_lib.Restored:
        """Restores the latest step, else the checkpoint `fallback`, else the initial values."""
        restored = self.restorer.restore_or(
            initial, options, fallback=fallback, on_corrupt=on_corrupt
        )
        if restored.step is not None:
            self.steps.first.restored(self.steps, self.coordinator)
        if restored.step is not None or fallback is None:
            return restored
        found: list[restore_lib.Restored] = []

        def restore() -> None:
            registry = self.restorer.registry
            found.append(checkpoint.restore(fallback, initial, registry=registry, **options))

        run_on_all(self.coordinator, f"restoring {fallback}", restore)
        if self.coordinator.rank == 0:
            _log.info("%s: starting with the values of %s", self.steps.root, fallback)
        return found[0].with_defaults(restored)

    def path(self, step: int) -> str:
        """Returns where a step is stored: in the nearest tier that holds it."""
        self.saver.wait_for(step)
        return self.steps.tiers_with(self.steps.existing(step))[0].path(step)

    def metadata(self, step: int | None) -> StepMetadata:
        """Returns the metadata of a step (None: the latest), without reading its arrays."""
        if step is not None:
            self.saver.wait_for(step)
        return step_metadata(self.steps, step)

    def release(self) -> None:
        """Releases the writer lock and the run's resources."""
        self.saver.release()
        self.coordinator.close()
        self.steps.unlock()


def open_run(
    directory: str | os.PathLike[str],
    options: SaveOptions,
    *,
    registry: Registry,
    step_name: names.NameFormat | str | None,
    latest_link: str | None,
    tiers: Sequence[Tier | str | os.PathLike[str]],
    read_only: bool,
    coordinator: Coordinator,
    on_event: Listeners | None,
    storage: Storage | None,
    node_local: NodeLocal | None,
    owner: object,
) -> Run:
    """Opens a directory of steps with its tiers; a writer takes its lock.

    The arguments are those of `CheckpointManager`; `owner` is the manager, for which the lock is
    held.

    Raises:
        LockedError: Another live writer holds the directory.
        UsageError: An argument is wrong.
    """
    with acquire.checking_arguments(coordinator):
        check_bool("read_only", read_only)
        known_tiers = as_tiers(tiers)
        paths = [("directory", directory), ("latest_link", latest_link)]
        for name, value in [*paths, *(("tiers", tier.path) for tier in known_tiers)]:
            check_no_variables(name, value)
        connected, root = connect(directory, storage)
        nodes = acquire.node_tier(node_local, coordinator)
        step_names = template.name_format_of(step_name, adapt=orbax_adapters.adapt_name_format)
        events = Events(on_event)
        events.rank = coordinator.rank
        steps = Steps(
            connected,
            root,
            step_names,
            events,
            read_only=read_only,
            latest_link=latest_link,
            first=nodes or SharedTier(coordinator),
        )
        if not known_tiers:
            keep_rules.check_not_passing("keep_policy", options.keep_policies)
    make = SharedPublishing if nodes is None else functools.partial(NodePublishing, nodes)
    saving = saver.Saver(steps, registry, coordinator, options, make)
    restorer = Restorer(steps, registry, coordinator, saving.decider, saving.last_files)
    run = Run(steps, options, coordinator, saving, restorer)
    alike = options.compared(steps, step_names, known_tiers, node_local)
    try:
        acquire.open_directory(steps, coordinator, alike, owner=owner)
        saving.start()
        run_on_all(coordinator, "looking into the directory", steps.reload)
        if nodes is not None and known_tiers and not read_only:
            fetch_for_primary(coordinator, nodes.nodes, steps, nodes.commits)
        uploads, helpers = open_tiers(
            steps,
            known_tiers,
            step_names,
            coordinator,
            read_only=read_only,
            overwrite=options.overwrite,
            owner=owner,
        )
        saving.upload_by(uploads, helpers)
        if nodes is not None:
            copying = start_replication(nodes, steps, coordinator, owner=owner)
            saving.upload_by(uploads, (*helpers, *copying))
        if steps.lock is not None:
            steps.update_latest_link()  # a crash may have left it behind
    except BaseException:
        run.release()
        raise
    return run
