"""Defines the flags of a checkpoint manager."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack

from absl import flags as absl_flags

from functional_ckpt import errors
from functional_ckpt.flags import check
from functional_ckpt.flags.values import STAGING, CheckpointFlags

# The flags are the script's that calls `define`: `--help` shows them among its own.
absl_flags.disclaim_key_flags()


class Defaults(TypedDict, total=False):
    """The defaults of the flags, by the names of `CheckpointFlags`."""

    directory: str | os.PathLike[str] | None
    save_every: str | None
    keep_latest: int | None
    keep_every: int | None
    keep_best: str | None
    tier: Sequence[str]
    node_local_replicas: int | None
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
        UsageError: The prefix cannot start a flag's name, or a default has no flag. Flags that are
            malformed or contradict each other are absl's error, when it parses the command line.
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

    defined = CheckpointFlags(
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
            "Also keep the N best steps (1): METRIC[:min|max][:N]; by default the highest is best.",
        ),
        tier=flag(
            absl_flags.DEFINE_multi_string,
            "tier",
            "Upload committed steps to this path or URI, in the background; may be repeated.",
            [],
        ),
        node_local_replicas=flag(
            absl_flags.DEFINE_integer,
            "node_local_replicas",
            "The directory is on each node's own disks; the number of other nodes that receive a "
            "copy of its files. Default: all ranks share the directory.",
            lower_bound=0,
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
            enum_values=list(STAGING),
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
    check.register(defined, flag_values)
    return defined
