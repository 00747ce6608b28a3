"""One checkpoint without steps: `save`, `restore` and `metadata` as functions of a path."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from functional_ckpt import errors
from functional_ckpt.core.restore_plan import rename, select
from functional_ckpt.distributed.coordinator import SingleProcess
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.handlers import default_registry
from functional_ckpt.handlers.base import Registry
from functional_ckpt.restoring import restore as restore_lib
from functional_ckpt.saving import finalize, lower, stage, write
from functional_ckpt.saving import plan as plan_lib
from functional_ckpt.steps.metadata import StepMetadata, checkpoint_metadata
from functional_ckpt.storage import claims
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.open import connect
from functional_ckpt.storage.paths import check_arrays_path

__all__ = ["metadata", "restore", "save"]


def save(
    path: str | os.PathLike[str],
    items: Mapping[str, Any],
    *,
    custom_metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    registry: Registry | None = None,
    storage: Storage | None = None,
) -> None:
    """Saves items into a directory; whole and durable when it returns, absent when it raises.

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
    claims.recover(storage, final)
    if storage.exists(final) and not overwrite:
        raise errors.StepExistsError(
            f"{final} exists; pass overwrite=True to replace it, or choose another path.",
            path=final,
        )
    if storage.exists(final) and not storage.is_directory(final):
        raise errors.UsageError(f"{final} is a file, not a checkpoint.", path=final)
    if isinstance(storage, LocalStorage):
        check_arrays_path(final)
    info = finalize.CheckpointInfo(
        step=None, init_time_ns=time.time_ns(), custom_metadata=dict(custom_metadata or {})
    )
    lower.to_json(info.custom_metadata, "custom_metadata")
    lowered = lower.lower(items, registry or default_registry())
    plan = plan_lib.SavePlanner(SingleProcess()).plan(lowered, None)
    staged = stage.stage(lowered, plan, None)
    with claims.claimed(storage, final) as tmp:
        report = write.write(storage, tmp, staged)
        finalize.finalize(storage, tmp, lowered, [report], info, time.time_ns())
        claims.publish(storage, tmp, final, overwrite=overwrite)


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
    """Restores the checkpoint in a directory, ours or Orbax's; see `CheckpointManager.restore`."""
    options = restore_lib.RestoreOptions(
        only=only, ignore=ignore, key_map=key_map, strict=strict, cast=cast, verify=verify
    )
    open_checkpoint = functools.partial(checkpoint_dir.open_checkpoint, *connect(path, storage))
    return restore_lib.restore_checkpoint(
        open_checkpoint, items, registry or default_registry(), options
    )


def metadata(path: str | os.PathLike[str], *, storage: Storage | None = None) -> StepMetadata:
    """What is known of the checkpoint in a directory without reading its arrays."""
    return checkpoint_metadata(checkpoint_dir.open_checkpoint(*connect(path, storage)))
