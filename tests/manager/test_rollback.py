"""Rollback: steps saved after it are kept, and the next run resumes from them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from managing import Gate, looked_into, saved, state

import functional_ckpt as fc
from functional_ckpt import cli, errors, testing
from functional_ckpt.policies import BestN, EveryNSteps, LatestN

LATER = [20, 30, 40, 50]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 10 to 50."""
    root = tmp_path / "run"
    with fc.CheckpointManager(root) as manager:
        for step in (10, *LATER):
            saved(manager, step)
    return root


def resumed(root: Path, **options: Any) -> int | None:
    with fc.CheckpointManager(root, **options) as manager:
        return manager.restore_or(state(0)).step


# ------------------------------------------------------------------------------ a new line


@pytest.mark.parametrize("staging", [fc.Eager(), fc.Blocking()], ids=str)
@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (LatestN(1), [13, 50]),
        (LatestN(2), [12, 13, 40, 50]),
        ([LatestN(1), EveryNSteps(20)], [13, 20, 40, 50]),
        (BestN(1, "no such metric"), [13, 50]),
        (None, [10, 11, 12, 13, *LATER]),
    ],
)
def test_steps_saved_after_a_rollback_are_kept(
    run: Path, keep: Any, left: list[int], staging: Any
) -> None:
    with fc.CheckpointManager(run, keep_policy=keep, staging=staging) as manager:
        manager.restore(10)
        for step in (11, 12, 13):
            saved(manager, step)
            manager.wait_until_finished()
            assert step in manager.all_steps() and manager.latest_step() == step
        assert manager.all_steps() == left
        assert manager.restore().step == 13
    assert looked_into(run).all_steps() == left
    assert resumed(run) == 13


def test_abandoned_steps_are_marked_and_stay_until_they_are_deleted(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fc.CheckpointManager(run, latest_link="latest") as manager:
        manager.restore(20)
        saved(manager, 21)
        assert os.readlink(run / "latest") == "21"
        found = {step: manager.metadata(step) for step in manager.all_steps()}
        assert [step for step, each in found.items() if each.is_abandoned] == [30, 40, 50]
        assert {step: each.generation for step, each in found.items() if each.generation} == {21: 1}
    with looked_into(run) as reader:
        assert reader.latest_step() == 21 and reader.metadata(40).is_abandoned
        assert reader.metadata().step == 21
        assert reader.restore(40)["state"]["step"] == 40, "they can be read"
    assert cli.main(["ls", "--json", str(run)]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["latest"] == 21
    assert [each["step"] for each in listed["steps"] if each.get("abandoned")] == [30, 40, 50]
    assert cli.main(["ls", str(run)]) == 0
    assert capsys.readouterr().out.count("   abandoned   ") == 3
    assert cli.main(["show", "--json", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 21
    with fc.CheckpointManager(run) as manager:
        for step in (30, 40, 50):
            manager.delete(step)
        assert manager.all_steps() == [10, 20, 21]
        assert not manager.metadata(20).is_abandoned


def test_a_restore_changes_nothing_before_the_next_save(run: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("[0-9]*")}
    manager = fc.CheckpointManager(run)
    manager.restore(10)
    assert manager.latest_step() == 50
    del manager  # as a process that dies
    assert before == {path.name: path.stat().st_mtime_ns for path in run.glob("[0-9]*")}
    assert resumed(run) == 50
    with looked_into(run) as reader:
        reader.restore(10)
        assert reader.latest_step() == 50


def test_failed_save_after_a_restore_starts_no_line(run: Path) -> None:
    storage = testing.FaultyStorage()
    with fc.CheckpointManager(run, storage=storage) as manager:
        manager.restore(10)
        storage.inject(testing.Fault(at=0, kinds=("write",), mode="lasting"))
        handle = manager.save(11, state(11))
        assert handle is not None and handle.exception(60) is not None
        storage.heal()
        assert manager.latest_step() == 50
        saved(manager, 12)
        assert manager.latest_step() == 12


def test_a_line_of_lines(run: Path) -> None:
    with fc.CheckpointManager(run) as manager:
        manager.restore(20)
        saved(manager, 25)
        saved(manager, 26)
        manager.restore(25)
        saved(manager, 60)
        abandoned = [s for s in manager.all_steps() if manager.metadata(s).is_abandoned]
        assert (manager.latest_step(), abandoned) == (60, [26, 30, 40, 50])
    with fc.CheckpointManager(run) as manager:
        manager.restore(40)  # back to the first line
        saved(manager, 41)
        abandoned = [s for s in manager.all_steps() if manager.metadata(s).is_abandoned]
        assert (manager.latest_step(), abandoned) == (41, [25, 26, 50, 60])
        manager.delete(41)
        assert manager.latest_step() == 60, "the previous newest"


def test_a_resumed_run_stays_on_its_line(run: Path) -> None:
    for step in (51, 52, 53):
        with fc.CheckpointManager(run, keep_policy=LatestN(2)) as manager:
            manager.restore_or(state(0))
            saved(manager, step)
            assert manager.metadata(step).generation == 0
    assert looked_into(run).all_steps() == [52, 53]


def test_an_abandoned_step_is_overwritten_where_that_is_allowed(run: Path) -> None:
    with fc.CheckpointManager(run) as manager:
        manager.restore(10)
        with pytest.raises(errors.StepExistsError, match="Step 20 exists"):
            manager.save(20, state(21))
    with fc.CheckpointManager(run, overwrite=True, keep_policy=LatestN(2)) as manager:
        manager.restore(10)
        for step in (20, 30):
            handle = manager.save(step, state(1000 + step))
            assert handle is not None and handle.result(60) == step
        assert manager.all_steps() == [20, 30, 40, 50] and manager.latest_step() == 30
        assert manager.restore()["state"]["step"] == 1030
        assert [manager.metadata(s).is_abandoned for s in (20, 30, 40, 50)] == [0, 0, 1, 1]


def test_save_policies_see_the_steps_of_the_line(run: Path) -> None:
    seen: list[list[int]] = []

    class Watching:
        def should_save(self, step: Any, previous_steps: Sequence[Any], *, context: Any) -> bool:
            seen.append([each.step for each in previous_steps])
            return True

    with fc.CheckpointManager(run, save_policy=Watching()) as manager:
        manager.restore(20)
        saved(manager, 21)
        saved(manager, 35)
    with fc.CheckpointManager(run, save_policy=Watching()) as manager:
        manager.restore_or(state(0))
        saved(manager, 36)
    assert seen == [[10, 20], [10, 20, 21], [10, 20, 21, 35]]


def test_a_follower_sees_the_steps_of_a_new_line(run: Path) -> None:
    with fc.CheckpointManager(run) as manager, looked_into(run) as reader:
        assert reader.wait_for_new_step() == 50
        assert reader.wait_for_new_step(50, timeout=0) is None
        manager.restore(10)
        assert reader.wait_for_new_step(50, timeout=0) is None
        saved(manager, 11)
        assert reader.wait_for_new_step(50, timeout=0) == 11
        assert reader.wait_for_new_step(11, timeout=0) is None
        saved(manager, 12)
        for step in (11, 50):
            manager.delete(step)
        assert reader.wait_for_new_step(11, timeout=0) == 12


def test_a_run_that_goes_back_is_warned(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "functional_ckpt"):
        looked_into(run).restore(10)
        with fc.CheckpointManager(run) as manager:
            manager.restore(50)
            assert not caplog.records
            manager.restore(10)
        assert "4 later steps (up to 50)" in caplog.text and "discard_later=True" in caplog.text
        caplog.clear()
        with fc.CheckpointManager(run, keep_policy=LatestN(2)) as manager:
            saved(manager, 1)  # nothing was restored
            saved(manager, 2)
            assert manager.all_steps() == [2, 40, 50] and manager.latest_step() == 50
        assert caplog.text.count("is below the latest, 50") == 1


# ------------------------------------------------------------------------------ discarding


@pytest.mark.parametrize("staging", [fc.Eager(), fc.Blocking()], ids=str)
def test_the_later_steps_are_discarded(run: Path, staging: Any) -> None:
    with fc.CheckpointManager(run, latest_link="last", staging=staging) as manager:
        manager.record_metrics(40, {"late": 1})
        manager.save(60, state(60))  # under way, and later
        assert manager.restore(20, discard_later=True)["state"]["step"] == 20
        assert manager.all_steps() == [10, 20] and manager.latest_step() == 20
        assert os.readlink(run / "last") == "20"
        saved(manager, 30)
        assert manager.metadata(30).generation == 0
        assert manager.metadata(30).metrics is None
    hidden = run / ".functional_ckpt"
    assert not (hidden / "removing.json").exists() and not list((hidden / "trash").iterdir())
    assert looked_into(run).all_steps() == [10, 20, 30]


def test_newest_step_may_have_a_lower_number(run: Path) -> None:
    with fc.CheckpointManager(run) as manager:
        manager.restore(20)
        saved(manager, 21)
        manager.restore(30, discard_later=True)  # it was abandoned
        assert manager.all_steps() == [10, 20, 30] and manager.latest_step() == 30
        assert not manager.metadata(30).is_abandoned


def test_nothing_is_discarded_where_the_restore_fails(run: Path) -> None:
    with fc.CheckpointManager(run) as manager:
        with pytest.raises(errors.MismatchError):
            manager.restore(10, {"state": {"weight": 1}}, discard_later=True)
        with pytest.raises(errors.StepNotFoundError):
            manager.restore(11, discard_later=True)
        assert manager.all_steps() == [10, *LATER]
    with looked_into(run) as reader:
        with pytest.raises(errors.ReadOnlyError):
            reader.restore(10, discard_later=True)
        assert reader.all_steps() == [10, *LATER]


def test_a_discard_that_is_cut_anywhere_is_done_or_not_done(run: Path, tmp_path: Path) -> None:
    outcomes: list[list[int]] = []
    for at in range(100):
        root = tmp_path / f"{at}"
        shutil.copytree(run, root)
        storage = testing.FaultyStorage()
        manager = fc.CheckpointManager(root, storage=storage)
        storage.inject(testing.Fault(at=at, mode="crash", kinds=testing.CHANGES))
        try:
            manager.restore(20, discard_later=True)
        except BaseException:
            assert storage.has_failed
        is_cut = storage.has_failed
        del manager
        with looked_into(root) as reader:
            steps = reader.all_steps()
            assert steps in ([10, 20], [10, *LATER]), at
            assert reader.latest_step() == steps[-1]
        with fc.CheckpointManager(root) as manager:
            assert manager.all_steps() == steps
            assert sorted(p.name for p in root.glob("[0-9]*")) == sorted(map(str, steps))
        outcomes.append(steps)
        shutil.rmtree(root)
        if not is_cut:
            break
    assert outcomes[0] == [10, *LATER] and outcomes[-1] == [10, 20]
    assert outcomes == sorted(outcomes, key=len, reverse=True), "once done it is done"


class Stuck(testing.FaultyStorage):
    """Some directories cannot be renamed."""

    def __init__(self, *names: str, code: int) -> None:
        super().__init__()
        self.names, self.code = names, code

    def rename(self, source: str, target: str) -> None:
        if os.path.basename(source) in self.names:
            raise errors.StorageError(f"Cannot rename {source}: no.", errno=self.code, path=source)
        super().rename(source, target)


def test_steps_that_cannot_be_discarded_are_hidden(run: Path) -> None:
    with fc.CheckpointManager(run, storage=Stuck("30", code=16)) as manager:
        with pytest.raises(errors.StorageError, match=r"out of sight.*Cannot rename .*30"):
            manager.restore(20, discard_later=True)
        assert manager.all_steps() == [10, 20]
        saved(manager, 21)
        assert manager.latest_step() == 21
    assert (run / "30").exists() and looked_into(run).all_steps() == [10, 20, 21]
    with fc.CheckpointManager(run) as manager:
        assert manager.all_steps() == [10, 20, 21]
    assert not (run / "30").exists()


# ------------------------------------------------------------------------------ what does not count


def empty(root: Path) -> None:
    (root / "999999").mkdir()


def cut_copy(root: Path) -> None:
    shutil.copytree(root / "50", root / "999999")
    for name in ("_FUNCTIONAL_CKPT", "_CHECKPOINT_METADATA"):
        (root / "999999" / name).unlink()


def linked(root: Path) -> None:
    shutil.move(root / "50", root.parent / "elsewhere")
    (root / "999999").symlink_to(root.parent / "elsewhere")


def dangling(root: Path) -> None:
    (root / "999999").symlink_to("nowhere")


def a_file(root: Path) -> None:
    (root / "999999").write_text("")


@pytest.mark.parametrize("make", [empty, cut_copy, linked, dangling, a_file])
def test_directory_without_a_record_is_ignored_and_logged_once(
    run: Path, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    make(run)
    steps = sorted(int(path.name) for path in run.glob("[0-9][0-9]"))
    with caplog.at_level(logging.WARNING, "functional_ckpt"):
        with fc.CheckpointManager(run, keep_policy=LatestN(2), overwrite=True) as manager:
            assert manager.all_steps() == steps
            assert manager.restore_or(state(0)).step == steps[-1]
            for step in (60, 70, 80):
                saved(manager, step)
            manager.reload()
            assert manager.all_steps() == [70, 80] and os.path.lexists(run / "999999")
            if make in (empty, cut_copy, a_file):
                with pytest.raises(errors.StorageError, match=r"999999 is a .*Move it away"):
                    manager.save(999999, state(1))
        assert caplog.text.count("ignoring entries that are not steps: 999999") == 1
    assert looked_into(run).all_steps() == [70, 80]


def test_a_link_to_a_step_can_be_restored_but_is_not_counted(run: Path) -> None:
    for step in (10, *LATER):
        shutil.move(run / f"{step}", run.parent / f"archive-{step}")
        (run / f"{step}").symlink_to(run.parent / f"archive-{step}")
    with fc.CheckpointManager(run, keep_policy=LatestN(1)) as manager:
        assert manager.all_steps() == [] and manager.latest_step() is None
        assert manager.restore(20)["state"]["step"] == 20
        with pytest.raises(errors.StepNotFoundError, match="only links to steps"):
            manager.restore_or(state(0))
        saved(manager, 60)
        saved(manager, 61)
        assert manager.all_steps() == [61]
        assert len(list(run.glob("[0-9]*"))) == 6


# ------------------------------------------------------------------------------ cannot be removed


@pytest.mark.parametrize("staging", [fc.Eager(), fc.Blocking()], ids=str)
def test_a_step_that_cannot_be_removed_stops_nothing_else(run: Path, staging: Any) -> None:
    manager = fc.CheckpointManager(
        run, keep_policy=LatestN(2), storage=Stuck("20", code=16), staging=staging
    )
    handles = [manager.save(step, state(step)) for step in (60, 70)]
    assert [handle and handle.result(60) for handle in handles] == [60, 70]
    assert manager.all_steps() == [20, 60, 70]
    with pytest.raises(errors.SaveError, match=r"Step 70 was committed, but .*20") as caught:
        manager.check_for_errors()
    assert caught.value.step == 70
    manager.check_for_errors()
    saved(manager, 80)
    with pytest.raises(errors.SaveError, match="Step 80 was committed"):
        manager.close()
    assert resumed(run, keep_policy=LatestN(2)) == 80


def test_a_step_of_the_lower_layer_of_an_overlay_is_removed_in_place(run: Path) -> None:
    storage = Stuck("10", "20", "30", code=18)
    with fc.CheckpointManager(run, keep_policy=LatestN(3), storage=storage) as manager:
        saved(manager, 60)
        assert manager.all_steps() == [40, 50, 60]
        assert not (run / "20").exists()
    for at in range(100):
        root = run.parent / f"cut-{at}"
        shutil.copytree(run, root)
        storage = Stuck("40", code=18)
        manager = fc.CheckpointManager(root, storage=storage)
        storage.inject(testing.Fault(at=at, mode="crash", kinds=testing.CHANGES))
        try:
            manager.delete(40)
        except BaseException:
            assert storage.has_failed
        is_cut = storage.has_failed
        del manager
        assert looked_into(root).all_steps() in ([40, 50, 60], [50, 60])
        if 40 in looked_into(root).all_steps():
            assert fc.restore(root / "40")["state"]["step"] == 40
        with fc.CheckpointManager(root) as manager:
            assert (root / "40").exists() is (40 in manager.all_steps())
        if not is_cut:
            break


def test_a_link_that_cannot_be_made_stops_nothing_else(run: Path) -> None:
    with fc.CheckpointManager(run, keep_policy=LatestN(2), latest_link="latest") as manager:
        (run / "latest").unlink()
        (run / "latest").mkdir()
        saved(manager, 60)
        assert manager.all_steps() == [50, 60]
        saved(manager, 70)
        assert manager.all_steps() == [60, 70]
        with pytest.raises(errors.SaveError, match="the path exists and is not a link"):
            manager.wait_until_finished()


# ------------------------------------------------------------------------------ others beside


def test_steps_that_others_removed_count_for_nothing(run: Path) -> None:
    with fc.CheckpointManager(run, keep_policy=LatestN(2)) as manager:
        for step in (40, 50):
            shutil.rmtree(run / f"{step}")
        saved(manager, 60)
        assert manager.all_steps() == [30, 60]


def test_a_directory_that_was_removed_holds_no_steps(run: Path) -> None:
    manager = fc.CheckpointManager(run)
    shutil.rmtree(run)
    assert manager.all_steps() == [] and manager.latest_step() is None
    run.mkdir()
    assert manager.all_steps() == []


def test_a_step_under_way_is_waited_for_by_its_number(run: Path) -> None:
    gate = Gate("rename")
    with fc.CheckpointManager(run, storage=gate) as manager:
        calls: list[Callable[[int], object]] = [
            manager.restore,
            manager.metadata,
            lambda step: manager.record_metrics(step, {"a": 1}),
        ]
        for step, call in enumerate(calls, start=60):
            gate.shut()
            manager.save(step, state(step))
            gate.open_soon()
            call(step)


def test_a_rollback_while_a_later_step_is_under_way_leaves_that_on_its_line(run: Path) -> None:
    gate = Gate("rename")
    with fc.CheckpointManager(run, storage=gate) as manager:
        gate.shut()
        manager.save(60, state(60))
        manager.restore(10)
        gate.open()
        manager.wait_until_finished()
        assert manager.metadata(60).generation == 0
        saved(manager, 11)
        assert manager.latest_step() == 11 and manager.metadata(60).is_abandoned


# ------------------------------------------------------------------------------ once more


def test_the_last_step_is_saved_once_more_where_nothing_has_changed(run: Path) -> None:
    items = {**state(60), "config": fc.Json({"lr": 0.1})}
    with fc.CheckpointManager(run, save_policy=fc.policies.every(10)) as manager:
        manager.save(60, items, metrics={"loss": 1.0})
        before = manager.metadata(60).time
        for metrics in (None, {"loss": 1.0}):
            handle = manager.save(60, items, metrics=metrics, force=True)
            assert handle is not None and handle.result(60) == 60
        assert manager.metadata(60).time == before
        assert manager.metadata(60).metrics == {"loss": 1.0}
        for other, metrics in (
            (state(61), None),
            ({**items, "config": fc.Json({"lr": 0.2})}, None),
            (items, {"loss": 2.0}),
        ):
            with pytest.raises(errors.StepExistsError, match="Step 60 exists") as caught:
                manager.save(60, other, metrics=metrics, force=True)
            assert caught.value.step == 60
        assert manager.restore(60)["state"]["step"] == 60
    with fc.CheckpointManager(run) as manager, pytest.raises(errors.StepExistsError):
        manager.save(60, items, force=True)
    assert sorted(path.name for path in run.iterdir() if "tmp" in path.name) == []
