"""Finds malformed flags and flags that contradict each other."""

from __future__ import annotations

import os

from functional_ckpt import errors
from functional_ckpt.flags import values
from functional_ckpt.flags.values import CheckpointFlags
from functional_ckpt.storage.paths import is_remote, resolve


def check(defined: CheckpointFlags) -> None:
    """Raises one `UsageError` for everything that is wrong with the flags."""
    if found := problems(defined):
        raise errors.UsageError("Invalid flags:\n  " + "\n  ".join(found))


def problems(defined: CheckpointFlags) -> list[str]:
    """Returns the values that are malformed and the flags that contradict each other."""
    return [*_malformed(defined), *_contradictions(defined)]


def _malformed(defined: CheckpointFlags) -> list[str]:
    found: list[str] = []
    for flag, parse in ((defined.save_every, values.interval), (defined.keep_best, values.best)):
        if flag.value is not None:
            try:
                parse(flag.value)
            except errors.UsageError as error:
                found.append(f"--{flag.name}: {error}")
    source = defined.resume.value
    if source not in ("latest", "none") and (why := _no_checkpoint(source)):
        found.append(
            f"--{defined.resume.name}: expected latest, none, or the directory or URI of a "
            f"checkpoint; got {source!r}{why}"
        )
    return found


def _no_checkpoint(source: str) -> str:
    """Why no checkpoint can be there; URIs are checked when they are restored."""
    try:
        place = resolve(source)
    except errors.UsageError as error:
        return f": {error}"
    return "" if is_remote(place) or os.path.isdir(place) else ", which is not a directory"


def _contradictions(defined: CheckpointFlags) -> list[str]:
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
    interval, kept = defined.save_every.value, defined.keep_every.value
    steps = None if interval is None else interval.removesuffix("ba")
    num_steps = int(steps) if steps is not None and steps.isdigit() else 0
    if kept is not None and num_steps and kept % num_steps:
        found.append(
            f"--{defined.keep_every.name}={kept} is no multiple of "
            f"--{defined.save_every.name}={interval}: most of these steps are never saved"
        )
    return found
