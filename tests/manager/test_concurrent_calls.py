"""Calls of one manager from several threads, from signal handlers, from listeners, and Ctrl-C."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from managing import Gate, looked_into, saved, state

import functional_ckpt as fc
import scripts
from functional_ckpt import errors
from functional_ckpt.runtime import threads

SIZE = 100_000


def items(step: int) -> dict[str, Any]:
    return {"state": {"weight": torch.full((SIZE,), float(step)), "step": step}}


def check(root: Path, steps: list[int]) -> None:
    with looked_into(root) as eye:
        assert eye.all_steps() == sorted(steps)
        for step in steps:
            found = eye.restore(step)["state"]
            assert found["step"] == step and bool((found["weight"] == step).all())


# ------------------------------------------------------------------------------ threads


@pytest.mark.parametrize(
    "staging",
    [fc.Eager(), fc.Blocking(), fc.Eager(budget_bytes=1000), fc.Overlapped()],
    ids=str,
)
def test_saves_of_several_threads_are_never_mixed(staging: Any, tmp_path: Path) -> None:
    failures: list[BaseException] = []
    with fc.CheckpointManager(tmp_path, staging=staging) as manager:

        def work(number: int) -> None:
            try:
                for i in range(8):
                    handle = manager.save(10 * i + number, items(10 * i + number))
                    if i % 3 == 0:
                        assert handle is not None
                        handle.result(60)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for each in workers:
            each.start()
        for each in workers:
            each.join()
    assert failures == []
    check(tmp_path, [10 * i + number for i in range(8) for number in range(4)])


def test_a_thread_that_waited_for_close_is_refused(tmp_path: Path) -> None:
    gate = Gate("rename")
    manager = fc.CheckpointManager(tmp_path, storage=gate)
    gate.shut()
    manager.save(1, state(1))
    closer = threading.Thread(target=manager.close)
    closer.start()
    while manager._calls._thread is None:  # pyright: ignore[reportPrivateUsage]
        pass
    gate.open_soon()
    with pytest.raises(errors.ClosedError):
        manager.save(2, state(2))
    closer.join()
    check_steps = looked_into(tmp_path).all_steps()
    assert check_steps == [1]


# ------------------------------------------------------------------------------ within a call


class Within:
    """An object that makes a call while its state is taken."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def state_dict(self) -> dict[str, Any]:
        self._call()
        return {"a": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


CALLS: dict[str, Callable[[fc.CheckpointManager], object]] = {
    "save": lambda manager: manager.save(9, state(9)),
    "delete": lambda manager: manager.delete(0),
    "restore": lambda manager: manager.restore(0),
    "record_metrics": lambda manager: manager.record_metrics(0, {"a": 1}),
    "wait_until_finished": lambda manager: manager.wait_until_finished(),
    "close": lambda manager: manager.close(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_within_a_save_on_the_same_thread_is_refused(name: str, tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        saved(manager, 0)
        within = Within(lambda: CALLS[name](manager))
        with pytest.raises(errors.UsageError, match=rf"{name} was called while save .*same thread"):
            manager.save(1, {"object": fc.Stateful(within)})
        saved(manager, 2)
        assert manager.all_steps() == [0, 2]


@pytest.mark.matrix(3)
@pytest.mark.parametrize("kind", ["staged", "written", "committed", "pruned"])
@pytest.mark.parametrize("name", CALLS)
def test_a_listener_that_calls_the_manager_is_refused_and_harms_nothing(
    name: str, kind: str, tmp_path: Path
) -> None:
    seen: list[BaseException | None] = []
    managers: list[fc.CheckpointManager] = []

    def listener(event: fc.Event) -> None:
        if event.kind == kind and event.step == (0 if kind == "pruned" else 1):
            assert managers[0].latest_step() in (0, 1)  # looking is allowed
            try:
                CALLS[name](managers[0])
            except errors.UsageError as error:
                seen.append(error)

    keep = fc.policies.LatestN(1)
    managers.append(fc.CheckpointManager(tmp_path, on_event=listener, keep_policy=keep))
    for step in (0, 1):
        handle = managers[0].save(step, state(step))
        assert handle is not None and handle.result(30) == step
    managers[0].close()
    assert len(seen) == 1 and "Set a flag there" in str(seen[0])
    assert looked_into(tmp_path).all_steps() == [1]


@pytest.mark.matrix(2)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
@pytest.mark.parametrize("at", ["staged", "written", "committed", "pruned"])
def test_whatever_a_listener_raises_the_step_is_committed(
    at: str, kind: type[BaseException], tmp_path: Path
) -> None:
    def listener(event: fc.Event) -> None:
        if event.kind == at:
            raise kind("from the listener")

    keep = fc.policies.LatestN(1)
    manager = fc.CheckpointManager(tmp_path, on_event=listener, keep_policy=keep)
    for step in (0, 1):
        if at == "staged" and kind is not ValueError:
            with pytest.raises(kind, match="from the listener"):
                manager.save(step, state(step))
        else:
            handle = manager.save(step, state(step))
            assert handle is not None and handle.result(30) == step
    manager.close()  # raises nothing
    assert looked_into(tmp_path).all_steps() == [1]


def test_a_signal_handler_that_saves_is_refused_or_saves_its_own_state(tmp_path: Path) -> None:
    extra: list[int] = []
    refused: list[BaseException] = []
    numbers = itertools.count(1000)
    depth = itertools.count()
    over = threading.Event()
    with fc.CheckpointManager(tmp_path) as manager:

        def handler(*_: object) -> None:
            if over.is_set():
                return
            step = next(numbers)  # one of its own: a handler may interrupt a handler
            if next(depth) % 5:  # not without bound where the machine is slow
                signal.setitimer(signal.ITIMER_REAL, 0.013)
            try:
                manager.save(step, items(step))
                extra.append(step)
            except errors.UsageError as error:
                refused.append(error)
            signal.setitimer(signal.ITIMER_REAL, 0.013)

        previous = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        try:
            for step in range(25):
                manager.save(step, items(step))
        finally:
            over.set()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
    assert refused
    check(tmp_path, [*range(25), *extra])


@pytest.mark.timeout(60)
def test_a_handler_that_saves_before_the_interrupted_call_starts_saves_first(
    tmp_path: Path,
) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        turn, due = manager._calls._turn, [1]

        class Signalled:
            """Runs the handler when the turn is taken, before anything else."""

            def __enter__(self) -> None:
                turn.acquire()
                if due:
                    manager.save(due.pop(), items(1))

            def __exit__(self, *_: object) -> None:
                turn.release()

        manager._calls._turn = Signalled()  # pyright: ignore[reportAttributeAccessIssue]
        manager.save(2, items(2))
    check(tmp_path, [1, 2])


# ------------------------------------------------------------------------------ Ctrl-C


class Interrupting(Gate):
    """While shut, sends Ctrl-C once it is reached, and waits."""

    def operation(self, kind: str, path: str) -> None:
        if kind in self._kinds and not self._go.is_set():
            os.kill(os.getpid(), signal.SIGINT)
        super().operation(kind, path)


@pytest.mark.parametrize("staging", [fc.Blocking(), fc.Eager(budget_bytes=0)], ids=str)
def test_a_save_interrupted_while_it_reads_live_memory_is_not_committed(
    staging: Any, tmp_path: Path
) -> None:
    gate = Interrupting("make_directory")
    manager = fc.CheckpointManager(tmp_path, storage=gate, staging=staging)
    live = torch.ones(SIZE)
    gate.shut()
    with pytest.raises(KeyboardInterrupt):
        manager.save(1, {"state": {"weight": live}})
    live.zero_()
    gate.open()
    with pytest.raises(errors.SaveError, match=r"interrupted.*may have changed"):
        manager.wait_until_finished()
    saved(manager, 2)
    manager.close()
    assert looked_into(tmp_path).all_steps() == [2]


def test_an_interruption_before_the_commit_starts_lets_optimizers_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    manager = fc.CheckpointManager(tmp_path, staging=fc.Overlapped())
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        if self.name.startswith("commit-"):
            raise KeyboardInterrupt
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            manager.save(1, {"model": model, "optimizer": fc.Optimizer(optimizer, model)})
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    stepping.join(30)
    assert not stepping.is_alive(), "the next step would wait forever"
    saved(manager, 1)
    manager.close()
    fc.CheckpointManager(tmp_path).close()  # nothing keeps the lock


def test_an_interruption_once_the_commit_has_started_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        start(self)
        if self.name.startswith("commit-"):
            raise KeyboardInterrupt

    manager = fc.CheckpointManager(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            manager.save(1, state(1))
    manager.wait_until_finished()
    assert manager.all_steps() in ([1], [])  # depending on which thread started first
    manager.close()


def test_no_thread_goes_on_copying_after_an_interruption() -> None:
    ended: list[int] = []

    def task() -> None:
        if threading.current_thread() is threading.main_thread():
            time.sleep(30)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        ended.append(threading.get_ident())

    with pytest.raises(KeyboardInterrupt):
        threads.run_in_threads([task, task], 2)
    assert len(ended) == 1, "the other thread has ended its task"


# ------------------------------------------------------------------------------ forks


def test_every_handle_is_refused_in_a_forked_child(tmp_path: Path) -> None:
    result = scripts.run(
        """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, since Python 3.12
manager = fc.CheckpointManager(root, storage=Slow())
commit = manager.save(1, items(1))
Slow.publishing.wait()
calls = {
    "result": lambda: commit.result(20),
    "exception": lambda: commit.exception(20),
    "done": commit.done,
    "is_saving_in_progress": manager.is_saving_in_progress,
    "fence": manager.fence,
    "check_start": lambda: manager.check_start(1),
}
for name, call in calls.items():
    pid = os.fork()
    if pid == 0:
        try:
            call()
        except fc.errors.ForkedError:
            assert "of the parent process" in repr(commit)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, name
assert commit.result(60) == 1
manager.close()
""",
        tmp_path / "run",
    )
    assert (result.returncode, result.stderr) == (0, "")
