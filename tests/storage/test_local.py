from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import disks
import pytest
from contract import StorageContract
from descriptors import open_below

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage import commit
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.paths import check_arrays_path, resolve
from functional_ckpt.testing import FaultyStorage


class TestLocalStorage(StorageContract):
    @pytest.fixture
    def storage(self) -> LocalStorage:
        return LocalStorage()


class TestStorageThatCannotExchange(StorageContract):
    """As file systems without `renameat2` are."""

    @pytest.fixture
    def storage(self) -> Storage:
        return FaultyStorage(can_exchange=False)


def test_resolve_makes_local_paths_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve("a/../b") == str(tmp_path / "b")
    assert resolve(tmp_path / "c") == str(tmp_path / "c")
    assert resolve(f"file://{tmp_path}/d") == str(tmp_path / "d")
    assert resolve("~/x") == "/home/me/x"


def test_resolve_normalises_uris() -> None:
    assert resolve("gs://bucket/x/") == "gs://bucket/x"
    assert resolve("S3://bucket//a/b") == "s3://bucket/a/b"
    assert resolve("s3://bucket") == "s3://bucket"
    assert resolve("oci://bucket@space/a") == "oci://bucket@space/a"
    with pytest.raises(errors.UsageError, match="two slashes"):
        resolve(Path("s3://bucket/x"))
    for text in ("s3://", "s3:///x", "s3://b/../c"):
        with pytest.raises(errors.UsageError, match="Invalid URI"):
            resolve(text)
    with pytest.raises(errors.UsageError, match="credentials") as caught:
        resolve("s3://key:secret@bucket/x")
    assert "secret" not in str(caught.value)


def test_links_are_listed_and_never_followed(tmp_path: Path) -> None:
    storage = LocalStorage()
    outside = tmp_path / "outside"
    (outside / "d").mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(outside / "secret")
    (inside / "folder").symlink_to(outside)
    assert list(storage.walk(str(inside))) == ["folder", "link"]
    with pytest.raises(errors.CorruptCheckpointError, match="a link"):
        storage.checksum(str(inside / "link"))
    storage.remove(str(inside))
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    storage = LocalStorage()
    (tmp_path / "f").write_bytes(b"")
    for path in ("f", "f/x"):
        with pytest.raises(errors.StorageError, match="Cannot create directory"):
            storage.make_directory(str(tmp_path / path))
    with pytest.raises(errors.StorageError, match="Cannot list"):
        storage.list(str(tmp_path / "f"))


_HOLD = """
import sys, time
from functional_ckpt.storage.local import LocalStorage
lock = LocalStorage().lock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_process_ends_with_it(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    process = subprocess.Popen([sys.executable, "-c", _HOLD, path], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(errors.LockedError, match=f'"pid": {process.pid}'):
            LocalStorage().lock(path)
    finally:
        process.kill()
        process.communicate()
    LocalStorage().lock(path).release()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_neither_keeps_nor_breaks_the_lock(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    lock = LocalStorage().lock(path)
    release, wait = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(wait)
        lock.release()  # as a child's cleanup might
        os.read(release, 1)  # until the parent is done
        os._exit(0)
    try:
        with pytest.raises(errors.LockedError):
            LocalStorage().lock(path)
        lock.release()
        LocalStorage().lock(path).release()  # though the child lives
    finally:
        os.close(wait)
        os.waitpid(child, 0)
        os.close(release)


def test_an_exchange_that_is_refused_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(errors.StorageError, match="Cannot exchange") as caught:
        LocalStorage().swap(str(tmp_path / "a"), str(tmp_path / "b"))
    assert caught.value.errno == errno.ENOENT


def test_what_cannot_be_exchanged_on_an_overlay_stays_whole(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    layers, place = tmp_path / "layers", tmp_path / "place"
    layers.mkdir()
    place.mkdir()
    disks.mount("-t", "tmpfs", "-o", "size=50m", "none", str(layers))
    try:
        for name in ("lower", "upper", "work"):
            (layers / name).mkdir()
        fc.save(layers / "lower" / "c", {"m": {"a": 1}})
        options = ",".join(f"{name}dir={layers / name}" for name in ("lower", "upper", "work"))
        disks.mount("-t", "overlay", "-o", options, "none", str(place))
        try:
            with pytest.raises(errors.StorageError, match=r"lower layer .* delete it first"):
                fc.save(place / "c", {"m": {"a": 2}}, overwrite=True)
            assert fc.restore(place / "c")["m"] == {"a": 1}
        finally:
            disks.unmount(place)
    finally:
        disks.unmount(layers)


def test_a_lock_that_cannot_be_taken_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(errors.StorageError, match="Cannot lock") as caught:
        LocalStorage().lock(str(tmp_path / "lock"))
    assert caught.value.errno == errno.EIO
    assert open_below(tmp_path) == []


def test_a_released_lock_leaves_no_descriptor_and_lets_others_in(tmp_path: Path) -> None:
    lock = LocalStorage().lock(str(tmp_path / "lock"))
    with pytest.raises(errors.LockedError, match=str(os.getpid())):
        LocalStorage().lock(str(tmp_path / "lock"))
    lock.release()
    lock.release()
    assert open_below(tmp_path) == []
    other = LocalStorage().lock(str(tmp_path / "lock"))
    other.release()
    assert open_below(tmp_path) == []


def test_sync_reaches_the_disk_and_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded operation comes before the sync: only the call itself proves it."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    (tmp_path / ".functional_ckpt").mkdir()
    commits = commit.protocol(LocalStorage(), str(tmp_path))
    commits.replace(str(tmp_path / "file"), b"content")
    temporary, folder = synced
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/file\.\w+\.tmp", temporary)
    assert folder == str(tmp_path)
    commits.replace_link(str(tmp_path / "link"), "file")
    assert synced[2:] == [str(tmp_path)]
    assert open_below(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/run/\udcff", "is not UTF-8"),
        ("/run/a\0b", "has a NUL byte"),
        ("/run\\/a", "starts or ends with a backslash"),
        ("/run/\u00e4", None),
        ("/run/a\\b", None),
    ],
    ids=["bytes", "nul", "backslash", "umlaut", "inner backslash"],
)
def test_a_path_at_which_no_array_could_be_read_is_refused(path: str, why: str | None) -> None:
    if why is None:
        check_arrays_path(path)
        return
    with pytest.raises(errors.UsageError, match=why):
        check_arrays_path(path)


def test_an_exchange_that_is_refused_names_the_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(errors.StorageError, match="No such file or directory") as info:
        LocalStorage().swap(str(tmp_path / "a"), str(tmp_path / "b"))
    assert info.value.errno == errno.ENOENT
