"""Opens and restores a run as the flags say."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

from functional_ckpt import checkpoint, errors, policies
from functional_ckpt.flags import check, values
from functional_ckpt.flags.values import CheckpointFlags
from functional_ckpt.handlers.base import Registry
from functional_ckpt.handlers.module import ModuleHandler
from functional_ckpt.handlers.registry import chosen, for_items
from functional_ckpt.manager import CheckpointManager
from functional_ckpt.restoring import restore as restore_lib
from functional_ckpt.restoring import restorer
from functional_ckpt.steps.node_local import NodeLocal

_log = logging.getLogger("functional_ckpt")


def manager(
    defined: CheckpointFlags, *, directory: str | os.PathLike[str] | None = None, **arguments: Any
) -> CheckpointManager:
    """Returns the manager that the flags describe.

    Args:
        defined: From `define`.
        directory: The checkpoint directory where the flag gives none.
        arguments: Other arguments of `CheckpointManager`; policies and tiers are added to the
            flags', and `staging` is the default of its flag.

    Raises:
        UsageError: The flags are malformed or contradict each other; every problem is named.
    """
    check.check(defined)
    where = defined.directory.value or directory
    if where is None:
        raise errors.UsageError(f"--{defined.directory.name} is required.")
    save = [values.interval(defined.save_every.value)] if defined.save_every.value else []
    keep = _keep(defined)
    for key, own in (("save_policy", save), ("keep_policy", keep)):
        given = arguments.pop(key, None)
        own += given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if defined.tier.value:
        arguments["tiers"] = [*defined.tier.value, *arguments.get("tiers", ())]
    if (replicas := defined.node_local_replicas.value) is not None:
        option = arguments.get("node_local") or NodeLocal()
        arguments["node_local"] = dataclasses.replace(option, replicas=replicas)
    if defined.staging.value is not None:
        arguments["staging"] = values.STAGING[defined.staging.value]
    return CheckpointManager(
        where,
        save_policy=save or None,
        keep_policy=keep,
        overwrite=defined.overwrite.value,
        **arguments,
    )


def restore(
    defined: CheckpointFlags,
    manager: CheckpointManager,
    items: Mapping[str, Any],
    *,
    registry: Registry | None = None,
) -> restore_lib.Restored:
    """Restores or starts as the flags say, and logs it: `.next_step` is the first step to run.

    Args:
        defined: From `define`.
        manager: Of the run.
        items: As `CheckpointManager.restore_or` takes them: where nothing is restored, their values
            come back as they are.
        registry: Chooses handlers for plain values of a checkpoint elsewhere.

    Raises:
        UsageError: The flags contradict each other, or the directory.
        StepExistsError: The run would start from scratch over existing steps, without overwrite.
    """
    check.check(defined)
    source, strict = defined.resume.value, defined.strict.value
    ignore = defined.ignore.value or None
    if source == "latest":
        restored = manager.restore_or(items, strict=strict, ignore=ignore)
        _log_report(restored)
        return restored
    manager.check_start(0)
    initial = restorer.initial_values(items)
    if source == "none":
        _log.info("%s: starting from the initial values (resume=none)", manager.directory)
        return initial
    registry = chosen(registry)
    wanted = _weights(items, registry) if defined.weights_only.value else items
    _log.info("%s: starting from %s of %s", manager.directory, ", ".join(wanted), source)
    found = checkpoint.restore(source, wanted, strict=strict, ignore=ignore, registry=registry)
    _log_report(found)
    return found.with_defaults(initial)


def _log_report(restored: restore_lib.Restored) -> None:
    if restored.report:
        _log.warning("Restored with differences:\n%s", restored.report)


def _weights(items: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    registry = for_items(registry, items)
    found = {
        name: value
        for name, value in items.items()
        if isinstance(registry.bind(value, name).handler, ModuleHandler)
    }
    if not found:
        raise errors.UsageError(f"weights_only: none of the items is a module: {', '.join(items)}.")
    return found


def _keep(defined: CheckpointFlags) -> list[Any]:
    keep: list[Any] = []
    if defined.keep_latest.value is not None:
        keep.append(policies.LatestN(defined.keep_latest.value))
    if defined.keep_every.value is not None:
        keep.append(policies.EveryNSteps(defined.keep_every.value))
    if defined.keep_best.value is not None:
        keep.append(values.best(defined.keep_best.value))
    if keep and defined.keep_latest.value is None:
        keep.append(policies.LatestN(1))  # the step that a run resumes from
    return keep
