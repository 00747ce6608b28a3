"""Damage to a file that several steps of a run share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from functional_ckpt import errors
from functional_ckpt.core.records.records import EXTENSION_FILE, with_checksum
from functional_ckpt.format.shared_files import damage_path
from functional_ckpt.format.tuning import SHARED_FROM_BYTES
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage


def sharing(storage: Storage, path: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Returns the other steps beside a checkpoint that have a file of it, sorted, by the file."""
    found = {name: storage.stat(os.path.join(path, name)) for name in names}
    shared = {
        name: each.identity
        for name, each in found.items()
        if each is not None and each.kind == "a file" and each.num_links > 1
    }
    if not shared:
        return {}
    root, own = os.path.split(path)
    steps = [
        step
        for step in storage.list(root)
        if step != own and queries.exists(storage, os.path.join(root, step, EXTENSION_FILE))
    ]
    held = {
        step: {each.identity for each in storage.walk(os.path.join(root, step)).values()}
        for step in steps
    }
    return {
        name: tuple(step for step in steps if identity in held[step])
        for name, identity in shared.items()
    }


def note_damage(storage: Storage, path: str, names: Iterable[str]) -> None:
    """Notes for the writer of a run that files of a step are damaged, which it could share.

    A directory that may not be written to is verified all the same.
    """
    root, own = os.path.split(path)
    note = damage_path(root)
    found = (storage.stat(os.path.join(path, name)) for name in names)
    with contextlib.suppress(errors.StorageError):
        is_large = any(each and each.size_bytes >= SHARED_FROM_BYTES for each in found)
        if is_large and queries.exists(storage, os.path.dirname(note)):
            storage.write(note, with_checksum({"step": own}))
