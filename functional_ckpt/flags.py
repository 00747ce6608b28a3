"""absl flags for launch scripts; defined when `define` is called, never at import.

CKPT = fc.flags.define()

def main(argv):
with fc.flags.manager(CKPT) as manager:
restored = fc.flags.restore(CKPT, manager, items)
start = 0 if restored is None else restored.step + 1
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from absl import flags as absl_flags

from functional_ckpt import checkpoint, errors, policies, restoring
from functional_ckpt.manager import CheckpointManager

__all__ = ["CheckpointFlags", "define", "manager", "restore"]

_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFlags:
    """The flags that one call of `define` made; read them after absl has parsed the command line.

    Attributes:
        directory: Where the steps are.
        save_every: A number of steps or a time string; None saves at every call.
        keep_latest: How many of the newest steps stay; None keeps all.
        keep_every: Keep every step whose number is a multiple; None for none.
        keep_best: `metric`, `metric:max` or `metric:min`; keeps the best step.
        overwrite: Whether a step that exists may be saved again.
        asynchronous: Whether saves are committed in the background.
        resume: `latest`, `none`, or the path of a checkpoint to start from.
        strict: Whether a difference between checkpoint and target is an error.
    """

    directory: absl_flags.FlagHolder[str | None]
    save_every: absl_flags.FlagHolder[str | None]
    keep_latest: absl_flags.FlagHolder[int | None]
    keep_every: absl_flags.FlagHolder[int | None]
    keep_best: absl_flags.FlagHolder[str | None]
    overwrite: absl_flags.FlagHolder[bool]
    asynchronous: absl_flags.FlagHolder[bool]
    resume: absl_flags.FlagHolder[str]
    strict: absl_flags.FlagHolder[bool]


def define(
    prefix: str = "ckpt",
    *,
    directory: str | None = None,
    flag_values: absl_flags.FlagValues = absl_flags.FLAGS,
) -> CheckpointFlags:
    """Defines the flags of one checkpoint manager.

    Args:
        prefix: What the flags' names begin with, for scripts with several managers.
        directory: The default directory; None makes the flag required.
        flag_values: Where to define them.

    Raises:
        UsageError: The prefix cannot begin a flag's name.
    """
    if not prefix.isidentifier():
        raise errors.UsageError(f"prefix must be an identifier such as 'ckpt'; got {prefix!r}.")
    where: dict[str, Any] = {"flag_values": flag_values}

    def name(suffix: str) -> str:
        return f"{prefix}_{suffix}"

    return CheckpointFlags(
        directory=absl_flags.DEFINE_string(
            name("dir"), directory, "Directory of the steps.", required=directory is None, **where
        ),
        save_every=absl_flags.DEFINE_string(
            name("save_every"), None, "Save every so often: 500, 500ba, 90m, 1h30m.", **where
        ),
        keep_latest=absl_flags.DEFINE_integer(
            name("keep_latest"), None, "Keep this many of the newest steps.", lower_bound=1, **where
        ),
        keep_every=absl_flags.DEFINE_integer(
            name("keep_every"), None, "Keep the multiples of this step too.", lower_bound=1, **where
        ),
        keep_best=absl_flags.DEFINE_string(
            name("keep_best"),
            None,
            "Keep the best too: METRIC, METRIC:max, METRIC:min.",
            **where,
        ),
        overwrite=absl_flags.DEFINE_bool(
            name("overwrite"), False, "Allow saving a step that exists.", **where
        ),
        asynchronous=absl_flags.DEFINE_bool(
            name("async"), True, "Commit in the background.", **where
        ),
        resume=absl_flags.DEFINE_string(
            name("resume"), "latest", "What to start from: latest, none, or a path.", **where
        ),
        strict=absl_flags.DEFINE_bool(
            name("strict"), True, "Fail where checkpoint and target differ.", **where
        ),
    )


def manager(defined: CheckpointFlags, **arguments: Any) -> CheckpointManager:
    """The manager that the flags describe.

    Args:
        defined: From `define`.
        arguments: Further arguments of `CheckpointManager`; policies are added to the flags'.

    Raises:
        UsageError: The flags contradict each other.
    """
    save = [policies.every(_number(defined.save_every.value))] if defined.save_every.value else []
    keep = _keep(defined)
    for key, own in (("save_policy", save), ("keep_policy", keep)):
        given = arguments.pop(key, None)
        own += given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    return CheckpointManager(
        str(defined.directory.value),
        save_policy=save or None,
        keep_policy=keep,
        overwrite=defined.overwrite.value,
        asynchronous=defined.asynchronous.value,
        **arguments,
    )


def restore(
    defined: CheckpointFlags, manager: CheckpointManager, items: Mapping[str, Any]
) -> restoring.Restored | None:
    """Restores what `--ckpt_resume` says, and logs it; None where there is nothing to resume."""
    source = defined.resume.value
    latest = manager.latest_step()
    if source == "none" or (source == "latest" and latest is None):
        _log.info("%s: starting anew (resume=%s)", manager.directory, source)
        return None
    if source == "latest":
        _log.info("%s: resuming from step %s", manager.directory, latest)
        return manager.restore(latest, items, strict=defined.strict.value)
    if latest is not None:
        raise errors.UsageError(
            f"resume={source} would start over in {manager.directory}, which already has step "
            f"{latest}; resume from latest, or give this run a new directory.",
            path=manager.directory,
            step=latest,
        )
    _log.info("%s: starting from %s", manager.directory, source)
    return checkpoint.restore(source, items, strict=defined.strict.value)


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


def _keep(defined: CheckpointFlags) -> list[Any]:
    keep: list[Any] = []
    if defined.keep_latest.value is not None:
        keep.append(policies.LatestN(defined.keep_latest.value))
    if defined.keep_every.value is not None:
        keep.append(policies.EveryNSteps(defined.keep_every.value))
    if defined.keep_best.value is not None:
        metric, colon, mode = defined.keep_best.value.partition(":")
        if not metric or (colon and mode not in ("max", "min")):
            raise errors.UsageError(
                f"{defined.keep_best.name} must be METRIC, METRIC:max or METRIC:min; got "
                f"{defined.keep_best.value!r}."
            )
        keep.append(policies.best_n(1, metric, mode="min" if mode == "min" else "max"))
    if keep and defined.keep_latest.value is None:
        keep.append(policies.LatestN(1))  # what a run resumes from
    return keep
