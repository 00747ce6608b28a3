"""The simulated disk: synced changes are kept, others undone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from functional_ckpt.storage import commit
from functional_ckpt.testing import Fault
from functional_ckpt.testing.power_cut import Disk


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def safe(disk: Disk) -> dict[str, bytes | str | None]:
    """The minimal state after a power cut now."""
    return dict(disk.now().images()[0].entries)


def test_what_was_there_before_is_safe(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("d")
    with Disk(tmp_path) as disk:
        assert safe(disk) == {"d": None, "d/file": b"old", "link": "d"}


def test_bytes_and_names_are_synced_each_for_itself(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with Disk(tmp_path) as disk:
        file.write_bytes(b"new")
        assert safe(disk) == {}
        sync(tmp_path)
        assert safe(disk) == {"file": b""}
        sync(file)
        assert safe(disk) == {"file": b"new"}
        file.write_bytes(b"newer")
        assert safe(disk) == {"file": b"new"}
        assert [dict(each.entries) for each in disk.now().images()] == [
            {"file": b"new"},
            {"file": b"newer"},
        ]
        file.unlink()
        assert safe(disk) == {"file": b"new"}
        sync(tmp_path)
        assert safe(disk) == {}


def test_a_directory_that_is_not_durable_takes_its_content_along(tmp_path: Path) -> None:
    with Disk(tmp_path) as disk:
        (tmp_path / "a" / "b").mkdir(parents=True)
        sync(tmp_path / "a")
        assert safe(disk) == {}
        sync(tmp_path)
        assert safe(disk) == {"a": None, "a/b": None}


def test_a_rename_is_atomic_and_durable_with_either_directory(tmp_path: Path) -> None:
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    (tmp_path / "from" / "file").write_bytes(b"new")
    (tmp_path / "to" / "file").write_bytes(b"old")
    with Disk(tmp_path) as disk:
        os.replace(tmp_path / "from" / "file", tmp_path / "to" / "file")
        before = {"from": None, "from/file": b"new", "to": None, "to/file": b"old"}
        after = {"from": None, "to": None, "to/file": b"new"}
        images = disk.now().images(num_single=10, num_random=10)
        assert [dict(each.entries) for each in images] == [before, after]
        sync(tmp_path / "from")
        assert safe(disk) == after


@pytest.mark.parametrize("is_new", [True, False])
def test_an_exchange_is_atomic(is_new: bool, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    if not is_new:
        (tmp_path / "b").write_bytes(b"2")
    with Disk(tmp_path) as disk:
        if is_new:
            (tmp_path / "b").write_bytes(b"2")
            sync(tmp_path / "b")
        assert disk.storage.swap(str(tmp_path / "b"), str(tmp_path / "a"))
        for image in disk.now().images(num_single=10, num_random=10):
            assert image.entries["a"] in (b"1", b"2")


def test_changes_that_are_not_synced_are_kept_in_any_part(tmp_path: Path) -> None:
    with Disk(tmp_path) as disk:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        images = disk.now().images(num_single=10)
        found = {frozenset(each.entries) for each in images}
        assert found == {frozenset(), frozenset("a"), frozenset("b"), frozenset("ab")}


def test_operations_leave_moments_and_images_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with Disk(tmp_path / "disk") as disk:
        disk.storage.make_directory(str(tmp_path / "disk" / "d"))
        commits = commit.protocol(disk.storage, str(tmp_path / "disk"))
        commits.replace(str(tmp_path / "disk" / "d" / "file"), b"content")
        disk.storage.inject(Fault())
    assert disk.moments[0].operation is not None
    assert [each.operation.kind for each in disk.moments if each.operation is not None] == [
        *("make_directory", "write", "sync", "rename", "sync")
    ]
    disk.moments[-1].images()[-1].write(tmp_path / "back")
    assert (tmp_path / "back" / "d" / "file").read_bytes() == b"content"
