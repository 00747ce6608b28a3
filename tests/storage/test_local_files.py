"""Local files that may be anything, on a file system that may fail at any call."""

from __future__ import annotations

import errno
import functools
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from descriptors import open_below

from functional_ckpt import errors
from functional_ckpt.storage import commit, queries
from functional_ckpt.storage.local import LocalStorage

CODES = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.EINTR, errno.ENOMEM)


@pytest.fixture
def storage() -> LocalStorage:
    return LocalStorage()


def make(kind: str, path: Path) -> None:
    """Puts something that is not a regular file at a path."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(path.parent)
            server.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        target = path.with_name("target")
        target.write_bytes(b"secret")
        path.symlink_to(target)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "link", "loop", "directory"])
def test_only_regular_files_are_read(
    kind: str, storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file"
    make(kind, path)
    reads: list[Callable[[], Any]] = [
        lambda: storage.read(str(path)),
        lambda: storage.read(str(path), 0, 10),
        lambda: storage.checksum(str(path)),
    ]
    for read in reads:
        with pytest.raises(errors.CorruptCheckpointError, match="expected a regular file"):
            read()
    if kind != "directory":
        with pytest.raises(errors.CorruptCheckpointError, match="expected a regular file"):
            queries.regular_sizes(storage, str(tmp_path))


def test_a_file_with_holes_is_refused_whatever_size_it_claims(
    storage: LocalStorage, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"{}")
    os.truncate(path, 2**40)
    with pytest.raises(errors.CorruptCheckpointError, match="holes"):
        storage.read(str(path))


def test_a_large_file_without_holes_is_read(storage: LocalStorage, tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20 + 5)
    (tmp_path / "file").write_bytes(data)
    assert storage.read(str(tmp_path / "file")) == data
    assert storage.checksum(str(tmp_path / "file")).size_bytes == len(data)


def fail(code: int) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", CODES)
def test_a_failing_stat_never_means_that_nothing_is_there(
    code: int, storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path)
    commits = commit.protocol(storage, path)
    monkeypatch.setattr(os, "stat", fail(code))
    monkeypatch.setattr(os, "lstat", fail(code))
    functions = (
        *(queries.exists, queries.is_directory, queries.is_link, queries.kind),
        *(queries.modified_ns, queries.age_seconds),
    )
    asked = [functools.partial(function, storage) for function in functions]
    for ask in (*asked, commits.is_committed, commits.commit_id):
        with pytest.raises(errors.StorageError) as caught:
            ask(path)
        assert caught.value.errno == code and caught.value.path == path


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR])
def test_missing_paths_are_absent(code: int, storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = str(tmp_path / ("none" if code == errno.ENOENT else "file/none"))
    assert not queries.exists(storage, path) and not queries.is_directory(storage, path)
    commits = commit.protocol(storage, str(tmp_path))
    assert not commits.is_committed(path) and not queries.is_link(storage, path)
    assert queries.kind(storage, path) == "nothing" and queries.modified_ns(storage, path) == 0


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", ["list", "walk", "sizes", "regular_sizes", "total_bytes"])
def test_a_failing_listing_is_an_error_at_every_depth(
    name: str, code: int, storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"1")
    bad = tmp_path if name == "list" else tmp_path / "a" / "b"
    for function in ("listdir", "scandir"):
        real = getattr(os, function)

        def call(path: Any, real: Any = real) -> Any:
            if str(path).rstrip("/") == str(bad):
                raise OSError(code, os.strerror(code))
            return real(path)

        monkeypatch.setattr(os, function, call)
    with pytest.raises(errors.StorageError) as caught:
        if name in ("list", "walk"):
            getattr(storage, name)(str(tmp_path))
        else:
            getattr(queries, name)(storage, str(tmp_path))
    assert caught.value.errno == code


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("function", ["open", "fstat", "pread"])
def test_a_failing_read_keeps_its_errno_and_leaks_no_descriptor(
    function: str, code: int, storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail(code))
        with pytest.raises(errors.StorageError) as caught:
            storage.read(str(path))
    assert caught.value.errno == code
    assert open_below(tmp_path) == []


def test_links_to_directories_are_told_from_directories(
    storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert queries.is_directory(storage, str(tmp_path / "link")) and queries.is_link(
        storage, str(tmp_path / "link")
    )
    assert stat.S_ISLNK(os.lstat(tmp_path / "link").st_mode)
    with pytest.raises(errors.CorruptCheckpointError, match="a link"):
        queries.regular_sizes(storage, str(tmp_path / "link"))


@pytest.mark.parametrize("offset", [3, 4, 2**62])
def test_a_read_from_the_end_of_a_file_on_is_empty_and_reserves_nothing(
    tmp_path: Path, storage: LocalStorage, offset: int
) -> None:
    path = str(tmp_path / "file")
    Path(path).write_bytes(b"abc")
    assert storage.read(path, offset) == storage.read(path, offset, 2**62) == b""
    assert storage.read(path, 1) == storage.read(path, 1, 2**62) == b"bc"


def test_a_large_file_with_holes_was_never_written_whole(
    storage: LocalStorage, tmp_path: Path
) -> None:
    path = tmp_path / "record"
    path.write_bytes(bytes(2**21))
    assert storage.read(str(path)) == bytes(2**21)
    os.truncate(path, 2**22)
    with pytest.raises(errors.CorruptCheckpointError, match="with holes"):
        storage.read(str(path))
