"""Forks, and every way out of the interpreter: commits are finished, errors are reported."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

import functional_ckpt as fc
import scripts
from functional_ckpt.saving import background

# ------------------------------------------------------------------------------------ forks

FORK = """
def fork(action):
    '''The action's error in a forked child: its class name, or 'nothing'.'''
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
            outcome = "nothing"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        os.write(writing, outcome.encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child was aborted: {status}"
    with os.fdopen(reading) as file:
        return file.read()
"""


def test_forked_child_raises_and_the_parent_continues(tmp_path: Path) -> None:
    result = scripts.run(
        FORK
        + """
manager = fc.CheckpointManager(root, keep_policy=fc.policies.LatestN(2))
manager.save(1, items(1), metrics={"a": 1.0}).result()
calls = {
    "save": lambda: manager.save(2, items(2)),
    "should_save": lambda: manager.should_save(2),
    "restore": lambda: manager.restore(1),
    "metadata": lambda: manager.metadata(1),
    "metrics": lambda: manager.metadata(1).metrics,
    "all_steps": manager.all_steps,
    "latest_step": manager.latest_step,
    "best_step": lambda: manager.best_step("a"),
    "delete": lambda: manager.delete(1),
    "record_metrics": lambda: manager.record_metrics(1, {"b": 2}),
    "reload": manager.reload,
    "wait_for_new_step": lambda: manager.wait_for_new_step(timeout=0),
    "wait_until_finished": manager.wait_until_finished,
    "check_for_errors": manager.check_for_errors,
    "reached_preemption": lambda: manager.reached_preemption(1),
    "enter": manager.__enter__,
    "fc.save": lambda: fc.save(root + "-pure", items(1)),
    "fc.restore": lambda: fc.restore(root + "/1"),
    "new manager": lambda: fc.CheckpointManager(root, read_only=True).restore(1),
    "new writer": lambda: fc.CheckpointManager(root + "-new").save(1, items(1)),
}
for name, call in calls.items():
    outcome = fork(call)
    assert outcome.startswith("ForkedError"), (name, outcome)
    assert "spawn" in outcome, (name, outcome)
assert fork(manager.close) == "nothing"  # a child that cleans up does not take the parent's lock
assert manager.all_steps() == [1]
manager.save(2, items(2)).result()
assert manager.restore(2)["tree"]["n"] == 2
try:
    fc.CheckpointManager(root)
except fc.errors.LockedError as error:
    assert str(os.getpid()) in str(error)
else:
    raise AssertionError("the lock is gone")
manager.close()
print("fine")
""",
        tmp_path / "run",
    )
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr


@pytest.mark.parametrize(
    "staging", ["fc.Eager(budget_bytes=0)", "fc.Eager(budget_bytes=10_000)", "fc.Overlapped()"]
)
def test_a_child_forked_during_a_save_harms_neither_itself_nor_the_step(
    staging: str, tmp_path: Path
) -> None:
    result = scripts.run(
        FORK
        + f"""
model = torch.nn.Linear(300, 300)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
state = {{"model": model, "optimizer": fc.Optimizer(optimizer, model)}}
manager = fc.CheckpointManager(root, staging={staging}, storage=Slow())
before = {{name: value.clone() for name, value in model.state_dict().items()}}
commit = manager.save(1, state)

def train():
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # the fence is the parent's: nothing to wait for
    model.load_state_dict(before)
    with torch.no_grad():
        model.weight.zero_()

assert fork(train) == "nothing"
for call in (lambda: manager.save(2, state), manager.fence, commit.result):
    outcome = fork(call)
    assert outcome.startswith("ForkedError"), outcome
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
assert commit.result() == 1
saved = manager.restore(1)["model"]
assert all(torch.equal(saved[name], before[name]) for name in before)
manager.save(2, state).result()
manager.close()
print("fine")
""",
        tmp_path / "run",
    )
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr


def test_a_child_forked_before_any_use_may_save(tmp_path: Path) -> None:
    result = scripts.run(
        FORK
        + """
def action():
    with fc.CheckpointManager(root) as manager:
        manager.save(1, items(1))
assert fork(action) == "nothing"
assert fc.CheckpointManager(root, read_only=True).restore(1)["tree"]["n"] == 1
""",
        tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr


def test_a_dead_parents_lock_is_not_held_by_its_child(tmp_path: Path) -> None:
    script = """
manager = fc.CheckpointManager(root)
manager.save(1, items(1)).result()
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(100)
    os._exit(0)
time.sleep(100)
"""
    root = tmp_path / "run"
    with subprocess.Popen(
        scripts.command(script, root), stdout=subprocess.PIPE, text=True, env=scripts.environment()
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            with pytest.raises(fc.errors.LockedError, match=str(parent.pid)):
                fc.CheckpointManager(root)
            os.kill(parent.pid, signal.SIGKILL)
            parent.wait()
            os.kill(child, 0)  # it lives
            with fc.CheckpointManager(root) as manager:
                assert manager.all_steps() == [1]
        finally:
            os.kill(child, signal.SIGKILL)


def test_forked_loader_workers_beside_a_commit(tmp_path: Path) -> None:
    result = scripts.run(
        """
class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return torch.tensor(index**2)

with fc.CheckpointManager(root, storage=Slow()) as manager:
    for step in range(2):
        manager.save(step, items(step))
        loader = torch.utils.data.DataLoader(
            Squares(), batch_size=4, num_workers=2, multiprocessing_context="fork"
        )
        assert manager.is_saving_in_progress()
        assert sum(int(batch.sum()) for batch in loader) == sum(i**2 for i in range(40))
    assert manager.restore(0)["tree"]["n"] == 0
    manager.wait_until_finished()
    assert manager.all_steps() == [0, 1]
""",
        tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------ ways out

WAYS_OUT = {
    "falls off the end": ("", 0, ""),
    "sys.exit(3)": ("sys.exit(3)", 3, ""),
    "an exception": ("raise KeyError('in the loop')", 1, "KeyError: 'in the loop'"),
    "an exception inside with": (
        "with manager:\n    raise KeyError('in the loop')",
        1,
        "KeyError: 'in the loop'",
    ),
    "sys.exit inside with": ("with manager:\n    sys.exit(3)", 3, ""),
    "ctrl-c": (
        # A shell starts background jobs with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)",
        -2,
        "KeyboardInterrupt",
    ),
    "an exit handler that saves": (
        "import atexit\natexit.register(lambda: manager.save(2, items(2)))",
        0,
        "",
    ),
}


@pytest.mark.matrix(2)
@pytest.mark.parametrize("way", WAYS_OUT)
def test_every_way_out_finishes_the_commit(way: str, tmp_path: Path) -> None:
    last, code, message = WAYS_OUT[way]
    result = scripts.run(
        f"""
manager = fc.CheckpointManager(root, storage=Slow())
manager.save(1, items(1))
assert manager.is_saving_in_progress()
{last}
""",
        tmp_path / "run",
    )
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    if not message:
        assert result.stderr == ""
    with fc.CheckpointManager(tmp_path / "run") as manager:  # and the lock is free
        assert manager.all_steps() == ([1, 2] if "saves" in way else [1])
        for step in manager.all_steps():
            assert manager.restore(step)["tree"]["n"] == step


def test_a_forked_child_that_leaves_waits_for_nothing(tmp_path: Path) -> None:
    result = scripts.run(
        """
manager = fc.CheckpointManager(root, storage=Slow())
manager.save(1, items(1))
Slow.publishing.wait()  # not inside TensorStore, whose own locks a child could never take
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
manager.close()
""",
        tmp_path / "run",
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_end_of_the_interpreter_waits_for_the_threads_of_commits_themselves() -> None:
    """One that freed a tensor later, while the interpreter ends, aborted the process."""
    ended = threading.Event()

    class Work:
        def __call__(self) -> None:
            time.sleep(0.2)  # the caller of `start` no longer holds it then

        def __del__(self) -> None:
            time.sleep(0.2)
            ended.set()

    background.CommitThread().start(1, Work(), lambda: None).result(30)
    background._report_at_exit()
    assert ended.is_set()


FAIL = """
storage = testing.FaultyStorage()
manager = fc.CheckpointManager(root, storage=storage)
manager.save(1, items(1)).result()
storage.inject(testing.Fault(kinds=("rename",)))
commit = manager.save(2, items(2))
"""


def test_unreported_failure_is_printed_at_exit(tmp_path: Path) -> None:
    result = scripts.run(FAIL, tmp_path / "run")
    assert result.returncode == 0
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("functional_ckpt: Saving step 2 failed in the background")
    assert "Input/output error" in result.stderr


@pytest.mark.parametrize("asked", ["commit.exception()", "manager.wait_until_finished()"])
def test_reported_failure_is_not_printed_at_exit(asked: str, tmp_path: Path) -> None:
    ask = f"""
try:
    {asked}
except fc.errors.SaveError:
    pass
"""
    result = scripts.run(FAIL + ask, tmp_path / "run")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_failure_beside_an_exception_is_a_note_on_it(tmp_path: Path) -> None:
    result = scripts.run(FAIL + "with manager:\n    raise KeyError('loop')\n", tmp_path / "run")
    assert result.returncode == 1
    assert "KeyError: 'loop'\nWhile leaving the manager: Saving step 2 failed" in result.stderr


def test_no_thread_can_start_while_the_interpreter_ends(tmp_path: Path) -> None:
    """As from Python 3.12 on: the work is done on the threads there are."""
    result = scripts.run(
        """
import atexit
def start(self, *, original=threading.Thread.start):
    raise RuntimeError("can't create new thread at interpreter shutdown")
manager = fc.CheckpointManager(root)
def last():
    threading.Thread.start = start
    manager.save(1, {**items(1), "big": {"x": torch.zeros(20_000_000)}})
    manager.close()
atexit.register(last)
""",
        tmp_path / "run",
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert fc.CheckpointManager(tmp_path / "run", read_only=True).all_steps() == [1]
