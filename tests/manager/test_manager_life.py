"""Who may write, what happens while a commit is under way and when it fails, and the end."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import pytest
from managing import Counter, Gate, looked_into, saved, state

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.steps import run_steps

# ------------------------------------------------------------------------------ who may write


def test_a_read_only_manager_sees_new_steps_and_writes_nothing(tmp_path: Path) -> None:
    with looked_into(tmp_path / "none") as early:
        assert early.all_steps() == []
        assert early.latest_step() is None
    assert list(tmp_path.iterdir()) == [], "looking creates nothing"
    with fc.CheckpointManager(tmp_path) as manager, looked_into(tmp_path) as eye:
        assert eye.latest_step() is None
        saved(manager, 1)
        assert eye.all_steps() == [1]
        assert eye.restore()["state"]["step"] == 1
        manager.delete(1)
        assert eye.all_steps() == []
        saved(manager, 2)
        for write in (lambda: eye.save(3, state(3)), lambda: eye.delete(2)):
            with pytest.raises(errors.ReadOnlyError, match="read_only=True") as caught:
                write()
            assert isinstance(caught.value, PermissionError)
        assert manager.all_steps() == [2]


def test_waiting_for_a_new_step(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager, looked_into(tmp_path) as eye:
        assert eye.wait_for_new_step(timeout=0.05, poll=0.02) is None
        saved(manager, 1)
        assert eye.wait_for_new_step(poll=0.02) == 1
        started = time.monotonic()
        assert eye.wait_for_new_step(1, timeout=0.1, poll=100) is None
        assert 0.1 <= time.monotonic() - started < 50, "the time limit cuts the rest between looks"
        with futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(eye.wait_for_new_step, 1, timeout=30, poll=0.02)
            saved(manager, 5)
            assert waiting.result(30) == 5


@pytest.mark.parametrize(("poll", "timeout"), [(7.0, None), (7.0, 20.0), (90.0, 20.0)])
def test_between_two_looks_for_a_new_step_it_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poll: float, timeout: float | None
) -> None:
    now, rests = [0.0], list[float]()

    class Clock:
        monotonic = staticmethod(lambda: now[0])

        @staticmethod
        def sleep(seconds: float) -> None:
            rests.append(seconds)
            now[0] += seconds
            if len(rests) == 3:
                saved(manager, 1)

    with fc.CheckpointManager(tmp_path) as manager, looked_into(tmp_path) as eye:
        monkeypatch.setattr(run_steps, "time", Clock)
        found = eye.wait_for_new_step(timeout=timeout, poll=poll)
    expected = {None: [7.0, 7.0, 7.0], 20.0: [7.0, 7.0, 6.0]}[timeout]
    assert (found, rests) == ((1, expected) if poll < 20 else (None, [20.0]))


def test_the_metadata_of_a_step_under_way_waits_for_its_commit(tmp_path: Path) -> None:
    gate = Gate("rename")
    with fc.CheckpointManager(tmp_path, storage=gate) as manager:
        gate.shut()
        manager.save(1, state(1))
        gate.open_soon()
        assert manager.metadata(1).step == 1


def test_two_writers_of_one_directory(tmp_path: Path) -> None:
    first = fc.CheckpointManager(tmp_path)
    with pytest.raises(errors.LockedError, match=rf"\b{os.getpid()}\b") as caught:
        fc.CheckpointManager(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, BlockingIOError)
    saved(first, 1)
    first.close()
    with fc.CheckpointManager(tmp_path) as second:
        saved(second, 2)
        assert second.all_steps() == [1, 2]


def test_delete_removes_a_step_and_its_metrics(tmp_path: Path) -> None:
    gate = Gate("rename")
    with fc.CheckpointManager(tmp_path, storage=gate) as manager:
        for step in (1, 2):
            saved(manager, step)
        manager.record_metrics(1, {"a": 1})
        manager.delete(1)
        assert manager.all_steps() == [2]
        assert not (tmp_path / "1").exists()
        with pytest.raises(errors.StepNotFoundError, match="no step 1; the latest are: 2"):
            manager.delete(1)
        saved(manager, 1)
        assert manager.metadata(1).metrics is None, "the metrics of the deleted one went with it"
        gate.shut()
        manager.save(3, state(3))
        gate.open_soon()
        manager.delete(3)  # waits for its commit
        assert manager.all_steps() == [1, 2]


def test_continuous_saves_start_when_the_last_one_is_durable(tmp_path: Path) -> None:
    gate = Gate("rename")
    policy = fc.policies.Continuous()
    with fc.CheckpointManager(tmp_path, save_policy=policy, storage=gate) as manager:
        gate.shut()
        first = manager.save(1, state(1))
        assert first and manager.save(2, state(2)) is None
        gate.open()
        assert first.result() == 1 and manager.save(3, state(3))
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 3]


def test_step_names_on_disk(tmp_path: Path) -> None:
    name = fc.step_names.StepName(prefix="step", zero_pad=4)
    with fc.CheckpointManager(tmp_path, step_name=name) as manager:
        for step in (7, 12345):
            saved(manager, step)
        assert manager.restore(7)["state"]["step"] == 7
    assert sorted(each.name for each in tmp_path.glob("[!.]*")) == ["step_0007", "step_12345"]
    assert looked_into(tmp_path).all_steps() == [], "other names are no steps"
    both = fc.step_names.CompositeStepName(
        write=fc.step_names.StepName(), read=(fc.step_names.StepName(), name)
    )
    with fc.CheckpointManager(tmp_path, step_name=both) as manager:
        saved(manager, 8)
        assert manager.all_steps() == [7, 8, 12345]
        assert (tmp_path / "8").is_dir()
    with pytest.raises(errors.UsageError, match="step name"):
        fc.CheckpointManager(tmp_path, step_name="step")  # pyright: ignore[reportArgumentType]


def test_orbax_name_formats_are_taken_as_they_are(tmp_path: Path) -> None:
    orbax_step = pytest.importorskip("orbax.checkpoint").path.step
    theirs = orbax_step.standard_name_format(step_prefix="ckpt", step_format_fixed_length=6)
    with fc.CheckpointManager(tmp_path, step_name=theirs) as manager:
        saved(manager, 42)
        assert (tmp_path / "ckpt_000042").is_dir()
    with fc.CheckpointManager(tmp_path, step_name=theirs) as manager:
        assert manager.all_steps() == [42]
        assert manager.restore()["state"]["step"] == 42


# ------------------------------------------------------------------------------ in the background


def test_the_handle_of_a_commit(tmp_path: Path) -> None:
    gate = Gate("rename")
    with fc.CheckpointManager(tmp_path, storage=gate) as manager:
        gate.shut()
        handle = manager.save(4, state(4))
        assert handle
        assert not handle.done()
        assert manager.is_saving_in_progress()
        assert manager.all_steps() == [], "not reported before it is durable"
        for wait in (handle.result, handle.exception):
            with pytest.raises(TimeoutError):
                wait(timeout=0.02)
        assert repr(handle) == "<Commit of step 4: under way>"
        gate.open()
        assert handle.result(60) == 4
        assert handle.exception() is None
        assert handle.done()
        assert repr(handle) == "<Commit of step 4: committed>"
        assert not manager.is_saving_in_progress()


def test_a_save_while_another_is_committed(tmp_path: Path) -> None:
    gate = Gate("rename")
    with fc.CheckpointManager(tmp_path / "skip", storage=gate, on_busy="skip") as manager:
        gate.shut()
        counter = Counter()
        assert manager.save(1, state(1))
        assert manager.save(2, {"counter": counter}) is None
        assert counter.num_captures == 0
        gate.open()
        manager.wait_until_finished()
        assert manager.save(3, state(3))
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 3]
    policies = [fc.policies.every(1), fc.policies.AtEnd(9)]
    with fc.CheckpointManager(
        tmp_path / "last", storage=gate, on_busy="skip", save_policy=policies
    ) as manager:
        for last, force in ((2, True), (9, False)):
            gate.shut()
            assert manager.save(last - 1, state(1), force=True)
            gate.open_soon()
            assert manager.save(last, state(2), force=force)
            manager.wait_until_finished()  # before the gate is shut again
        assert manager.all_steps() == [1, 2, 8, 9]
    with fc.CheckpointManager(tmp_path / "wait", storage=gate) as manager:
        gate.shut()
        first = manager.save(1, state(1))
        gate.open_soon()
        assert manager.save(2, state(2))
        assert first is not None
        assert first.done()
    assert looked_into(tmp_path / "wait").all_steps() == [1, 2]
    with pytest.raises(errors.UsageError, match="on_busy"):
        fc.CheckpointManager(tmp_path, on_busy="drop")  # pyright: ignore[reportArgumentType]


def failing(tmp_path: Path) -> tuple[fc.CheckpointManager, testing.FaultyStorage, fc.Commit]:
    """A manager with step 1 committed and step 2 failed in the background."""
    storage = testing.FaultyStorage()
    manager = fc.CheckpointManager(tmp_path, storage=storage)
    saved(manager, 1)
    storage.inject(testing.Fault(errno=errno.ENOSPC, kinds=("rename",)))
    handle = manager.save(2, state(2))
    assert handle is not None
    while not handle.done():
        time.sleep(0.005)
    assert storage.has_failed
    storage.heal()
    return manager, storage, handle


CALLS: dict[str, Callable[[fc.CheckpointManager], object]] = {
    "save": lambda manager: manager.save(3, state(3)),
    "check_for_errors": lambda manager: manager.check_for_errors(),
    "wait_until_finished": lambda manager: manager.wait_until_finished(),
    "close": lambda manager: manager.close(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_background_failure_is_raised_once_with_its_step(name: str, tmp_path: Path) -> None:
    manager, _, _ = failing(tmp_path)
    with pytest.raises(errors.SaveError, match=r"step 2 failed.*No space left") as caught:
        CALLS[name](manager)
    assert caught.value.step == 2
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    if name != "close":
        for call in CALLS.values():  # it was reported; later saves work
            call(manager)
    else:
        manager.close()
    left = [1] if name == "close" else [1, 3]
    with fc.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == left
        assert manager.restore(1)["state"]["step"] == 1
        saved(manager, 2)


def test_failure_reported_by_its_handle_is_not_reported_again(tmp_path: Path) -> None:
    manager, _, handle = failing(tmp_path)
    error = handle.exception()
    assert isinstance(error, errors.SaveError)
    assert error.step == 2
    assert repr(handle) == "<Commit of step 2: failed>"
    with pytest.raises(errors.SaveError):
        handle.result()
    manager.check_for_errors()
    saved(manager, 2)
    manager.close()


def test_a_failure_while_waiting_is_raised_by_a_save_that_waits_or_is_refused(
    tmp_path: Path,
) -> None:
    storage = testing.FaultyStorage()
    policy = fc.policies.SpecificSteps([1])
    with fc.CheckpointManager(tmp_path, storage=storage, save_policy=policy) as manager:
        storage.inject(testing.Fault(kinds=("rename",)))
        handle = manager.save(1, state(1))
        assert handle is not None
        while not handle.done():
            time.sleep(0.005)
        with pytest.raises(errors.SaveError, match="step 1"):
            manager.save(2, state(2))
        assert manager.save(2, state(2)) is None


def test_a_synchronous_save_raises_at_once(tmp_path: Path) -> None:
    storage = testing.FaultyStorage()
    with fc.CheckpointManager(tmp_path, storage=storage, staging=fc.Blocking()) as manager:
        handle = manager.save(1, state(1))
        assert handle is not None
        assert handle.done()
        storage.inject(testing.Fault(kinds=("rename",)))
        with pytest.raises(errors.SaveError, match="step 2"):
            manager.save(2, state(2))
        manager.check_for_errors()
        assert manager.all_steps() == [1]


def test_leaving_by_an_exception_finishes_the_commit_and_notes_its_failure(tmp_path: Path) -> None:
    gate = Gate("rename")
    with (
        pytest.raises(ZeroDivisionError),
        fc.CheckpointManager(tmp_path / "a", storage=gate) as manager,
    ):
        gate.shut()
        manager.save(1, state(1))
        gate.open_soon()
        _ = 1 // 0
    assert looked_into(tmp_path / "a").all_steps() == [1]
    with pytest.raises(ZeroDivisionError) as caught, failing(tmp_path / "b")[0]:
        _ = 1 // 0
    assert any("step 2 failed" in note for note in caught.value.__notes__)
    with pytest.raises(errors.SaveError, match="step 2"), failing(tmp_path / "c")[0]:
        pass


def test_closed_manager_refuses_every_call(tmp_path: Path) -> None:
    manager = fc.CheckpointManager(tmp_path)
    saved(manager, 1)
    manager.close()
    manager.close()
    calls: list[Callable[[], object]] = [
        lambda: manager.save(2, state(2)),
        lambda: manager.should_save(2),
        lambda: manager.delete(1),
        lambda: manager.record_metrics(1, {"a": 1}),
        *(manager.restore, manager.metadata, manager.all_steps),
        *(manager.latest_step, manager.reload, manager.check_for_errors),
        *(manager.wait_until_finished, manager.wait_for_new_step, manager.__enter__),
        lambda: manager.best_step("a"),
        lambda: manager.reached_preemption(1),
    ]
    for call in calls:
        with pytest.raises(errors.ClosedError, match="was closed"):
            call()
    assert looked_into(tmp_path).all_steps() == [1]


def test_a_rank_takes_over_the_list_of_the_primary(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        saved(manager, 1)
        saved(manager, 2)
        manager._run.steps.follow({"": [2]})
        assert manager.all_steps() == [2]


def test_a_step_that_is_being_committed_is_restored_once_it_is_there(tmp_path: Path) -> None:
    def pause(event: fc.Event) -> None:
        if event.kind == "written":
            time.sleep(0.3)

    with fc.CheckpointManager(tmp_path, on_event=pause) as manager:
        manager.save(1, {"state": {"x": 1}})
        assert manager.restore(1)["state"] == {"x": 1}
        manager.save(2, {"state": {"x": 2}})
        assert manager.metadata(2).step == 2
