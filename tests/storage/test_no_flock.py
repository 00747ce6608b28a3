"""File systems without `flock`: a lease in files, and never two writers."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import threading
import time
from pathlib import Path

import disks
import pytest

import functional_ckpt as fc
import scripts
from functional_ckpt import errors
from functional_ckpt.storage import file_lock, lease_files
from functional_ckpt.storage.buckets import lease
from functional_ckpt.storage.buckets.base import NotFound, PermanentError, PreconditionFailed
from functional_ckpt.storage.lease_files import LeaseFiles
from functional_ckpt.storage.local import LocalStorage


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=os.strerror)
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


def items(step: int) -> dict[str, object]:
    return {"tree": {"step": step}}


def key_of(root: Path) -> str:
    return str(root / ".functional_ckpt" / "lock").lstrip("/")


def test_a_manager_takes_a_lease_and_the_next_one_is_refused(
    no_flock: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "functional_ckpt"):
        with fc.CheckpointManager(tmp_path) as manager:
            manager.save(1, items(1))
            with pytest.raises(errors.LockedError, match=f'"pid": {os.getpid()}'):
                fc.CheckpointManager(tmp_path)
        with fc.CheckpointManager(tmp_path) as manager:
            manager.save(2, items(2))
            manager.delete(1)
            assert manager.all_steps() == [2]
    assert caplog.text.count("no file locks") == 1


def test_a_dead_holder_of_this_machine_is_replaced_at_once(no_flock: int, tmp_path: Path) -> None:
    script = """
        import errno, fcntl
        def refuse(descriptor, operation):
            raise OSError(errno.ENOLCK, "no locks")
        fcntl.flock = refuse
        manager = fc.CheckpointManager(root)
        manager.save(1, items(1)).result()
        os._exit(0)
    """
    assert scripts.run(script, tmp_path).returncode == 0
    started = time.monotonic()
    with fc.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [1]
    assert time.monotonic() - started < 10


def test_a_writer_whose_lease_was_taken_over_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "")))
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 60.0)  # as if it were suspended
    manager = fc.CheckpointManager(tmp_path)
    manager.save(1, items(1)).result()  # type: ignore[union-attr]
    monkeypatch.setattr(lease, "_machine", lambda: "another")
    with fc.CheckpointManager(tmp_path) as other:
        other.save(2, items(2)).result()  # type: ignore[union-attr]
        with pytest.raises(errors.LockedError, match="another writer took it"):
            manager.save(3, items(3)).result()  # type: ignore[union-attr]
        other.reload()
        assert other.all_steps() == [1, 2]
    manager.close()


def test_a_holder_that_renews_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.2)
    held = lease.take(LeaseFiles(), str(tmp_path / "lock").lstrip("/"))
    monkeypatch.setattr(lease, "_machine", lambda: "another")
    with pytest.raises(errors.LockedError):
        lease.take(LeaseFiles(), str(tmp_path / "lock").lstrip("/"))
    held.check()
    held.release()
    lease.take(LeaseFiles(), str(tmp_path / "lock").lstrip("/")).release()


def test_a_directory_that_was_replaced_is_noticed(
    no_flock: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    manager = fc.CheckpointManager(root)
    root.rename(tmp_path / "moved")
    (root / ".functional_ckpt").mkdir(parents=True)
    with pytest.raises(errors.LockedError, match="no longer the directory"):
        manager.save(1, items(1)).result()  # type: ignore[union-attr]
    manager.close()


def test_of_many_that_replace_a_state_one_succeeds(tmp_path: Path) -> None:
    files, key = LeaseFiles(), str(tmp_path / "lock").lstrip("/")
    version = files.write(key, b"first", replacing="").version
    won: list[int] = []

    def work(number: int) -> None:
        try:
            files.write(key, str(number).encode(), replacing=version)
        except PreconditionFailed:
            return
        won.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    (winner,) = won
    assert files.read(key) == str(winner).encode()


def test_a_state_that_is_long_gone_is_not_replaced(tmp_path: Path) -> None:
    """A suspended process creates a number that others have passed and removed."""
    files, key = LeaseFiles(), str(tmp_path / "lock").lstrip("/")
    old = files.write(key, b"old", replacing="").version
    for number in range(3):
        files.write(key, str(number).encode())
    (tmp_path / "lock.1").write_bytes(b"old")  # as it looks to the process
    with pytest.raises(PreconditionFailed):
        files.write(key, b"again", replacing=old)
    version = files.head(key).version
    assert version is not None
    files.delete([key], versions={key: version})
    with pytest.raises(NotFound):
        files.head(key)
    assert files.write(key, b"new", replacing="").version == "6"


@pytest.mark.parametrize("replacing", ["", "1"])
def test_a_state_that_vanishes_during_a_write_is_not_replaced(
    replacing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the lease between the listing and the reading of the old state."""
    files, key = LeaseFiles(), str(tmp_path / "lock").lstrip("/")
    files.write(key, b"old", replacing="")
    content = lease_files._content

    def other_is_faster(key: str, number: int) -> bytes:
        monkeypatch.setattr(lease_files, "_content", content)
        files.write(key, b"other")
        return content(key, number)

    monkeypatch.setattr(lease_files, "_content", other_is_faster)
    with pytest.raises(PreconditionFailed):
        files.write(key, b"new", replacing=replacing)
    assert files.read(key) == b"other"


def test_a_lease_in_a_directory_that_is_gone_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_lock._take_lease(str(tmp_path / "gone" / "lock"))


def test_the_lock_file_is_kept_for_the_next_writer(no_flock: int, tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    for _ in range(3):
        lock = LocalStorage().lock(path)
        lock.check()
        lock.release()
    assert len(list(tmp_path.iterdir())) == 2


def test_two_mounts_of_one_directory_have_one_writer(tmp_path: Path) -> None:
    """FUSE keeps the locks of each mount apart, as those of two hosts."""
    (tmp_path / "second").mkdir()
    with disks.large("fuse", tmp_path) as first:
        subprocess.run(["bindfs", tmp_path / "beneath", tmp_path / "second"], check=True)
        try:
            second = tmp_path / "second" / "run"
            with fc.CheckpointManager(first / "run") as manager:
                manager.save(1, items(1))
                with pytest.raises(errors.LockedError, match=f'"pid": {os.getpid()}'):
                    fc.CheckpointManager(second)
                manager.save(2, items(2))
            with fc.CheckpointManager(second) as manager:
                assert manager.all_steps() == [1, 2]
                manager.save(3, items(3))
        finally:
            disks.unmount(tmp_path / "second")
    assert fc.restore(tmp_path / "beneath" / "run" / "3")["tree"]["step"] == 3


def test_a_state_is_replaced_only_by_who_knows_its_version(tmp_path: Path) -> None:
    files, key = LeaseFiles(), str(tmp_path / "lock").lstrip("/")
    first = files.write(key, b"one", replacing="")
    for replacing in ("", "0", "2", "x"):
        with pytest.raises(PreconditionFailed):
            files.write(key, b"two", replacing=replacing)
    assert files.read(key) == b"one" and first.version == "1"
    second = files.write(key, b"two", replacing=first.version)
    with pytest.raises(PreconditionFailed):
        files.write(key, b"three", replacing=first.version)
    files.delete([key], versions={key: second.version or ""})
    with pytest.raises(PreconditionFailed):
        files.write(key, b"four", replacing=second.version)
    assert files.write(key, b"five", replacing="").version == "4"


def test_the_newest_of_two_states_counts_after_a_crash_between_them(tmp_path: Path) -> None:
    files, key = LeaseFiles(), str(tmp_path / "lock").lstrip("/")
    for number in (8, 9):
        (tmp_path / f"lock.{number}").write_bytes(b"%d" % number)
    assert files.read(key) == b"9" and files.head(key).version == "9"
    assert files.write(key, b"new", replacing="9").version == "10"
    assert [path.name for path in tmp_path.iterdir()] == ["lock.10"]


def test_fuse_is_known_by_its_mount(tmp_path: Path) -> None:
    def is_fuse(folder: Path) -> bool:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            return file_lock._is_fuse(descriptor)
        finally:
            os.close(descriptor)

    assert not is_fuse(tmp_path)
    with disks.large("fuse", tmp_path) as folder:
        assert is_fuse(folder)


def test_a_state_that_is_absent_is_told_from_an_error(tmp_path: Path) -> None:
    files, key = LeaseFiles(), str(tmp_path / "lock").lstrip("/")
    (tmp_path / "file").touch()
    for absent in (key, str(tmp_path / "nothing" / "lock").lstrip("/")):
        for ask in (files.head, files.read):
            with pytest.raises(NotFound):
                ask(absent)
    with pytest.raises(PermanentError, match="Not a directory"):
        files.head(str(tmp_path / "file" / "lock").lstrip("/"))
