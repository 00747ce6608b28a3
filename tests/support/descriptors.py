"""The open files of this process below one directory; those of other tests may come and go."""

from __future__ import annotations

import gc
import os
from pathlib import Path


def open_below(path: Path) -> list[str]:
    """Returns the sorted paths that are open below a directory, also if they were removed."""
    gc.collect()
    found: list[str] = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    return sorted(each for each in found if each.startswith(str(path)))
