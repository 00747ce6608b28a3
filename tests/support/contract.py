"""The contract of every storage backend, in one body: a backend inherits it and provides itself.

A test file subclasses `StorageContract` and overrides the `storage` fixture; where a backend's
paths are not those of the local file system, `root` too.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import xxhash

from functional_ckpt import errors
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.base import Storage


class StorageContract:
    """Operations, and the commit protocol that stands on them."""

    @pytest.fixture
    def storage(self) -> Storage:
        """A new backend."""
        raise NotImplementedError

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        """An empty directory of the backend."""
        return str(tmp_path)

    # -------------------------------------------------------------------------------- operations

    def test_written_arrays_are_read_back(self, storage: Storage, root: str) -> None:
        path = os.path.join(root, "a")
        assert not queries.exists(storage, path)
        for data in (b"", b"one", bytes(range(256)) * 1_000, b"short again"):
            storage.write(path, data)
            storage.sync(path)
            assert storage.read(path) == data
            described = storage.checksum(path)
            assert described.size_bytes == len(data)
            assert described.xxh3 == xxhash.xxh3_64_hexdigest(data)
        assert queries.exists(storage, path) and not queries.is_directory(storage, path)

    def test_directories_come_with_their_parents(self, storage: Storage, root: str) -> None:
        path = os.path.join(root, "a", "b", "c")
        storage.make_directory(path)
        storage.make_directory(path)
        storage.sync(path)
        assert queries.is_directory(storage, path) and storage.list(path) == []

    def test_names_are_listed_in_order(self, storage: Storage, root: str) -> None:
        for name in ("b", "a", "10", "é"):
            storage.write(os.path.join(root, name), b"x" * len(name))
        storage.make_directory(os.path.join(root, "c", "empty"))
        storage.write(os.path.join(root, "c", "d"), b"four")
        assert storage.list(root) == ["10", "a", "b", "c", "é"]
        assert list(storage.walk(root)) == ["10", "a", "b", "c/d", "é"]
        assert queries.total_bytes(storage, root) == 2 + 1 + 1 + 1 + 4
        assert storage.list(os.path.join(root, "none")) == []

    def test_replace_leaves_one_content_and_nothing_beside(
        self, storage: Storage, root: str
    ) -> None:
        path = os.path.join(root, "a")
        commit.protocol(storage, root).replace(path, b"one")
        commit.protocol(storage, root).replace(path, b"two")
        assert storage.read(path) == b"two" and storage.list(root) == ["a"]

    def test_rename_moves_a_directory_completely(self, storage: Storage, root: str) -> None:
        source, target = os.path.join(root, "s"), os.path.join(root, "t")
        storage.make_directory(source)
        storage.write(os.path.join(source, "a"), b"1")
        storage.rename(source, target)
        assert storage.list(root) == ["t"] and storage.read(os.path.join(target, "a")) == b"1"

    def test_rename_never_replaces_a_directory_with_entries(
        self, storage: Storage, root: str
    ) -> None:
        for name in ("s", "t"):
            storage.make_directory(os.path.join(root, name))
            storage.write(os.path.join(root, name, name), b"1")
        with pytest.raises(errors.StorageError):
            storage.rename(os.path.join(root, "s"), os.path.join(root, "t"))
        assert list(storage.walk(root)) == ["s/s", "t/t"]

    def test_exchange_swaps_or_declines(self, storage: Storage, root: str) -> None:
        for name in ("s", "t"):
            storage.make_directory(os.path.join(root, name))
            storage.write(os.path.join(root, name, name), b"1")
        if storage.swap(os.path.join(root, "s"), os.path.join(root, "t")):
            assert list(storage.walk(root)) == ["s/t", "t/s"]
        else:
            assert list(storage.walk(root)) == ["s/s", "t/t"]

    def test_remove_takes_files_trees_and_nothing(self, storage: Storage, root: str) -> None:
        storage.make_directory(os.path.join(root, "d", "e"))
        storage.write(os.path.join(root, "d", "e", "f"), b"1")
        storage.write(os.path.join(root, "g"), b"1")
        for name in ("d", "g", "never"):
            storage.remove(os.path.join(root, name))
        assert storage.list(root) == []

    def test_latest_is_pointed_at_again(self, storage: Storage, root: str) -> None:
        for target in ("1", "2"):
            storage.make_directory(os.path.join(root, target))
            storage.make_directory(os.path.join(root, commit.HIDDEN))
            latest = os.path.join(root, "latest")
            commit.protocol(storage, root).replace_link(latest, target)
            storage.write(os.path.join(root, "latest", "a"), target.encode())
        assert storage.read(os.path.join(root, "2", "a")) == b"2"
        assert [n for n in storage.list(root) if n != commit.HIDDEN] == ["1", "2", "latest"]

    @pytest.mark.parametrize("operation", ["read", "checksum"])
    def test_missing_file_raises_storage_error(
        self, operation: str, storage: Storage, root: str
    ) -> None:
        path = os.path.join(root, "none")
        with pytest.raises(errors.StorageError, match="none") as caught:
            getattr(storage, operation)(path)
        assert caught.value.path == path and caught.value.errno is not None
        assert isinstance(caught.value, OSError)

    def test_the_lock_is_for_one_and_names_it(self, storage: Storage, root: str) -> None:
        path = os.path.join(root, "hidden", "lock")
        storage.make_directory(os.path.dirname(path))
        lock = storage.lock(path)
        with pytest.raises(errors.LockedError, match=f'"pid": {os.getpid()}'):
            storage.lock(path)
        lock.release()
        lock.release()
        storage.lock(path).release()

    # -------------------------------------------------------------------------------- the commit

    def _step(self, storage: Storage, path: str, data: bytes) -> str:
        storage.make_directory(os.path.join(path, "item"))
        storage.write(os.path.join(path, "item", "a"), data)
        commit.sync_tree(storage, path, ["item/a"])
        return path

    def _files(self, storage: Storage, root: str) -> list[str]:
        """Returns the files below the root, without those of the bookkeeping directory."""
        return [name for name in storage.walk(root) if not name.startswith(commit.HIDDEN)]

    def test_publish_makes_a_step_visible_at_once(self, storage: Storage, root: str) -> None:
        final = os.path.join(root, "7")
        tmp = self._step(storage, commit.tmp_path(final), b"new")
        assert commit.protocol(storage, root).publish(tmp, final) is None
        assert self._files(storage, root) == ["7/item/a"]

    def test_publish_over_a_step_gives_the_old_one_back(self, storage: Storage, root: str) -> None:
        hidden = os.path.join(root, commit.HIDDEN)
        storage.make_directory(hidden)
        final = self._step(storage, os.path.join(root, "7"), b"old")
        tmp = self._step(storage, commit.tmp_path(final), b"new")
        replaced = commit.protocol(storage, root).publish(tmp, final)
        assert storage.read(os.path.join(final, "item", "a")) == b"new"
        assert replaced is not None
        assert storage.read(os.path.join(replaced, "item", "a")) == b"old"
        storage.remove(replaced)
        assert commit.protocol(storage, root).recover() == []
        assert [name for name in storage.list(root) if not name.startswith(".")] == ["7"]

    def test_discard_leaves_nothing(self, storage: Storage, root: str) -> None:
        path = self._step(storage, os.path.join(root, "7"), b"old")
        commit.protocol(storage, root).discard(path)
        assert self._files(storage, root) == []

    def test_recover_removes_what_the_dead_left(self, storage: Storage, root: str) -> None:
        hidden = os.path.join(root, commit.HIDDEN)
        kept = self._step(storage, os.path.join(root, "6"), b"kept")
        self._step(storage, commit.tmp_path(os.path.join(root, "7")), b"torn")
        self._step(storage, os.path.join(hidden, "trash", "5.abc"), b"old")
        storage.write(os.path.join(hidden, "metrics.json.123.tmp"), b"{")
        storage.make_directory(os.path.join(root, "notes"))
        done = commit.protocol(storage, root).recover()
        assert len(done) == 1 and "7" in done[0]
        assert storage.list(root) == [commit.HIDDEN, "6", "notes"]
        assert storage.read(os.path.join(kept, "item", "a")) == b"kept"
        assert list(storage.walk(hidden)) == []
        assert commit.protocol(storage, root).recover() == []
