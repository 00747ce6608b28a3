"""One checkpoint without steps: `save`, `restore` and `metadata` as functions of a path."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from functional_ckpt import errors
from functional_ckpt.core.records import orbax, records
from functional_ckpt.core.restore_plan import rename, select
from functional_ckpt.distributed.coordinator import SingleProcess
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.handlers import default_registry
from functional_ckpt.handlers.base import Registry
from functional_ckpt.restoring import restore as restore_lib
from functional_ckpt.saving import finalize, lower, stage, write
from functional_ckpt.saving import plan as plan_lib
from functional_ckpt.saving.options import Blocking
from functional_ckpt.steps.metadata import StepMetadata, checkpoint_metadata
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.open import connect
from functional_ckpt.storage.paths import check_arrays_path

__all__ = ["metadata", "restore", "save"]

# One of these is in every checkpoint.
_CHECKPOINT_MARKS = (
    records.EXTENSION_FILE,
    orbax.CHECKPOINT_METADATA_FILE,
    orbax.TREE_METADATA_FILE,
    orbax.COMMIT_FILE,
)
_MAX_SHOWN = 10


def save(
    path: str | os.PathLike[str],
    items: Mapping[str, Any],
    *,
    custom_metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    registry: Registry | None = None,
    storage: Storage | None = None,
) -> None:
    """Saves items to a directory: complete and durable when it returns, absent when it raises.

    Args:
        path: The directory to create.
        items: Name -> value or `CheckpointItem`.
        custom_metadata: Anything to keep beside them; JSON.
        overwrite: Whether a checkpoint that is there may be replaced, atomically.
        registry: Chooses handlers for plain values.
        storage: The file system.

    Raises:
        StepExistsError: Something is there and `overwrite` is False.
        UnsupportedLeafError: Something cannot be stored; nothing was written.
    """
    storage, final = connect(path, storage)
    commits = commit.protocol(storage, os.path.dirname(final))
    commits.recover_claim(final)
    if queries.exists(storage, final) and not overwrite:
        raise errors.StepExistsError(
            f"{final} exists; pass overwrite=True to replace it, or choose another path.",
            path=final,
        )
    if queries.exists(storage, final) and not queries.is_directory(storage, final):
        raise errors.UsageError(f"{final} is a file, not a checkpoint.", path=final)
    if storage.files is not None:
        check_arrays_path(final)
    info = finalize.CheckpointInfo(
        step=None, init_time_ns=time.time_ns(), custom_metadata=dict(custom_metadata or {})
    )
    lower.to_json(info.custom_metadata, "custom_metadata")
    lowered = lower.lower(items, registry or default_registry())
    with plan_lib.SavePlanner(SingleProcess()).planning(None) as planning:
        planning.items = lowered
    staged = stage.Stager(Blocking()).stage(lowered, planning.plan, None)
    with commits.claimed(final) as tmp:
        report = write.write(storage, tmp, staged.items)
        finalize.finalize(storage, tmp, lowered, [report], info, time.time_ns())
        commits.publish_claim(tmp, final, overwrite=overwrite)


def restore(
    path: str | os.PathLike[str],
    items: Mapping[str, Any] | None = None,
    *,
    only: str | Sequence[str] | None = None,
    ignore: select.Ignored | None = None,
    key_map: rename.KeyMap | None = None,
    strict: bool = True,
    cast: Literal["target"] | None = None,
    verify: Literal["during", "before", "off"] = "during",
    registry: Registry | None = None,
    storage: Storage | None = None,
) -> restore_lib.Restored:
    """Restores a checkpoint directory, native or Orbax's; see `CheckpointManager.restore`."""
    options = restore_lib.RestoreOptions(
        only=only, ignore=ignore, key_map=key_map, strict=strict, cast=cast, verify=verify
    )
    open_checkpoint = functools.partial(_open, *connect(path, storage))
    return restore_lib.restore_checkpoint(
        open_checkpoint, items, registry or default_registry(), options
    )


def metadata(path: str | os.PathLike[str], *, storage: Storage | None = None) -> StepMetadata:
    """Returns the metadata of a checkpoint directory, without reading its arrays."""
    return checkpoint_metadata(_open(*connect(path, storage)))


def _open(storage: Storage, path: str) -> checkpoint_dir.OpenCheckpoint:
    """Opens a checkpoint; if there is none, the error describes the path and the fix."""
    try:
        return checkpoint_dir.open_checkpoint(storage, path)
    except (errors.StepNotFoundError, errors.CorruptCheckpointError) as error:
        if (advice := _advice(storage, path)) is None:
            raise
        raise type(error)(f"{path}: not a checkpoint: {advice}", path=path) from error


def _advice(storage: Storage, path: str) -> str | None:
    """What to do about a path that is a directory of steps, or no checkpoint of this package."""
    if not queries.exists(storage, path):
        return None
    foreign = "If it is foreign, fc.interop.open(path) opens it as items, which fc.save accepts."
    if not queries.is_directory(storage, path):
        return f"it is a file. {foreign}"
    names = storage.list(path)
    if any(queries.exists(storage, os.path.join(path, mark)) for mark in _CHECKPOINT_MARKS):
        return None  # a checkpoint, damaged
    steps = [name for name in names if _is_step(storage, os.path.join(path, name))]
    if steps:
        steps.sort(key=lambda name: (len(name), name))
        shown = ", ".join(steps[-_MAX_SHOWN:])
        more = f"the last of {len(steps)}: " if len(steps) > _MAX_SHOWN else ""
        return (
            f"it is a directory of steps ({more}{shown}). Give one of them, such as "
            f"{os.path.join(path, steps[-1])}, or use fc.CheckpointManager(path)."
        )
    if commit.HIDDEN in names:
        return "it is the directory of a manager, and holds no step yet."
    if any(
        queries.exists(storage, os.path.join(path, name, records.EXTENSION_FILE)) for name in names
    ):
        return None  # items of a checkpoint whose record is gone
    return f"it holds no item that this package or Orbax wrote. {foreign}"


def _is_step(storage: Storage, path: str) -> bool:
    is_hidden = os.path.basename(path).startswith(".") or commit.TMP_SUFFIX in path
    return not is_hidden and queries.exists(
        storage, os.path.join(path, orbax.CHECKPOINT_METADATA_FILE)
    )
