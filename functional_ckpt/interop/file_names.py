"""The names of files beside each other, from which formats are recognised."""

from __future__ import annotations

import os
from collections.abc import Callable

from functional_ckpt import errors
from functional_ckpt.storage.system_errors import clear_errors, is_absence


def match_files(path: str, matches: Callable[[str], bool]) -> list[str]:
    """Returns the sorted names of a directory's entries that match; none if it is no directory.

    Raises:
        StorageError: It cannot be listed.
    """
    try:
        with clear_errors("list", path):
            return sorted(name for name in os.listdir(path) if matches(name))
    except errors.StorageError as error:
        if is_absence(error):
            return []
        raise
