"""absl flags for launch scripts; defined when `define` is called, never at import.

A launch script needs four lines:

    CKPT = fc.flags.define()
    ...
    with fc.flags.manager(CKPT) as manager:
        restored = fc.flags.restore(CKPT, manager, items)
        for step in range(restored.next_step, num_steps):
            ...
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

from absl import flags as absl_flags

from functional_ckpt import checkpoint, errors, policies
from functional_ckpt.handlers.base import Registry
from functional_ckpt.handlers.module import ModuleHandler
from functional_ckpt.handlers.registry import chosen, for_items
from functional_ckpt.manager import CheckpointManager
from functional_ckpt.restoring import restore as restore_lib
from functional_ckpt.restoring import restorer
from functional_ckpt.saving.options import Blocking, Eager, Overlapped, Staging
from functional_ckpt.storage.paths import is_remote, resolve

__all__ = ["CheckpointFlags", "define", "manager", "restore"]

_log = logging.getLogger("functional_ckpt")
_STAGING: dict[str, Staging] = {
    "eager": Eager(),
    "overlapped": Overlapped(),
    "blocking": Blocking(),
}
# The flags are the script's that calls `define`: `--help` shows them among its own.
absl_flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFlags:
    """The flags that one call of `define` made; read them after absl has parsed the command line.

    Attributes:
        directory: The checkpoint directory, an `epath.Path`.
        save_every: A number of steps or a time string; None saves at every call.
        keep_latest: How many of the newest steps stay; None keeps all.
        keep_every: Keep every step whose number is a multiple; None for none.
        keep_best: `metric`, `metric:max` or `metric:min`; keeps the best step.
        overwrite: Whether a step that exists may be saved again.
        staging: `eager`, `overlapped` or `blocking`; None leaves it to the script.
        resume: `latest`, `none`, or the path or URI of a checkpoint to start from.
        weights_only: Whether modules alone are restored from such a path.
        ignore: Patterns of the items and leaves that are not restored.
        strict: Whether a difference between checkpoint and target is an error.
    """

    directory: absl_flags.FlagHolder[Any]
    save_every: absl_flags.FlagHolder[str | None]
    keep_latest: absl_flags.FlagHolder[int | None]
    keep_every: absl_flags.FlagHolder[int | None]
    keep_best: absl_flags.FlagHolder[str | None]
    overwrite: absl_flags.FlagHolder[bool]
    staging: absl_flags.FlagHolder[str | None]
    resume: absl_flags.FlagHolder[str]
    weights_only: absl_flags.FlagHolder[bool]
    ignore: absl_flags.FlagHolder[list[str]]
    strict: absl_flags.FlagHolder[bool]


class Defaults(TypedDict, total=False):
    """The defaults of the flags, by the names of `CheckpointFlags`."""

    directory: str | os.PathLike[str] | None
    save_every: str | None
    keep_latest: int | None
    keep_every: int | None
    keep_best: str | None
    overwrite: bool
    staging: Literal["eager", "overlapped", "blocking"] | None
    resume: str
    weights_only: bool
    ignore: Sequence[str]
    strict: bool


class _PathParser(absl_flags.ArgumentParser[Any]):
    """Parses an `epath.Path`; a URI that etils does not know stays text."""

    def parse(self, argument: Any) -> Any:
        from etils import epath

        if not os.fspath(argument):
            raise ValueError("the path is empty")  # for etils the current directory
        try:
            return epath.Path(argument)
        except KeyError:
            return argument


class _PathSerializer(absl_flags.ArgumentSerializer[Any]):
    def serialize(self, value: Any) -> str:
        return os.fspath(value)


def define(
    prefix: str = "ckpt",
    *,
    required: bool = True,
    flag_values: absl_flags.FlagValues = absl_flags.FLAGS,
    **defaults: Unpack[Defaults],
) -> CheckpointFlags:
    """Defines the flags of one checkpoint manager: `--ckpt_dir`, `--ckpt_save_every` ...

    Args:
        prefix: The prefix of the flags' names, for scripts with several managers.
        required: Whether the directory flag is required if it has no default; if not, `manager`
            needs a directory.
        flag_values: Where to define them.
        defaults: Defaults of the flags, by the names of `CheckpointFlags`.

    Raises:
        UsageError: The prefix cannot start a flag's name, or a default has no flag.
    """
    if not prefix.isidentifier():
        raise errors.UsageError(f"prefix must be an identifier such as 'ckpt'; got {prefix!r}.")
    if unknown := sorted(defaults.keys() - Defaults.__annotations__.keys()):
        known = ", ".join(Defaults.__annotations__)
        raise errors.UsageError(f"No flags {', '.join(unknown)}; the flags are {known}.")

    def flag(make: Any, field: str, text: str, default: Any = None, **options: Any) -> Any:
        suffix = "dir" if field == "directory" else field
        value = defaults.get(field, default)
        return make(
            name=f"{prefix}_{suffix}", default=value, help=text, flag_values=flag_values, **options
        )

    return CheckpointFlags(
        directory=flag(
            absl_flags.DEFINE,
            "directory",
            "Checkpoint directory: a path or a URI.",
            parser=_PathParser(),
            serializer=_PathSerializer(),
            required=required and defaults.get("directory") is None,
        ),
        save_every=flag(
            absl_flags.DEFINE_string,
            "save_every",
            "Save interval: steps (500, 500ba), time (90m, 1h30m) or progress (1ep, 3e4tok, "
            "0.25dur). Default: at every save() call.",
        ),
        keep_latest=flag(
            absl_flags.DEFINE_integer,
            "keep_latest",
            "Number of newest steps to keep. Default: all.",
            lower_bound=1,
        ),
        keep_every=flag(
            absl_flags.DEFINE_integer,
            "keep_every",
            "Also keep multiples of this step.",
            lower_bound=1,
        ),
        keep_best=flag(
            absl_flags.DEFINE_string,
            "keep_best",
            "Also keep the best step: METRIC (the highest is best), METRIC:max or METRIC:min.",
        ),
        overwrite=flag(
            absl_flags.DEFINE_bool,
            "overwrite",
            "Allow overwriting existing steps. Default: a run that would is refused at the start.",
            False,
        ),
        staging=flag(
            absl_flags.DEFINE_enum,
            "staging",
            "How a save copies the state: all of it before save() returns (eager, the default), "
            "parameters and optimizer state while training continues (overlapped), or not at all: "
            "save() returns when the step is durable (blocking).",
            enum_values=list(_STAGING),
        ),
        resume=flag(
            absl_flags.DEFINE_string,
            "resume",
            "Checkpoint to start from: latest (the latest step, if any), none, or the path or URI "
            "of a checkpoint, used while the directory has no step.",
            "latest",
        ),
        weights_only=flag(
            absl_flags.DEFINE_bool,
            "weights_only",
            f"With --{prefix}_resume=PATH: restore only modules, as for fine-tuning.",
            False,
        ),
        ignore=flag(
            absl_flags.DEFINE_list,
            "ignore",
            "Patterns of items or leaves not to restore, such as model.head.*.",
            [],
        ),
        strict=flag(
            absl_flags.DEFINE_bool,
            "strict",
            "Raise on any mismatch; otherwise restore matching leaves and log the rest.",
            True,
        ),
    )


def manager(
    defined: CheckpointFlags, *, directory: str | os.PathLike[str] | None = None, **arguments: Any
) -> CheckpointManager:
    """Returns the manager that the flags describe.

    Args:
        defined: From `define`.
        directory: The checkpoint directory where the flag gives none.
        arguments: Other arguments of `CheckpointManager`; policies are added to the flags', and
            `staging` is the default of its flag.

    Raises:
        UsageError: The flags are malformed or contradict each other; every problem is named.
    """
    _check(defined)
    where = defined.directory.value or directory
    if where is None:
        raise errors.UsageError(f"--{defined.directory.name} is required.")
    save = [policies.every(_number(defined.save_every.value))] if defined.save_every.value else []
    keep = _keep(defined)
    for key, own in (("save_policy", save), ("keep_policy", keep)):
        given = arguments.pop(key, None)
        own += given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if defined.staging.value is not None:
        arguments["staging"] = _STAGING[defined.staging.value]
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
    _check(defined)
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


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


def _check(defined: CheckpointFlags) -> None:
    """Raises one error for everything that is wrong with the flags."""
    problems = [*_malformed(defined), *_contradictions(defined)]
    if problems:
        raise errors.UsageError("Invalid flags:\n  " + "\n  ".join(problems))


def _malformed(defined: CheckpointFlags) -> list[str]:
    problems: list[str] = []
    if defined.save_every.value is not None:
        try:
            policies.every(_number(defined.save_every.value))
        except errors.UsageError as error:
            problems.append(f"--{defined.save_every.name}: {error}")
    if defined.keep_best.value is not None:
        metric, colon, mode = defined.keep_best.value.partition(":")
        if not metric or (colon and mode not in ("max", "min")):
            problems.append(
                f"--{defined.keep_best.name}: expected METRIC, METRIC:max or METRIC:min; got "
                f"{defined.keep_best.value!r}"
            )
    source = defined.resume.value
    if source not in ("latest", "none") and (why := _no_checkpoint(source)):
        problems.append(
            f"--{defined.resume.name}: expected latest, none, or the directory or URI of a "
            f"checkpoint; got {source!r}{why}"
        )
    return problems


def _no_checkpoint(source: str) -> str:
    """Why no checkpoint can be there; URIs are checked when they are restored."""
    try:
        place = resolve(source)
    except errors.UsageError as error:
        return f": {error}"
    return "" if is_remote(place) or os.path.isdir(place) else ", which is not a directory"


def _contradictions(defined: CheckpointFlags) -> list[str]:
    problems: list[str] = []
    source = defined.resume.value
    resume = f"--{defined.resume.name}={source}"
    if source == "none":
        asked = {
            defined.weights_only.name: defined.weights_only.value,
            defined.ignore.name: bool(defined.ignore.value),
            f"no{defined.strict.name}": not defined.strict.value,
        }
        problems += [
            f"--{name} has no effect with {resume}, which restores nothing"
            for name, is_given in asked.items()
            if is_given
        ]
    elif source == "latest" and defined.weights_only.value:
        problems.append(
            f"--{defined.weights_only.name} with {resume}: a run cannot resume without its "
            f"optimizer; give --{defined.resume.name}=PATH and a new directory"
        )
    interval, kept = defined.save_every.value, defined.keep_every.value
    steps = None if interval is None else interval.removesuffix("ba")
    num_steps = int(steps) if steps is not None and steps.isdigit() else 0
    if kept is not None and num_steps and kept % num_steps:
        problems.append(
            f"--{defined.keep_every.name}={kept} is no multiple of "
            f"--{defined.save_every.name}={interval}: most of these steps are never saved"
        )
    return problems


def _keep(defined: CheckpointFlags) -> list[Any]:
    keep: list[Any] = []
    if defined.keep_latest.value is not None:
        keep.append(policies.LatestN(defined.keep_latest.value))
    if defined.keep_every.value is not None:
        keep.append(policies.EveryNSteps(defined.keep_every.value))
    if defined.keep_best.value is not None:
        metric, _, mode = defined.keep_best.value.partition(":")
        keep.append(policies.BestN(1, metric, mode="min" if mode == "min" else "max"))
    if keep and defined.keep_latest.value is None:
        keep.append(policies.LatestN(1))  # the step that a run resumes from
    return keep
