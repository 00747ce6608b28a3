"""A step of ours, or a checkpoint of Orbax's, as a source like any other."""

from __future__ import annotations

import functools
import os
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.records import orbax, records
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.handlers import default_registry
from functional_ckpt.interop.source import Format, Source, match_files
from functional_ckpt.restoring import restore
from functional_ckpt.storage.local import LocalStorage

__all__ = ["FORMAT"]

_MARKS = (
    records.EXTENSION_FILE,
    orbax.CHECKPOINT_METADATA_FILE,
    orbax.TREE_METADATA_FILE,
)


def fits(path: str) -> bool:
    """Whether it is one checkpoint, or one item of it, with the files that say so."""
    places = ["", *match_files(path, lambda name: not name.startswith("."))]
    return any(
        os.path.isfile(os.path.join(path, place, mark))
        for place in places
        for mark in (_MARKS if place == "" else _MARKS[2:])
    )


def _open(path: str) -> Source:
    opened = checkpoint_dir.open_checkpoint(LocalStorage(), path)
    openers = {name: functools.partial(_read, path, name) for name in opened.items}
    return Source(path, "step", openers)


def _read(path: str, name: str) -> Any:
    if name not in checkpoint_dir.open_checkpoint(LocalStorage(), path).items:
        raise errors.StepNotFoundError(f"{path} has no item {name!r} any more.", path=path)
    return restore.restore_checkpoint(
        functools.partial(checkpoint_dir.open_checkpoint, LocalStorage(), path),
        {name: None},
        default_registry(),
        restore.RestoreOptions(),
    )[name]


FORMAT = Format(
    name="step", description="a checkpoint of this package or of Orbax", matches=fits, open=_open
)
