"""The values of the flags, and the policies that they describe."""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags as absl_flags

from functional_ckpt import errors, policies
from functional_ckpt.policies.base import SavePolicy
from functional_ckpt.saving.options import Blocking, Eager, Overlapped, Staging

STAGING: dict[str, Staging] = {
    "eager": Eager(),
    "overlapped": Overlapped(),
    "blocking": Blocking(),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFlags:
    """The flags that one call of `define` made; read them after absl has parsed the command line.

    Attributes:
        directory: The checkpoint directory, an `epath.Path`.
        save_every: A number of steps or a time string; None saves at every call.
        keep_latest: How many of the newest steps stay; None keeps all.
        keep_every: Keep every step whose number is a multiple; None for none.
        keep_best: `metric[:min|max][:N]`; keeps the N best steps, by default one.
        tier: Paths or URIs to which committed steps are uploaded.
        node_local_replicas: How many other nodes receive a copy of a node's files, if the directory
            is on each node's own disks; None if it is one that all ranks share.
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
    tier: absl_flags.FlagHolder[list[str]]
    node_local_replicas: absl_flags.FlagHolder[int | None]
    overwrite: absl_flags.FlagHolder[bool]
    staging: absl_flags.FlagHolder[str | None]
    resume: absl_flags.FlagHolder[str]
    weights_only: absl_flags.FlagHolder[bool]
    ignore: absl_flags.FlagHolder[list[str]]
    strict: absl_flags.FlagHolder[bool]


def interval(text: str) -> SavePolicy:
    """Returns the save policy of an interval.

    Raises:
        UsageError: It is none.
    """
    return policies.every(int(text) if text.isascii() and text.isdigit() else text)


def best(text: str) -> policies.BestN:
    """Returns the keep policy of `METRIC[:min|max][:N]`.

    Raises:
        UsageError: It has another form.
    """
    metric, *rest = text.split(":")
    mode = rest.pop(0) if rest and rest[0] in ("min", "max") else "max"
    count = rest.pop(0) if rest else "1"
    if not metric or rest or not (count.isascii() and count.isdigit()) or int(count) < 1:
        raise errors.UsageError(f"expected METRIC[:min|max][:N]; got {text!r}")
    return policies.BestN(int(count), metric, mode="min" if mode == "min" else "max")
