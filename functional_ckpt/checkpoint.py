"""One checkpoint without steps: `save`, `restore` and `metadata` as functions of a path."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from functional_ckpt import errors
from functional_ckpt.core.records import records
from functional_ckpt.distributed.coordinator import SingleProcess
from functional_ckpt.distributed.torch_store import default_coordinator
from functional_ckpt.format import checkpoint_dir, parts
from functional_ckpt.handlers.base import Registry
from functional_ckpt.handlers.registry import chosen
from functional_ckpt.interop import native, opened
from functional_ckpt.interop.source import Source
from functional_ckpt.policies import lines
from functional_ckpt.policies.checks import check_bool
from functional_ckpt.policies.progress import Progress
from functional_ckpt.restoring import restore as restore_lib
from functional_ckpt.restoring.match import RestoreArguments
from functional_ckpt.saving import lower, saver, single, stage
from functional_ckpt.saving import plan as plan_lib
from functional_ckpt.saving.claim import check_free
from functional_ckpt.saving.options import Blocking
from functional_ckpt.saving.parts import StagedItem
from functional_ckpt.steps.metadata import StepMetadata, checkpoint_metadata
from functional_ckpt.storage import commit, queries, replacement
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.open import connect
from functional_ckpt.storage.paths import check_no_variables

_log = logging.getLogger("functional_ckpt")


def save(
    path: str | os.PathLike[str],
    items: Mapping[str, Any],
    *,
    metrics: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    custom_metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    registry: Registry | None = None,
    process_group: Any = None,
    storage: Storage | None = None,
) -> None:
    """Saves items into a directory: complete and durable when it returns, absent when it raises.

    Args:
        path: The directory to create: a path or a URI.
        items: Item name -> value or item.
        metrics: Metrics, as of `CheckpointManager.save`; JSON.
        progress: The training progress.
        custom_metadata: Other metadata; JSON.
        overwrite: Whether an existing checkpoint is replaced, atomically; no other directory is.
        registry: Chooses handlers for plain values.
        process_group: The ranks that save together, all of which must call; None for this process
            alone, whatever group it is in.
        storage: The file system; for tests.

    Raises:
        StepExistsError: The path exists and `overwrite` is False.
        UsageError: The path is no checkpoint: a file, or another directory.
        UnsupportedLeafError: A value cannot be stored; nothing was written.
    """
    coordinator = SingleProcess() if process_group is None else default_coordinator(process_group)
    try:
        with plan_lib.SavePlanner(coordinator).planning(None, overwrite=overwrite) as planning:
            check_bool("overwrite", overwrite)
            check_no_variables("path", path)
            storage, final = connect(path, storage)
            if isinstance(items, Source):
                opened.check_bytes(dict(items))
            if coordinator.rank == 0:
                check_free(storage, final, overwrite=overwrite)
            info = saver.checkpoint_info(None, metrics, progress, custom_metadata, lines.Line())
            planning.items = lower.lower(
                items, chosen(registry), rank=coordinator.rank, ranks=coordinator.global_ranks
            )

        def staged() -> Sequence[StagedItem]:
            return stage.Stager(Blocking()).stage(planning.items, planning.plan, None).items

        single.write(storage, final, planning.items, staged, info, coordinator, overwrite=overwrite)
    finally:
        coordinator.close()


def restore(
    path: str | os.PathLike[str] | Source,
    into: Mapping[str, Any] | None = None,
    *,
    registry: Registry | None = None,
    storage: Storage | None = None,
    **options: Unpack[RestoreArguments],
) -> restore_lib.Restored:
    """Restores a native or an Orbax checkpoint, or a foreign file; not a collective.

    Args:
        path: The directory of the checkpoint, such as one step of a manager: a path or a URI. A
            local path may be of any format that `interop.open` detects: its tensors are read into
            the targets without a copy on disk. The result of `interop.open` is accepted too.
        into: Item name -> target; see `CheckpointManager.restore`. None restores everything as it
            was saved.
        registry: Chooses handlers for plain values.
        storage: The file system; for tests.
        options: As of `CheckpointManager.restore`.

    Returns:
        The items. `.step` is the step where the checkpoint records one.

    Raises:
        StepNotFoundError: No checkpoint there, or an item is missing.
        MismatchError: Checkpoint and target differ; nothing was touched.
        CorruptCheckpointError: Damaged bytes; `.touched` says whether the target was changed.
    """
    how = restore_lib.RestoreOptions(**options)
    if isinstance(path, Source):
        open_checkpoint = functools.partial(opened.open_source, path)
    else:
        open_checkpoint = functools.partial(_open_all, *connect(path, storage), warns=into is None)
    return restore_lib.restore_checkpoint(open_checkpoint, into, chosen(registry), how)


def metadata(path: str | os.PathLike[str], *, storage: Storage | None = None) -> StepMetadata:
    """Returns the metadata of a checkpoint; reads no arrays.

    Args:
        path: The checkpoint: a path or a URI, or a local path of a foreign format.
        storage: The file system; for tests.

    Raises:
        StepNotFoundError: There is no checkpoint.
        CorruptCheckpointError: Its records are damaged.
    """
    return checkpoint_metadata(open_path(*connect(path, storage), warns=False))


def _open_all(storage: Storage, path: str, *, warns: bool) -> checkpoint_dir.OpenCheckpoint:
    """As `open_path`, but refuses one node's part of a step."""
    parts.check_complete(storage, path)
    return open_path(storage, path, warns=warns)


def open_path(storage: Storage, path: str, *, warns: bool) -> checkpoint_dir.OpenCheckpoint:
    """Opens a checkpoint; if there is none, the error describes the path and the fix.

    `warns` says whether files that a foreign format leaves out are named by a warning.
    """
    try:
        return checkpoint_dir.open_checkpoint(storage, path)
    except (errors.StepNotFoundError, errors.CorruptCheckpointError) as error:
        if old := replacement.old_copy(commit.protocol(storage, os.path.dirname(path)), path):
            _log.warning("%s: an overwrite was interrupted; reading the old one, %s", path, old)
            return checkpoint_dir.open_checkpoint(storage, old)
        if (advice := _advice(storage, path)) is None:
            raise
        if advice == _UNKNOWN:
            from functional_ckpt.interop import detect  # late: every format's module

            if detect.candidates(path):
                open_source = detect.open if warns else detect.recognise
                return opened.open_source(open_source(path))
        kind = type(error) if advice == _UNKNOWN else errors.StepNotFoundError
        raise kind(f"{path}: not a checkpoint: {advice}", path=path) from error


_UNKNOWN = (
    "it holds no item that this package or Orbax wrote, and is of no format that fc.interop.open "
    "knows. Files of other programs are opened at local paths."
)


def _advice(storage: Storage, path: str) -> str | None:
    """Returns advice for a path that is a directory of steps or a foreign checkpoint."""
    if not queries.exists(storage, path):
        return None
    if not queries.is_directory(storage, path):
        return _UNKNOWN
    names = storage.list(path)
    if checkpoint_dir.has_record(storage, path):
        return None  # a checkpoint, damaged
    if advice := native.run_advice(storage, path, names):
        return advice
    if any(
        queries.exists(storage, os.path.join(path, name, records.EXTENSION_FILE)) for name in names
    ):
        return None  # items of a checkpoint whose record is gone
    return _UNKNOWN
