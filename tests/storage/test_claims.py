"""Claims, locks and replacements leave nothing behind, and name the error of the system."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from descriptors import open_below

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage import commit, replacement, tmp_paths
from functional_ckpt.storage.file_lock import FileLock
from functional_ckpt.storage.local import LocalStorage

STORAGE = LocalStorage()


@pytest.mark.parametrize("fails", [False, True])
def test_a_claim_leaves_no_directory_and_no_descriptor(fails: bool, tmp_path: Path) -> None:
    class Interruption(Exception):
        pass

    try:
        with commit.protocol(STORAGE, str(tmp_path)).claimed(str(tmp_path / "c")) as claim:
            assert Path(claim).is_dir() and open_below(tmp_path) == [claim]
            if fails:
                raise Interruption
    except Interruption:
        assert fails
    assert list(tmp_path.iterdir()) == [] and open_below(tmp_path) == []


def test_a_live_claim_stays_and_a_dead_one_goes(tmp_path: Path) -> None:
    live = tmp_paths.claim(STORAGE, str(tmp_path / "c"))
    assert not tmp_paths.remove_if_dead(STORAGE, live.path)
    assert open_below(tmp_path) == [live.path]
    live.release()
    assert tmp_paths.remove_if_dead(STORAGE, live.path)
    assert tmp_paths.remove_if_dead(STORAGE, live.path), "it is gone"
    assert list(tmp_path.iterdir()) == [] and open_below(tmp_path) == []


def test_a_folder_in_which_another_process_publishes_is_not_waited_for_without_end(
    tmp_path: Path,
) -> None:
    other = FileLock(str(tmp_path), os.O_RDONLY | os.O_DIRECTORY)
    assert other.lock() is True
    with (
        pytest.raises(errors.LockedError, match=str(tmp_path)) as caught,
        tmp_paths.serialized(str(tmp_path), wait_seconds=0.05),
    ):
        pytest.fail("the lock is held")
    assert caught.value.path == str(tmp_path)
    other.release()
    with tmp_paths.serialized(str(tmp_path), wait_seconds=0.0):
        assert open_below(tmp_path) == [str(tmp_path)]
    assert open_below(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_from_one_that_fails(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    lock = FileLock(str(tmp_path), os.O_RDONLY | os.O_DIRECTORY)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        assert lock.lock() is None
        with commit.protocol(STORAGE, str(tmp_path)).claimed(str(tmp_path / "c")) as claim:
            assert Path(claim).is_dir()
    lock.release()


def test_a_lock_in_a_directory_that_is_not_there_is_an_error_of_the_storage(tmp_path: Path) -> None:
    with pytest.raises(errors.StorageError, match="Cannot lock") as caught:
        STORAGE.lock(str(tmp_path / "absent" / "lock"))
    assert caught.value.errno == errno.ENOENT


def test_a_replacement_is_under_way_while_the_old_directory_is_there(tmp_path: Path) -> None:
    for length in (1, 255 - len(os.path.basename(replacement._replaced(""))), 255):
        final = tmp_path / ("n" * length)
        assert not replacement.is_under_way(STORAGE, str(final))
        replacement.finish(STORAGE, str(final), os.path.exists)
        if length == 255:
            continue  # the first rename is refused
        Path(replacement._replaced(str(final))).mkdir()
        assert replacement.is_under_way(STORAGE, str(final))
        replacement.finish(STORAGE, str(final), os.path.exists)
        assert [each.name for each in tmp_path.iterdir()] == [final.name]
        final.rmdir()


def test_a_claim_that_cannot_be_locked_is_an_error_of_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FileLock) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(FileLock, "lock", refuse)
    with pytest.raises(errors.StorageError, match="lock"):
        tmp_paths.claim(STORAGE, str(tmp_path / "c"))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EINTR])
def test_a_lock_is_released_where_close_reports_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """As on NFS: the descriptor is closed nevertheless."""
    manager = fc.CheckpointManager(tmp_path / "run")
    manager.save(1, {"state": {"x": 1}}).result()  # type: ignore[union-attr]
    lock = os.path.realpath(tmp_path / "run" / ".functional_ckpt" / "lock")
    close, failed = os.close, 0

    def fail(descriptor: int) -> None:
        nonlocal failed
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        close(descriptor)
        if path == lock:
            failed += 1
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "close", fail)
    manager.close()
    monkeypatch.undo()
    assert failed == 1
    with fc.CheckpointManager(tmp_path / "run") as manager:
        assert manager.all_steps() == [1]
