"""A step of ours, or a checkpoint of Orbax's, as a source like any other."""

from __future__ import annotations

import functools
import os
from typing import Any

from functional_ckpt import errors, restoring
from functional_ckpt.core import manifest, orbax_format
from functional_ckpt.handlers import default_registry
from functional_ckpt.interop.source import Format, Source, match_files
from functional_ckpt.storage import layout
from functional_ckpt.storage.paths import LocalStorage

__all__ = ["FORMAT"]

_MARKS = (
    manifest.EXTENSION_FILE,
    orbax_format.CHECKPOINT_METADATA_FILE,
    orbax_format.TREE_METADATA_FILE,
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
    opened = layout.open_checkpoint(LocalStorage(), path)
    openers = {name: functools.partial(_read, path, name) for name in opened.items}
    return Source(path, "step", openers)


def _read(path: str, name: str) -> Any:
    if name not in layout.open_checkpoint(LocalStorage(), path).items:
        raise errors.StepNotFoundError(f"{path} has no item {name!r} any more.", path=path)
    return restoring.restore_checkpoint(
        functools.partial(layout.open_checkpoint, LocalStorage(), path),
        {name: None},
        default_registry(),
        restoring.RestoreOptions(),
    )[name]


FORMAT = Format(
    name="step", about="a checkpoint of this package or of Orbax", fits=fits, open=_open
)
