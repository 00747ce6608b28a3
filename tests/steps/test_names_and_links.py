"""Names with variables on disk, the link to the latest step, a start that overwrites nothing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
from managing import looked_into, saved, state

import functional_ckpt as fc
from functional_ckpt import errors, testing

NAMES = fc.step_names.StepTemplate(template="ep{epoch}-ba{batch}")


def run(manager: fc.CheckpointManager, first: int, last: int) -> None:
    for batch in range(first, last + 1):
        manager.save(batch, state(batch), progress=fc.Progress(epoch=batch // 3, batch=batch))


def steps_on_disk(root: Path) -> set[str]:
    return {each.name for each in root.iterdir() if not each.name.startswith(".")}


def test_steps_under_their_own_names(tmp_path: Path) -> None:
    keep = fc.policies.LatestN(2)
    with fc.CheckpointManager(tmp_path, step_name=NAMES, keep_policy=keep) as manager:
        run(manager, 1, 4)
        manager.wait_until_finished()
        assert steps_on_disk(tmp_path) == {"ep1-ba3", "ep1-ba4"}
        manager.delete(4)
    assert steps_on_disk(tmp_path) == {"ep1-ba3"}
    with fc.CheckpointManager(tmp_path, step_name=NAMES, overwrite=True) as manager:
        restored = manager.restore()
        assert restored.step == 3
        assert torch.equal(restored["state"]["weight"], torch.full((3,), 3.0))
        # An overwritten step stays where it is: two directories of one step are never there.
        handle = manager.save(3, state(30), progress=fc.Progress(epoch=7, batch=3), force=True)
        assert handle is not None
        handle.result(60)
        assert steps_on_disk(tmp_path) == {"ep1-ba3"}
        assert manager.restore(3)["state"]["step"] == 30
        manager.record_metrics(3, {"a": 1})
        assert manager.metadata(3).metrics == {"a": 1}
        with pytest.raises(errors.UsageError, match=r"needs save\(progress=fc"):
            manager.save(9, state(9))
        with pytest.raises(errors.StepNotFoundError):
            manager.restore(9)


@pytest.mark.parametrize("staging", [fc.Eager(), fc.Blocking()])
def test_a_name_too_long_for_its_temporary_directory_is_refused(
    staging: fc.Eager | fc.Blocking, tmp_path: Path
) -> None:
    """A name that was cut there became another step's, which could not be restored."""
    longest = 10**220
    with fc.CheckpointManager(
        tmp_path / "run", tiers=[tmp_path / "far"], staging=staging
    ) as manager:
        for step in (longest * 10, 10**250):
            with pytest.raises(errors.UsageError, match="Choose a shorter step_name"):
                manager.save(step, state(1))
        manager.save(longest, state(1))
        manager.wait_until_finished()
        assert manager.all_steps() == [longest]
    for folder in ("run", "far"):
        with looked_into(tmp_path / folder) as manager:
            assert manager.restore(longest).step == longest


def test_a_step_that_exists_is_not_overwritten_under_another_name(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path, step_name=NAMES) as manager:
        run(manager, 3, 3)
        manager.wait_until_finished()
        with pytest.raises(errors.StepExistsError):
            manager.save(3, state(3), progress=fc.Progress(epoch=9, batch=3), force=True)


# ------------------------------------------------------------------------------------ the link


def test_the_link_is_the_latest_step(tmp_path: Path) -> None:
    link = tmp_path / "latest"
    keep = fc.policies.LatestN(2)
    with fc.CheckpointManager(tmp_path, latest_link="latest", keep_policy=keep) as manager:
        assert not os.path.lexists(link)
        for step in (5, 7, 6):
            saved(manager, step)
            assert os.readlink(link) == str(manager.latest_step())
        assert fc.restore(link)["state"]["step"] == 7
        manager.delete(7)
        assert os.readlink(link) == "6"
        manager.delete(6)
        assert not os.path.lexists(link)
        saved(manager, 9)
    link.unlink()
    link.symlink_to("5")  # as after a crash between a commit and the link
    with fc.CheckpointManager(tmp_path, latest_link="latest"):
        assert os.readlink(link) == "9"
    assert looked_into(tmp_path).all_steps() == [9]


def test_the_link_is_there_at_every_instant(tmp_path: Path) -> None:
    """Killed before any operation of the next save, it names a complete step."""
    with fc.CheckpointManager(tmp_path, latest_link="latest") as manager:
        saved(manager, 1)
    for k in range(20):
        storage = testing.FaultyStorage()
        manager = fc.CheckpointManager(
            tmp_path, latest_link="latest", storage=storage, overwrite=True
        )
        storage.inject(testing.Fault(at=k, mode="crash", kinds=("link", "rename", "swap")))
        with contextlib.suppress(errors.CheckpointError, testing.Crash):
            manager.save(2, state(2))
            manager.wait_until_finished()
        is_over = not storage.has_failed
        assert fc.restore(tmp_path / "latest")["state"]["step"] in (1, 2)
        storage.heal()
        with contextlib.suppress(errors.CheckpointError):
            manager.close()
        if is_over:
            break
    assert fc.restore(tmp_path / "latest")["state"]["step"] == 2


def test_latest_link_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(errors.StorageError, match="the path exists and is not a link"):
        fc.CheckpointManager(tmp_path, latest_link="latest")
    assert (tmp_path / "latest").is_dir()
    with fc.CheckpointManager(tmp_path, latest_link="newest") as manager:
        saved(manager, 1)


@pytest.mark.parametrize("name", ["", "7", "a/b", ".latest", "_latest"])
def test_a_link_has_no_steps_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.UsageError, match="latest_link must be a file name that no step"):
        fc.CheckpointManager(tmp_path, latest_link=name)


# ------------------------------------------------------------------------------------ the start


def test_a_start_that_would_overwrite_is_refused_before_it(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        manager.check_start(0)
        saved(manager, 5)
        saved(manager, 8)
    with fc.CheckpointManager(tmp_path) as manager:
        manager.check_start(9)
        with pytest.raises(errors.StepExistsError, match=r"has 1 steps from 6 on \(up to 8\)"):
            manager.check_start(6)
        with pytest.raises(errors.StepExistsError, match="has 2 steps from 0 on") as caught:
            manager.check_start(0)
        assert caught.value.step == 5
    with fc.CheckpointManager(tmp_path, overwrite=True) as manager:
        manager.check_start(0)


# ------------------------------------------------------------------------------------ metrics


def test_metrics_of_an_overwritten_commit_never_apply_to_the_new_one(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        saved(manager, 1)
        manager.record_metrics(1, {"accuracy": 0.9})
    folder = tmp_path / ".functional_ckpt" / "metrics"
    (old,) = folder.iterdir()
    content = old.read_text()
    with fc.CheckpointManager(tmp_path, overwrite=True) as manager:
        handle = manager.save(1, state(2))
        assert handle is not None
        handle.result(60)
        assert list(folder.iterdir()) == []
    old.write_text(content)  # as if the writer had died before it removed the file
    with fc.CheckpointManager(tmp_path) as manager:
        assert manager.metadata(1).metrics is None
        assert manager.best_step("accuracy") is None
        manager.record_metrics(1, {"loss": 1.0})
        assert manager.metadata(1).metrics == {"loss": 1.0}
        manager.delete(1)
    assert list(folder.iterdir()) == []


def test_a_link_that_a_crash_left_behind_is_renewed_by_the_next_writer_alone(
    tmp_path: Path,
) -> None:
    with fc.CheckpointManager(tmp_path, latest_link="latest") as manager:
        for step in (1, 2):
            saved(manager, step)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("1")
    fc.CheckpointManager(tmp_path, latest_link="latest", read_only=True).close()
    assert os.readlink(tmp_path / "latest") == "1"
    fc.CheckpointManager(tmp_path, latest_link="latest").close()
    assert os.readlink(tmp_path / "latest") == "2"
