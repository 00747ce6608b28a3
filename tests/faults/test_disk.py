"""Real disks that are full, read-only, or hold a file where a directory should be."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import disks
import pytest
import torch

import functional_ckpt as fc
import scripts
from functional_ckpt import testing


def items(number: int, size: int = 1000) -> dict[str, Any]:
    return {"tree": {"w": torch.full((size,), float(number)), "n": number}}


@pytest.fixture(params=["ext4", "tmpfs"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    with disks.small(request.param, tmp_path) as place:
        yield place


def check(root: Path, step: int) -> None:
    expected = items(step, 50_000)["tree"]
    restored = fc.CheckpointManager(root, read_only=True).restore(step)
    assert testing.differences(restored["tree"], expected) == []


def test_a_full_disk_loses_nothing_and_says_so(
    small_disk: Path, figure: Callable[[str], None]
) -> None:
    """Steps of 200 kB until the disk is full; then with space again; then overwriting when full."""
    root = small_disk / "run"
    manager = fc.CheckpointManager(root, overwrite=True)
    saved: list[int] = []
    for step in itertools.count():
        commit = manager.save(step, items(step, 50_000), metrics={"n": step})
        assert commit is not None
        if (error := commit.exception()) is None:
            saved.append(step)
            continue
        assert isinstance(error, fc.errors.SaveError)
        assert error.step == step
        assert "No space left on device" in str(error) and f"step {step}" in str(error)
        break
    full = saved[-1] + 1
    assert len(saved) >= 5
    assert manager.all_steps() == saved
    assert sorted(os.listdir(root)) == sorted([".functional_ckpt", *map(str, saved)])
    for step in saved:
        check(root, step)

    commit = manager.save(saved[0], items(77, 50_000))  # there is no space for two of one step
    assert commit is not None and commit.exception() is not None
    check(root, saved[0])
    manager.record_metrics(saved[0], {"late": 1})  # or an error, but never a loss
    manager.delete(saved[1])
    assert manager.save(full, items(full, 50_000)).result() == full  # type: ignore[union-attr]
    manager.close()
    with fc.CheckpointManager(root, keep_policy=fc.policies.LatestN(2)) as manager:
        assert manager.all_steps() == [saved[0], *saved[2:], full]
        for step in manager.all_steps():
            check(root, step)
        manager.delete(saved[0])
        manager.save(full + 1, items(full + 1, 50_000)).result()  # type: ignore[union-attr]
        assert manager.all_steps() == [full, full + 1]
    figure(f"{len(saved)} steps until it was full, 0 losses")


def test_a_disk_with_no_byte_left_can_be_opened_and_cleared(small_disk: Path) -> None:
    root = small_disk / "run"
    with fc.CheckpointManager(root) as manager:
        manager.save(1, items(1, 50_000))
        manager.save(2, items(2, 50_000))
    (root / "3.orbax-checkpoint-tmp").mkdir()
    with open(root / "3.orbax-checkpoint-tmp" / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    with fc.CheckpointManager(root) as manager:  # the lock file needs no space
        assert manager.all_steps() == [1, 2]
        manager.delete(1)
        manager.save(3, items(3, 50_000)).result()  # type: ignore[union-attr]
    check(root, 2)
    check(root, 3)


# -------------------------------------------------------------------- full, with a remote tier

_TIERED_SIZE = 200_000  # 0.8 MB, on a disk of 4 MiB (tmpfs) or somewhat less than 8 (ext4)
_NUM_TIERED = 24


def test_full_disk_deletes_steps_that_another_tier_has(small_disk: Path, tmp_path: Path) -> None:
    near, far, seen = small_disk / "run", tmp_path / "far", list[fc.Event]()
    with fc.CheckpointManager(near, tiers=[fc.Tier(path=far)], on_event=seen.append) as manager:
        for step in range(_NUM_TIERED):
            manager.save(step, items(step, _TIERED_SIZE))
            manager.wait_until_finished()
        assert manager.all_steps() == list(range(_NUM_TIERED))
        for step in (0, _NUM_TIERED - 1):
            restored = manager.restore(step)["tree"]
            assert restored["n"] == step and float(restored["w"][-1]) == step
    pruned = [event for event in seen if event.kind == "pruned"]
    assert pruned and {event.directory for event in pruned} == {str(near)}
    with fc.CheckpointManager(near, read_only=True) as manager:
        steps = manager.all_steps()
        assert steps and steps == list(range(steps[0], _NUM_TIERED))
    with fc.CheckpointManager(far, read_only=True) as manager:
        assert manager.all_steps() == list(range(_NUM_TIERED))


def test_steps_without_another_copy_are_not_deleted(small_disk: Path, tmp_path: Path) -> None:
    """Only every other step is uploaded: the others stay, and in the end the error says so."""
    near = small_disk / "run"
    tier = fc.Tier(path=tmp_path / "far", save=fc.policies.every(2))
    manager = fc.CheckpointManager(near, tiers=[tier])
    for step in range(_NUM_TIERED):
        commit = manager.save(step, items(step, _TIERED_SIZE))
        assert commit is not None
        if (error := commit.exception()) is not None:
            break
        manager.wait_until_finished()
    else:
        pytest.fail("the disk was never full")
    assert isinstance(error, fc.errors.SaveError) and error.step == step
    assert "No space left on device" in str(error)
    cause = error.__cause__
    assert isinstance(cause, fc.errors.StorageError) and cause.errno == errno.ENOSPC
    assert set(range(1, step, 2)) <= set(manager.all_steps())
    for each in manager.all_steps():
        assert manager.restore(each)["tree"]["n"] == each
    manager.close()
    with fc.CheckpointManager(near, read_only=True) as alone:
        assert alone.all_steps() == list(range(1, step, 2))


def test_full_disk_keeps_steps_whose_copy_is_gone(small_disk: Path, tmp_path: Path) -> None:
    """The tier is read, not its cache: its steps have been removed."""
    near, far = small_disk / "run", tmp_path / "far"
    manager = fc.CheckpointManager(near, tiers=[fc.Tier(path=far)])
    manager.save(0, items(0, _TIERED_SIZE))
    manager.wait_until_finished()
    (far / "0").rename(tmp_path / "elsewhere")
    with pytest.raises(fc.errors.SaveError, match="No space left on device"):
        manager.save(1, items(1, 10 * _TIERED_SIZE)).result()  # type: ignore[union-attr]
    assert manager.restore(0)["tree"]["n"] == 0
    manager.close()


# ------------------------------------------------------------------------------ read-only


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A run in a directory that became read-only, by a bind mount: permissions do not bind root."""
    root = tmp_path / "run"
    with fc.CheckpointManager(root) as manager:
        manager.save(1, items(1), metrics={"a": 1})
    if os.geteuid() != 0:
        root.chmod(0o555)
        (root / ".functional_ckpt").chmod(0o555)
        (root / ".functional_ckpt" / "lock").chmod(0o444)
        yield root
        root.chmod(0o755)
        (root / ".functional_ckpt").chmod(0o755)
        return
    disks.mount("--bind", str(root), str(root))
    try:
        disks.mount("-o", "remount,bind,ro", str(root))
        yield root
    finally:
        disks.unmount(root)


def test_a_read_only_directory_can_be_read_and_says_so_to_writers(frozen: Path) -> None:
    with fc.CheckpointManager(frozen, read_only=True) as manager:
        assert manager.restore()["tree"]["n"] == 1
        assert manager.metadata(1).metrics == {"a": 1}
        with pytest.raises(fc.errors.StorageError) as caught:
            manager.record_metrics(1, {"b": 2})
        assert caught.value.errno in (errno.EROFS, errno.EACCES)
        assert manager.metadata(1).metrics == {"a": 1}
    for _ in range(2):
        with pytest.raises(fc.errors.StorageError, match=r"Read-only file system|denied") as caught:
            fc.CheckpointManager(frozen)
        assert caught.value.errno in (errno.EROFS, errno.EACCES)
    with pytest.raises(fc.errors.StorageError, match=r"Read-only file system|denied"):
        fc.save(frozen / "pure", items(1))


def test_a_directory_that_becomes_read_only_while_saving(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    root = tmp_path / "run"
    root.mkdir()
    disks.mount("-t", "tmpfs", "none", str(root))
    try:
        with fc.CheckpointManager(root) as manager:
            manager.save(1, items(1)).result()  # type: ignore[union-attr]
            # A file that is open for writing would keep the mount writable.
            lock: Any = manager._steps.lock  # pyright: ignore[reportPrivateUsage]
            with open(root / ".functional_ckpt" / "lock") as file:
                os.dup2(file.fileno(), lock._lock._file.descriptor)
            disks.mount("-o", "remount,ro", str(root))
            with pytest.raises(fc.errors.SaveError, match=r"step 2 .*Read-only file system"):
                manager.save(2, items(2)).result()  # type: ignore[union-attr]
            with pytest.raises(fc.errors.StorageError, match="Read-only file system"):
                manager.delete(1)
            assert manager.all_steps() == [1]
            assert manager.restore(1)["tree"]["n"] == 1
            disks.mount("-o", "remount,rw", str(root))
            manager.save(2, items(2)).result()  # type: ignore[union-attr]
            assert manager.all_steps() == [1, 2]
    finally:
        disks.unmount(root)


def test_without_permission_the_error_says_so(tmp_path: Path) -> None:
    """In a child that gave up its rights, if this process has more than a user's."""
    root = tmp_path / "run"
    with fc.CheckpointManager(root) as manager:
        manager.save(1, items(1))
    for folder in (*tmp_path.parents, tmp_path):
        if folder.owner() == tmp_path.owner() and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    result = scripts.run(
        """
fc.save(root + "-other", items(0))  # late imports may fail with fewer rights
fc.restore(root + "-other")
with fc.CheckpointManager(root, read_only=True) as manager:
    manager.restore()
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
else:
    os.chmod(root, 0o555)
    os.chmod(root + "/.functional_ckpt/lock", 0o444)
try:
    fc.CheckpointManager(root)
except fc.errors.StorageError as error:
    assert "Permission denied" in str(error), error
    assert isinstance(error, OSError) and error.errno == 13
    print("refused")
with fc.CheckpointManager(root, read_only=True) as manager:
    print(manager.restore()["tree"]["n"])
""",
        root,
    )
    assert result.stdout == "refused\n1\n", result.stderr
    root.chmod(0o755)


# ------------------------------------------------------------------------------ files in the way


def test_a_file_where_the_root_should_be(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("precious")
    for read_only in (False, True):
        with pytest.raises(fc.errors.StorageError, match=r"run"):
            fc.CheckpointManager(path, read_only=read_only)
    with pytest.raises(fc.errors.StorageError, match=r"run"):
        fc.CheckpointManager(path / "below")
    with pytest.raises(fc.CheckpointError, match=r"run"):
        fc.save(path, items(1), overwrite=True)
    with pytest.raises(fc.errors.StorageError, match=r"run"):
        fc.save(path / "below", items(1))
    with pytest.raises(fc.errors.StepNotFoundError, match=r"run"):
        fc.restore(path)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_where_a_step_should_be(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "2").write_text("precious")
    with fc.CheckpointManager(tmp_path, overwrite=overwrite) as manager:
        with pytest.raises(fc.errors.StorageError, match=r"step 2: .*is a file") as caught:
            manager.save(2, items(2))
        assert caught.value.step == 2
        manager.save(3, items(3)).result()  # type: ignore[union-attr]
        assert manager.all_steps() == [3]
        with pytest.raises(fc.errors.StepNotFoundError):
            manager.restore(2)
    assert (tmp_path / "2").read_text() == "precious"


def test_a_file_that_appears_while_the_step_is_being_written(tmp_path: Path) -> None:
    class Rude(testing.FaultyStorage):
        def operation(self, kind: str, path: str) -> None:
            if kind == "write" and path.endswith("manifest.ocdbt"):
                (tmp_path / "2").write_text("precious")
            super().operation(kind, path)

    for overwrite in (False, True):
        with fc.CheckpointManager(tmp_path, overwrite=overwrite, storage=Rude()) as manager:
            with pytest.raises(fc.errors.SaveError, match=r"step 2 .*file"):
                manager.save(2, items(2)).result()  # type: ignore[union-attr]
            assert (tmp_path / "2").read_text() == "precious"
            (tmp_path / "2").unlink()


def test_a_directory_that_appears_while_the_step_is_being_written(tmp_path: Path) -> None:
    """A foreign step is not overwritten without overwrite=True."""

    class Rude(testing.FaultyStorage):
        def operation(self, kind: str, path: str) -> None:
            if kind == "write" and path.endswith("manifest.ocdbt"):
                (tmp_path / "2").mkdir(exist_ok=True)
                (tmp_path / "2" / "file").write_text("precious")
            super().operation(kind, path)

    with (
        fc.CheckpointManager(tmp_path, storage=Rude()) as manager,
        pytest.raises(fc.errors.SaveError, match=r"step 2 .*created by another process"),
    ):
        manager.save(2, items(2)).result()  # type: ignore[union-attr]
    assert (tmp_path / "2" / "file").read_text() == "precious"


def test_files_where_the_hidden_directories_should_be(tmp_path: Path) -> None:
    (tmp_path / ".functional_ckpt").write_text("precious")
    with pytest.raises(fc.errors.StorageError, match="functional_ckpt"):
        fc.CheckpointManager(tmp_path)
    (tmp_path / ".functional_ckpt").unlink()
    (tmp_path / ".functional_ckpt" / "lock").mkdir(parents=True)
    with pytest.raises(fc.errors.StorageError, match="lock"):
        fc.CheckpointManager(tmp_path)
    (tmp_path / ".functional_ckpt" / "lock").rmdir()
    (tmp_path / ".functional_ckpt" / "trash").write_text("in the way")
    with pytest.raises(fc.errors.StorageError, match="trash"):
        fc.CheckpointManager(tmp_path)
    fc.CheckpointManager(tmp_path, read_only=True).close()


def test_a_root_and_a_step_that_are_links(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "run").symlink_to(elsewhere)
    with fc.CheckpointManager(tmp_path / "run", overwrite=True) as manager:
        manager.save(1, items(1)).result()  # type: ignore[union-attr]
        (elsewhere / "1").rename(tmp_path / "archived")
        (elsewhere / "1").symlink_to(tmp_path / "archived")
        manager.reload()
        assert manager.restore(1)["tree"]["n"] == 1
        manager.save(1, items(10)).result()  # type: ignore[union-attr]
        assert manager.restore(1)["tree"]["n"] == 10
        manager.delete(1)
    archived = fc.restore(tmp_path / "archived")
    assert archived["tree"]["n"] == 1  # a link's target is not removed
