"""Opening a checkpoint of any known format, which is detected from its files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from functional_ckpt import errors
from functional_ckpt.interop import (
    ckpt_file,
    colossalai,
    composer,
    dcp,
    deepspeed,
    hostile,
    huggingface,
    megatron,
    native,
    neuronx,
    peft,
    safetensors,
    torch_save,
)
from functional_ckpt.interop.source import Format, Source
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.open import connect
from functional_ckpt.storage.paths import is_remote, resolve

FORMATS: tuple[Format, ...] = (
    native.FORMAT,
    huggingface.FORMAT,
    safetensors.FORMAT,
    torch_save.FORMAT,
    dcp.FORMAT,
    neuronx.FORMAT,
    colossalai.FORMAT,
    deepspeed.FORMAT,
    megatron.FORMAT,
    composer.FORMAT,
    peft.FORMAT,
    ckpt_file.FORMAT,
)
"""Every format that can be opened."""


def candidates(path: str, formats: Sequence[Format] = FORMATS) -> list[Format]:
    """Returns the formats that a path matches, none for a URI; a more specific one hides others."""
    if is_remote(path):
        return []
    with hostile.clear_failures(path):
        fitting = [format for format in formats if format.matches(path)]
    refined = {name for format in fitting for name in format.supersedes}
    return [format for format in fitting if format.name not in refined]


def open(
    path: str | os.PathLike[str], format: str | None = None, *, formats: Sequence[Format] = FORMATS
) -> Source:
    """Opens a foreign checkpoint as items: a mapping that `fc.save` accepts.

    Args:
        path: A file or a directory; or the URI of a checkpoint of this package or of Orbax.
        format: Name of its format; None to find out. Of a directory of Hugging Face weights that
            holds both, `safetensors` or `bin` says which files.
        formats: The known formats; add a `Format` of your own.

    Returns:
        Items by name. Each is read when it is first asked for, its tensors when they are used.

    Raises:
        StepNotFoundError: There is nothing.
        UsageError: It looks like no known format, or like several: they are listed.
        CorruptCheckpointError: It is incomplete or damaged.
    """
    source = recognise(path, format, formats)
    if source.left_out:
        warnings.warn(
            f"{source.path}: opened as {source.format}, items {', '.join(source)}; left out: "
            f"{', '.join(source.left_out)}. Open these files by themselves, or keep them.",
            stacklevel=2,
        )
    return source


def recognise(
    path: str | os.PathLike[str], format: str | None = None, formats: Sequence[Format] = FORMATS
) -> Source:
    """Opens as `open` does, without the warning of left-out files."""
    where = resolve(path)
    if is_remote(where):
        return _open_remote(where, format)
    if not os.path.exists(where):
        raise errors.StepNotFoundError(f"{where}: there is no such file or directory.", path=where)
    by_name = {each.name: each for each in formats}
    if format is not None:
        if huggingface.FORMAT in formats and huggingface.holds(where, format):
            return _open(huggingface.of_files(format), where)
        if format not in by_name:
            known = ", ".join([*by_name, "bin"])
            raise errors.UsageError(
                f"There is no format {format!r}; known are {known}.", path=where
            )
        if not by_name[format].matches(where):
            raise errors.UsageError(
                f"{where} does not look like {by_name[format].description} ({format!r}).",
                path=where,
            )
        return _open(by_name[format], where)
    found = candidates(where, formats)
    if len(found) == 1:
        return _open(found[0], where)
    if found:
        listed = "; ".join(f"{each.name!r} ({each.description})" for each in found)
        raise errors.UsageError(f"{where} may be any of {listed}; choose with format=.", path=where)
    _check_no_run(LocalStorage(), where)
    known = "; ".join(f"{each.name!r} ({each.description})" for each in formats)
    raise errors.UsageError(
        f"{where}: nothing here looks like a known checkpoint. Give the file or the directory of "
        f"one checkpoint. Known are: {known}.",
        path=where,
    )


def _check_no_run(storage: Storage, where: str) -> None:
    """Raises `StepNotFoundError` for a directory of steps, with the one to open."""
    names = storage.list(where) if queries.is_directory(storage, where) else ()
    if advice := native.run_advice(storage, where, names):
        raise errors.StepNotFoundError(f"{where}: not a checkpoint: {advice}", path=where)


def _open(format: Format, where: str) -> Source:
    with hostile.clear_failures(where):
        return format.open(where)


def _open_remote(uri: str, format: str | None) -> Source:
    """Opens a step in an object store; foreign files are read from local disks only."""
    storage, where = connect(uri)
    if not queries.exists(storage, where):
        raise errors.StepNotFoundError(f"{where}: there is nothing.", path=where)
    if format is None and not native.is_step(storage, where):
        _check_no_run(storage, where)
    if format not in (None, native.FORMAT.name) or not native.is_step(storage, where):
        raise errors.UsageError(
            f"{where}: a URI opens as a checkpoint of this package or of Orbax only, and this is "
            "none, or another format was asked for. Copy it to a local path and open that.",
            path=where,
        )
    return native.open_step(storage, where)
