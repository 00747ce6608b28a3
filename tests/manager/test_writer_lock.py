"""How long a manager keeps other writers out, and of which directory."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from descriptors import open_below
from managing import Gate, looked_into, saved, state

import functional_ckpt as fc
import scripts
from functional_ckpt import errors
from functional_ckpt.steps import writer_lock
from functional_ckpt.storage.base import Lock
from functional_ckpt.storage.local import LocalStorage

# ------------------------------------------------------------------------------ dropped managers


def save_and_drop(root: Path, step: int, gate: Gate) -> fc.Commit:
    manager = fc.CheckpointManager(root, storage=gate)
    gate.shut()
    handle = manager.save(step, state(step))
    assert handle is not None
    return handle


def try_to_write(root: Path) -> str:
    """The result of another process that tries to write."""
    result = scripts.run(
        """
try:
    fc.CheckpointManager(root).close()
    print("opened")
except fc.errors.LockedError as error:
    print("locked", error)
""",
        root,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_dropped_manager_keeps_other_processes_out_until_its_commit_is_over(
    tmp_path: Path,
) -> None:
    gate = Gate("rename")
    handle = save_and_drop(tmp_path, 1, gate)
    gc.collect()
    try:
        assert f'"pid": {os.getpid()}' in try_to_write(tmp_path)
    finally:
        gate.open()
    assert handle.result(60) == 1
    assert try_to_write(tmp_path) == "opened\n"
    assert looked_into(tmp_path).restore(1)["state"]["step"] == 1


def test_a_new_manager_waits_for_the_commit_of_a_dropped_one(tmp_path: Path) -> None:
    gate = Gate("rename")
    first = save_and_drop(tmp_path, 1, gate)
    gate.open_soon()
    with fc.CheckpointManager(tmp_path) as manager:
        assert first.done()
        assert manager.all_steps() == [1]
        saved(manager, 2)


def test_a_commit_that_takes_too_long_is_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_lock, "_WAIT_SECONDS", 0.05)
    gate = Gate("rename")
    handle = save_and_drop(tmp_path, 1, gate)
    try:
        with pytest.raises(
            errors.LockedError, match="was dropped, and its save or an upload is still in progress"
        ):
            fc.CheckpointManager(tmp_path)
    finally:
        gate.open()
    assert handle.result(60) == 1
    fc.CheckpointManager(tmp_path).close()


def test_one_manager_for_each_save_loses_nothing(tmp_path: Path) -> None:
    def save(step: int) -> fc.Commit:
        manager = fc.CheckpointManager(tmp_path)
        items = {"state": {"weight": torch.full((100_000,), float(step)), "step": step}}
        return manager.save(step, items)  # type: ignore[return-value]

    handles = [save(step) for step in range(15)]
    assert [handle.result(60) for handle in handles] == list(range(15))
    with looked_into(tmp_path) as eye:
        assert eye.all_steps() == list(range(15))
        for step in range(15):
            assert bool((eye.restore(step)["state"]["weight"] == step).all())


class SlowlyReleased:
    """A lock that stays locked for a while in `release`, as where the thread is descheduled."""

    def __init__(self, lock: Lock) -> None:
        self._lock = lock
        self.is_releasing = threading.Event()

    def check(self) -> None:
        self._lock.check()

    def release(self) -> None:
        self.is_releasing.set()
        time.sleep(0.2)
        self._lock.release()

    drop = release


def test_a_lock_counts_as_held_until_it_is_unlocked(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    slow = SlowlyReleased(LocalStorage().lock(path))
    lock = writer_lock.WriterLock(slow, path)
    token = lock.enter()
    lock.abandon()
    thread = threading.Thread(target=lock.leave, args=(token,))
    thread.start()
    assert slow.is_releasing.wait(10)
    writer_lock.take(LocalStorage(), path).release()  # waits
    thread.join()


def test_a_lock_that_is_released_while_the_next_one_is_refused_is_tried_again(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "lock")
    first = writer_lock.take(LocalStorage(), path)

    class Releasing(LocalStorage):
        def lock(self, path: str) -> Lock:
            try:
                return super().lock(path)
            except errors.LockedError:
                first.abandon()
                raise

    writer_lock.take(Releasing(), path).release()


def test_a_dropped_manager_without_a_commit_lets_the_next_one_in(tmp_path: Path) -> None:
    for step in range(3):
        manager = fc.CheckpointManager(tmp_path)
        saved(manager, step)
        del manager
    cycle: list[Any] = [fc.CheckpointManager(tmp_path)]
    cycle.append(cycle)
    del cycle  # only the cycle collector gets at it
    fc.CheckpointManager(tmp_path).close()


def test_unreported_failure_releases_the_lock(tmp_path: Path) -> None:
    gate = Gate("rename")
    handle = save_and_drop(tmp_path, 1, gate)
    shutil.rmtree(tmp_path / ".functional_ckpt")
    gate.open()
    while not handle.done():
        time.sleep(0.01)
    fc.CheckpointManager(tmp_path).close()
    assert isinstance(handle.exception(), errors.SaveError)


def test_a_live_manager_of_the_same_process_is_named_in_the_error(tmp_path: Path) -> None:
    with (
        fc.CheckpointManager(tmp_path),
        pytest.raises(errors.LockedError, match=r"close\(\) its other CheckpointManager"),
    ):
        fc.CheckpointManager(tmp_path)


def test_closed_managers_leave_no_descriptors(tmp_path: Path) -> None:
    for step in range(3):
        with fc.CheckpointManager(tmp_path) as manager:
            saved(manager, step)
    assert open_below(tmp_path) == []


def test_a_closed_manager_gives_its_staging_memory_back(tmp_path: Path) -> None:
    manager = fc.CheckpointManager(tmp_path)
    saved(manager, 1)
    room = manager._saver._stager._memory  # pyright: ignore[reportPrivateUsage]
    assert room._ordinary.size_bytes > 0  # pyright: ignore[reportPrivateUsage]
    manager.close()
    assert room._ordinary.size_bytes == 0  # pyright: ignore[reportPrivateUsage]
    assert room._ordinary._arena is None  # pyright: ignore[reportPrivateUsage]


# ------------------------------------------------------------------------------ moved directories


def rename_root(root: Path) -> None:
    root.rename(root.with_name("moved"))


def remove_root(root: Path) -> None:
    shutil.rmtree(root)


def remake_root(root: Path) -> None:
    rename_root(root)
    with fc.CheckpointManager(root) as other:
        for step in (1, 2, 3):
            saved(other, step, metrics={"of": "other"})


def remove_hidden(root: Path) -> None:
    shutil.rmtree(root / ".functional_ckpt")


def remake_hidden(root: Path) -> None:
    remove_hidden(root)
    fc.CheckpointManager(root).close()


WAYS = [rename_root, remove_root, remake_root, remove_hidden, remake_hidden]


def tree(root: Path) -> list[str]:
    return sorted(str(each.relative_to(root.parent)) for each in root.parent.rglob("*"))


@pytest.mark.parametrize("lose", WAYS)
def test_a_writer_whose_directory_is_gone_changes_nothing(
    lose: Callable[[Path], None], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    manager = fc.CheckpointManager(root, keep_policy=fc.policies.LatestN(2), overwrite=True)
    for step in (1, 2):
        saved(manager, step)
    lose(root)
    before = tree(root)
    calls: list[Callable[[], object]] = [
        lambda: manager.save(3, state(3)),
        lambda: manager.save(2, state(20)),
        lambda: manager.delete(1),
        lambda: manager.record_metrics(1, {"late": 1}),
    ]
    for call in calls:
        with pytest.raises((errors.LockedError, errors.StepNotFoundError)) as caught:
            call()
        assert "run" in str(caught.value)
    assert tree(root) == before, "nothing was written, removed or created"
    manager.close()
    assert tree(root) == before


@pytest.mark.matrix(2)
@pytest.mark.parametrize("kind", ["make_directory", "write", "sync", "rename"])
@pytest.mark.parametrize("lose", [rename_root, remake_root, remake_hidden])
def test_a_directory_that_is_lost_during_a_commit(
    lose: Callable[[Path], None], kind: str, tmp_path: Path
) -> None:
    root, gate = tmp_path / "run", Gate(kind)
    manager = fc.CheckpointManager(root, storage=gate)
    saved(manager, 1)
    gate.shut()
    handle = manager.save(2, state(2))
    assert handle is not None
    time.sleep(0.05)
    lose(root)
    before = tree(root)
    gate.open()
    error = handle.exception(60)
    if kind == "rename":  # the last moment: the directory was looked at just before
        assert error is None or isinstance(error, errors.SaveError)
    else:
        assert isinstance(error, errors.SaveError), error
    with pytest.raises(errors.LockedError, match="no longer the directory that was locked"):
        manager.save(3, state(3))
    manager.close()
    if lose is remake_root:
        with looked_into(root) as eye:
            assert eye.all_steps() == [1, 2, 3]
            assert [eye.metadata(step).metrics for step in (1, 2, 3)] == [{"of": "other"}] * 3
    elif lose is rename_root:
        assert not root.exists(), sorted(set(tree(root)) - set(before))


def test_a_link_that_points_elsewhere_is_another_directory(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "a")
    with fc.CheckpointManager(link) as manager:
        saved(manager, 1)
        link.unlink()
        link.symlink_to(tmp_path / "b")
        with pytest.raises(errors.LockedError, match="no longer the directory"):
            manager.save(2, state(2))
    assert list((tmp_path / "b").iterdir()) == []


# ------------------------------------------------------------------------------ launchers


def test_a_launch_without_a_process_group_is_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level(logging.WARNING, "functional_ckpt"), fc.CheckpointManager(tmp_path):
        assert "init_process_group" in caplog.text
        with pytest.raises(errors.LockedError, match=r"WORLD_SIZE.*init_process_group"):
            fc.CheckpointManager(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with (
        fc.CheckpointManager(tmp_path),
        pytest.raises(errors.LockedError, match=r"^((?!WORLD_SIZE).)*$"),
    ):
        fc.CheckpointManager(tmp_path)


def test_a_thread_that_drops_the_last_reference_releases_the_lock(tmp_path: Path) -> None:
    box = [fc.CheckpointManager(tmp_path)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    fc.CheckpointManager(tmp_path).close()
