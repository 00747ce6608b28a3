"""Copies of checkpoints between file systems and object stores."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile

import numpy as np

from functional_ckpt import checkpoint, errors
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.events import Shown, Tally
from functional_ckpt.format.data_file import DataFile
from functional_ckpt.interop.atomic_output import check_disjoint
from functional_ckpt.interop.opened import ForeignCheckpoint
from functional_ckpt.runtime.threads import run_in_threads
from functional_ckpt.steps.step_files import files_of
from functional_ckpt.storage import commit
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.open import connect
from functional_ckpt.transform.outputs import check_new

_PART_BYTES = 16 * 2**20
_NUM_FILES = 4
_NUMBERED = re.compile(r"(?:.+_)?([0-9]+)")


def copy(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    report: Shown | None = None,
) -> None:
    """Copies a checkpoint: complete and durable when it returns, absent when it raises.

    Every file is compared with its record on the way. Metrics that were recorded after the save are
    no part of the checkpoint, and stay with its run.

    Args:
        source: A checkpoint of this package or of Orbax: a path or a URI.
        destination: The checkpoint to create, a path or a URI; must not exist.
        report: Called with the bytes that were copied so far, and those to be copied.

    Raises:
        CorruptCheckpointError: A file differs from its record; it is named.
        StepExistsError: Something is at `destination`.
        UsageError: The source is a checkpoint of another format, or the destination's name is that
            of another step.
    """
    opened = checkpoint.open_path(*connect(source), warns=False)
    if isinstance(opened, ForeignCheckpoint):
        raise errors.UsageError(
            f"{opened.path} is no checkpoint of this package or of Orbax: copy it with a tool for "
            "files, or make one of it with fckpt convert.",
            path=opened.path,
        )
    storage, final = connect(destination)
    check_disjoint(opened.path, final)
    check_new(storage, final)
    _check_name(final, None if opened.record is None else opened.record.step)
    files, identity = files_of(opened.storage, opened.path)
    tally = Tally(report, 0, sum(file.size_bytes for file in files.values()))
    commits = commit.protocol(storage, os.path.dirname(final))
    with commits.claimed(final) as tmp:
        for folder in sorted({os.path.dirname(name) for name in files}):
            storage.make_directory(os.path.join(tmp, folder))
        copy_one = functools.partial(_copy_file, opened.storage, opened.path, storage, tmp)
        run_in_threads(
            [functools.partial(copy_one, name, file, tally) for name, file in files.items()],
            _NUM_FILES,
        )
        if files_of(opened.storage, opened.path)[1] != identity:
            raise errors.StorageError(f"{opened.path} was replaced while it was copied.")
        commit.sync_tree(storage, tmp, files)
        commits.publish_claim(tmp, final, overwrite=False)


def _check_name(final: str, step: int | None) -> None:
    """Raises `UsageError` for the name of another step, under which readers would refuse it."""
    found = _NUMBERED.fullmatch(os.path.basename(final))
    if found and step is not None and int(found[1]) != step:
        raise errors.UsageError(
            f"{final} is the name of step {int(found[1])}, and the checkpoint is step {step}. Give "
            f"it a name without a number, or one that ends with {step}.",
            path=final,
        )


def _copy_file(
    source: Storage,
    root: str,
    target: Storage,
    tmp: str,
    name: str,
    expected: FileRecord,
    tally: Tally,
) -> None:
    path, final = os.path.join(root, name), os.path.join(tmp, name)
    with contextlib.ExitStack() as cleanup:
        local = path
        if target.objects is None:
            got = _write(source, path, target, final, expected, tally)
        elif source.objects is None:
            got = source.checksum(path)
            tally.add(expected.size_bytes)
        else:
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="functional_ckpt-"))
            local = os.path.join(folder, "file")
            got = _write(source, path, LocalStorage(), local, expected, tally)
        if got != expected:
            raise errors.CorruptCheckpointError(
                f"{path}: expected {expected.size_bytes} bytes with digest {expected.xxh3}, got "
                f"{got.size_bytes} with {got.xxh3}; the file was changed after it was written.",
                path=path,
            )
        if target.objects is not None:
            target.put_file(local, final)


def _write(
    source: Storage, path: str, target: Storage, final: str, expected: FileRecord, tally: Tally
) -> FileRecord:
    """Copies bytes to a new file, at most as many as are recorded; returns its record."""
    file = DataFile(target, final, expected.size_bytes)
    with contextlib.closing(file):
        while part := source.read(path, file.size_bytes, _PART_BYTES):
            if file.size_bytes + len(part) > expected.size_bytes:
                return source.checksum(path)
            file.append(np.frombuffer(part, np.uint8))
            tally.add(len(part))
        return file.finish()
