"""SIGTERM: the next save is taken and committed, the loop ends by itself."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

import functional_ckpt as fc
import scripts

LOOP = """
chained = []
if {chains}:
    signal.signal(signal.SIGTERM, lambda number, frame: chained.append(number))
before = signal.getsignal(signal.SIGTERM)
with fc.CheckpointManager(
    root, save_policy=[fc.policies.every(1000), fc.policies.Preemption()], on_busy={on_busy!r}
) as manager:
    for step in range(100_000):
        if step == 20:
            print("ready", flush=True)
        time.sleep(0.002)
        manager.save(step, items(step))
        if manager.reached_preemption(step):
            break
    print("stopped", step, flush=True)
assert signal.getsignal(signal.SIGTERM) is before
print("chained", len(chained), flush=True)
"""


@pytest.mark.parametrize(("chains", "on_busy"), [(True, "wait"), (False, "skip")])
def test_the_next_save_is_taken_and_the_loop_ends(
    chains: bool, on_busy: str, tmp_path: Path
) -> None:
    script = LOOP.format(chains=chains, on_busy=on_busy)
    with scripts.ready(script, tmp_path) as child:
        child.send_signal(signal.SIGTERM)
        output, trouble = child.communicate(timeout=60)
    assert child.returncode == 0, trouble
    stopped, chained = output.splitlines()
    last = int(stopped.split()[1])
    assert 20 <= last < 50_000
    assert chained == f"chained {int(chains)}"
    with fc.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == last
        assert manager.restore()["tree"]["n"] == last


def test_without_the_policy_no_handler_is_installed(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with fc.CheckpointManager(tmp_path / "a", save_policy=fc.policies.every(2)) as manager:
        assert signal.getsignal(signal.SIGTERM) is before
        assert not manager.reached_preemption(0)
    policies = [fc.policies.Preemption()]
    with fc.CheckpointManager(tmp_path / "b", save_policy=policies, read_only=True):
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_installed_since_is_left_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        manager = fc.CheckpointManager(tmp_path, save_policy=fc.policies.Preemption())
        assert signal.getsignal(signal.SIGTERM) is not before
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        manager.close()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_handler_is_gone_when_opening_fails(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (
        fc.CheckpointManager(tmp_path),
        pytest.raises(fc.errors.LockedError),
    ):
        fc.CheckpointManager(tmp_path, save_policy=fc.policies.Preemption())
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_cannot_ask_for_it(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def make() -> None:
        try:
            fc.CheckpointManager(tmp_path, save_policy=fc.policies.Preemption())
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert isinstance(caught[0], fc.errors.UsageError) and "main thread" in str(caught[0])
    fc.CheckpointManager(tmp_path).close()  # and the lock was let go


STALE = """
before = signal.getsignal(signal.SIGTERM)
with fc.CheckpointManager(root, save_policy=[fc.policies.Preemption()]) as manager:
    handler = signal.getsignal(signal.SIGTERM)
signal.signal(signal.SIGTERM, handler)  # as a trainer does that saves and restores handlers
print("ready", flush=True)
time.sleep(60)
"""


def test_a_closed_manager_whose_handler_is_put_back_lets_the_signal_end_the_process(
    tmp_path: Path,
) -> None:
    with scripts.ready(STALE, tmp_path) as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=30) == -signal.SIGTERM


def test_a_handler_that_was_there_is_called_too(tmp_path: Path) -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        with fc.CheckpointManager(tmp_path, save_policy=fc.policies.Preemption()) as manager:
            signal.raise_signal(signal.SIGTERM)
            assert called == [signal.SIGTERM]
            assert manager.save(1, {"x": 1}) and manager.reached_preemption(1)
    finally:
        signal.signal(signal.SIGTERM, before)
