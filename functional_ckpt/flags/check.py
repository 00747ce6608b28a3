"""Finds malformed flags and flags that contradict each other."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeAlias

from absl import flags as absl_flags

from functional_ckpt import errors
from functional_ckpt.flags import values
from functional_ckpt.flags.values import CheckpointFlags
from functional_ckpt.storage.paths import is_remote, resolve

_FindAll: TypeAlias = Callable[[CheckpointFlags], list[str]]


def check(defined: CheckpointFlags) -> None:
    """Raises one `UsageError` for everything that is wrong with the flags."""
    if found := problems(defined):
        raise errors.UsageError("Invalid flags:\n  " + "\n  ".join(found))


def problems(defined: CheckpointFlags) -> list[str]:
    """Returns the values that are malformed and the flags that contradict each other."""
    malformed = [
        f"--{flag.name}: {problem}"
        for flag, find in _forms(defined)
        if (problem := find(flag.value)) is not None
    ]
    return [*malformed, *_resume_problems(defined), *_interval_problems(defined)]


def register(defined: CheckpointFlags, flag_values: absl_flags.FlagValues) -> None:
    """Makes absl find the problems when it parses the command line."""

    def validate(find: Callable[[object], object], value: object) -> bool:
        if problem := find(value):
            raise absl_flags.ValidationError(problem)
        return True

    for flag, find in _forms(defined):
        check_one = functools.partial(validate, find)
        absl_flags.register_validator(flag.name, check_one, flag_values=flag_values)
    modes = (defined.resume, defined.weights_only, defined.ignore, defined.strict)
    steps = (defined.save_every, defined.keep_every)
    for flags, find_all in ((modes, _resume_problems), (steps, _interval_problems)):

        def joined(_: object, find_all: _FindAll = find_all) -> str:
            return "; ".join(find_all(defined))

        names = [flag.name for flag in flags]
        check_all = functools.partial(validate, joined)
        absl_flags.register_multi_flags_validator(names, check_all, flag_values=flag_values)


def _forms(
    defined: CheckpointFlags,
) -> list[tuple[absl_flags.FlagHolder[Any], Callable[[Any], str | None]]]:
    """Returns the flags whose texts have a form, each with the function that finds its problem."""

    def refused(parse: Callable[[str], object], value: str | None) -> str | None:
        try:
            _ = value is None or parse(value)
        except errors.UsageError as error:
            return str(error)
        return None

    return [
        (defined.save_every, functools.partial(refused, values.interval)),
        (defined.keep_best, functools.partial(refused, values.best)),
        (defined.resume, _resume_problem),
    ]


def _resume_problem(source: str) -> str | None:
    if source in ("latest", "none") or not (why := _no_checkpoint(source)):
        return None
    return f"expected latest, none, or the directory or URI of a checkpoint; got {source!r}{why}"


def _no_checkpoint(source: str) -> str:
    """Why no checkpoint can be there; URIs are checked when they are restored."""
    try:
        resolved = resolve(source)
    except errors.UsageError as error:
        return f": {error}"
    return "" if is_remote(resolved) or os.path.isdir(resolved) else ", which is not a directory"


def _resume_problems(defined: CheckpointFlags) -> list[str]:
    found: list[str] = []
    source = defined.resume.value
    resume = f"--{defined.resume.name}={source}"
    if source == "none":
        asked = {
            defined.weights_only.name: defined.weights_only.value,
            defined.ignore.name: bool(defined.ignore.value),
            f"no{defined.strict.name}": not defined.strict.value,
        }
        found += [
            f"--{name} has no effect with {resume}, which restores nothing"
            for name, is_given in asked.items()
            if is_given
        ]
    elif source == "latest" and defined.weights_only.value:
        found.append(
            f"--{defined.weights_only.name} with {resume}: a run cannot resume without its "
            f"optimizer; give --{defined.resume.name}=PATH and a new directory"
        )
    return found


def _interval_problems(defined: CheckpointFlags) -> list[str]:
    interval, kept = defined.save_every.value, defined.keep_every.value
    steps = None if interval is None else interval.removesuffix("ba")
    num_steps = int(steps) if steps is not None and steps.isdigit() else 0
    if kept is None or not num_steps or kept % num_steps == 0:
        return []
    return [
        f"--{defined.keep_every.name}={kept} is no multiple of "
        f"--{defined.save_every.name}={interval}: most of these steps are never saved"
    ]
