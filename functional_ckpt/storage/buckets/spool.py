"""Local copies of objects, for stores that TensorStore has no driver for."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable

from functional_ckpt.storage.buckets.base import Entry


class Spool:
    """A temporary folder of copies, removed with its storage. Safe to use from any thread."""

    def __init__(self) -> None:
        self._root: str | None = None
        self._known: dict[str, tuple[int, int]] = {}
        self._mutex = threading.RLock()

    def directory(self, key: str) -> str:
        """Returns the local folder of the objects below `key`, made."""
        with self._mutex:
            if self._root is None:
                self._root = tempfile.mkdtemp(prefix="functional-ckpt-")
                weakref.finalize(self, shutil.rmtree, self._root, ignore_errors=True)
        path = os.path.join(self._root, key)
        os.makedirs(path, exist_ok=True)
        return path

    def fetch(self, entry: Entry, download: Callable[[str, str], None]) -> None:
        """Makes sure that the copy of an object is here and as new as the object."""
        stamp = (entry.size_bytes, entry.modified_ns)
        with self._mutex:
            path = os.path.join(
                self.directory(os.path.dirname(entry.key)), os.path.basename(entry.key)
            )
            if self._known.get(entry.key) == stamp and os.path.exists(path):
                return
            download(entry.key, path)
            self._known[entry.key] = stamp

    def forget(self, key: str) -> None:
        """Removes the copies at or below `key`."""
        with self._mutex:
            if self._root is None:
                return
            shutil.rmtree(os.path.join(self._root, key), ignore_errors=True)
            self._known = {
                name: stamp
                for name, stamp in self._known.items()
                if name != key and not name.startswith(f"{key}/")
            }
