"""A native step, or an Orbax checkpoint, as a source like any other."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.records import orbax, records
from functional_ckpt.format import checkpoint_dir, parts
from functional_ckpt.handlers import default_registry
from functional_ckpt.interop.file_names import match_files
from functional_ckpt.interop.source import Format, Source
from functional_ckpt.restoring import restore
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local import LocalStorage

_MAX_SHOWN = 10
_MARKS = (records.EXTENSION_FILE, orbax.CHECKPOINT_METADATA_FILE, orbax.TREE_METADATA_FILE)


def _fits(path: str) -> bool:
    """Returns whether it is one checkpoint, or one item of it, with the files that say so."""
    return _is_marked(path, match_files(path, _is_shown), os.path.isfile)


def is_step(storage: Storage, path: str) -> bool:
    """Returns the same, in any store."""
    names = filter(_is_shown, storage.list(path)) if queries.is_directory(storage, path) else ()
    return _is_marked(path, names, functools.partial(queries.exists, storage))


def _is_shown(name: str) -> bool:
    return not name.startswith(".")


def _is_marked(path: str, names: Iterable[str], exists: Callable[[str], bool]) -> bool:
    folders = ["", *names]
    return any(
        exists(os.path.join(path, folder, mark))
        for folder in folders
        for mark in (_MARKS if folder == "" else _MARKS[2:])
    )


def run_advice(storage: Storage, path: str, names: Sequence[str]) -> str | None:
    """Returns advice for a directory of steps with these names in it; None if it is none."""
    steps = [
        name
        for name in filter(_is_shown, names)
        if commit.TMP_SUFFIX not in name
        and queries.exists(storage, os.path.join(path, name, orbax.CHECKPOINT_METADATA_FILE))
    ]
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
    return None


def open_step(storage: Storage, path: str) -> Source:
    """Returns the items of a checkpoint in any store."""
    parts.check_complete(storage, path)
    opened = checkpoint_dir.open_checkpoint(storage, path)
    openers = {name: functools.partial(_read, storage, path, name) for name in opened.items}
    return Source(path, "step", openers)


def _read(storage: Storage, path: str, name: str) -> Any:
    if name not in checkpoint_dir.open_checkpoint(storage, path).items:
        raise errors.StepNotFoundError(f"{path} has no item {name!r} any more.", path=path)
    return restore.restore_checkpoint(
        functools.partial(checkpoint_dir.open_checkpoint, storage, path),
        {name: None},
        default_registry(),
        restore.RestoreOptions(),
    )[name]


FORMAT = Format(
    name="step",
    description="a checkpoint of this package or of Orbax",
    matches=_fits,
    open=lambda path: open_step(LocalStorage(), path),
    supersedes=("huggingface",),
)
