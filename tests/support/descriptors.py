"""Which files this process holds open: those of one folder, as other tests' may come and go."""

from __future__ import annotations

import gc
import os
from pathlib import Path


def open_below(path: Path) -> list[str]:
    """Files that are open below a folder, or were removed while open, sorted."""
    gc.collect()
    found: list[str] = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    return sorted(each for each in found if each.startswith(str(path)))
