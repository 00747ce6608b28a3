"""`Preemption(snapshot_every=N)`: a copy in memory is saved on SIGTERM if no save comes."""

from __future__ import annotations

import multiprocessing
import os
import random
import select
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import sigterm_loop
import torch
from full import IS_FULL
from managing import looked_into

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.verify import checkpoint


def _policies(every: int = 1, grace: float = 0.0) -> list[fc.policies.SavePolicy | int]:
    return [1000, fc.policies.Preemption(snapshot_every=every, grace_seconds=grace)]


def _items(weights: torch.Tensor) -> dict[str, object]:
    return {"model": {"w": weights}}


def _arrived(root: Path) -> int | None:
    with looked_into(root) as eye:
        return eye.wait_for_new_step(timeout=60, poll=0.02)


@pytest.mark.parametrize("staging", [fc.Eager(), fc.Overlapped(), fc.Blocking()], ids=str)
def test_the_last_copy_is_saved_once_the_grace_period_is_over(
    staging: fc.Eager | fc.Overlapped | fc.Blocking, tmp_path: Path
) -> None:
    weights = torch.zeros(1000)
    with fc.CheckpointManager(tmp_path, save_policy=_policies(2), staging=staging) as manager:
        for step in range(1, 8):
            weights.fill_(step)
            assert manager.save(step, _items(weights), metrics={"n": step}) is None
        assert manager.all_steps() == []
        signal.raise_signal(signal.SIGTERM)
        assert _arrived(tmp_path) == 6
        weights.fill_(8)
        assert manager.save(8, _items(weights)) and manager.reached_preemption(8)
        manager.wait_until_finished()
        assert manager.all_steps() == [6, 8] and manager.metadata(6).metrics == {"n": 6}
    for step in (6, 8):
        assert fc.restore(tmp_path / str(step))["model"]["w"].tolist() == [step] * 1000


def test_a_save_within_the_grace_period_makes_the_copy_superfluous(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path, save_policy=_policies(grace=60.0)) as manager:
        manager.save(1, _items(torch.ones(3)))
        signal.raise_signal(signal.SIGTERM)
        assert manager.save(2, _items(torch.ones(3)))
        manager.wait_until_finished()
        assert manager._saver._snapshots._attempt()  # as the thread does after the period
        assert manager.all_steps() == [2]


def test_a_process_that_ends_after_a_signal_saves_its_copy(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path, save_policy=_policies(grace=60.0)) as manager:
        manager.save(1, _items(torch.ones(3)))
        signal.raise_signal(signal.SIGTERM)
    assert fc.restore(tmp_path / "1")["model"]["w"].tolist() == [1] * 3
    with fc.CheckpointManager(tmp_path, save_policy=_policies(grace=60.0)) as manager:
        manager.save(2, _items(torch.ones(3)))  # no signal
    with looked_into(tmp_path) as eye:
        assert eye.all_steps() == [1]


class _WithoutStep2(LocalStorage):
    def rename(self, source: str, target: str) -> None:
        if target.endswith("/2"):
            raise errors.StorageError("refused", path=target)
        super().rename(source, target)


def test_the_copy_is_saved_if_the_save_fails(tmp_path: Path) -> None:
    policies, storage = _policies(), _WithoutStep2()
    with fc.CheckpointManager(tmp_path, save_policy=policies, storage=storage) as manager:
        manager.save(1, _items(torch.ones(3)))
        signal.raise_signal(signal.SIGTERM)
        handle = manager.save(2, _items(torch.ones(3)))
        assert handle
        with pytest.raises(errors.SaveError):
            handle.result()
        assert _arrived(tmp_path) == 1


def test_a_step_that_was_saved_as_a_copy_may_be_saved_again(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path, save_policy=_policies()) as manager:
        manager.save(1, _items(torch.ones(3)))
        signal.raise_signal(signal.SIGTERM)
        assert _arrived(tmp_path) == 1
        manager.save(1, _items(torch.ones(3)))
        manager.save(1, _items(torch.ones(3)), force=True)
        manager.wait_until_finished()
        assert manager.all_steps() == [1]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_another_owner_of_the_descriptor_gets_the_signals_too(
    is_replaced: bool, tmp_path: Path
) -> None:
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno())
    try:
        with fc.CheckpointManager(tmp_path, save_policy=_policies()) as manager:
            manager.save(1, _items(torch.ones(3)))
            signal.set_wakeup_fd(-1)  # as asyncio does when a loop ends
            if not is_replaced:  # else the handler of Python alone sees the signal
                manager.save(2, _items(torch.ones(3)))
            signal.raise_signal(signal.SIGTERM)
            assert _arrived(tmp_path) == 2 - is_replaced
            assert select.select([reader], [], [], 60)[0]
            assert reader.recv(10) == bytes([signal.SIGTERM])
        assert signal.set_wakeup_fd(-1) == writer.fileno()
    finally:
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()


def test_signals_of_a_forked_child_are_not_the_parents(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path, save_policy=_policies()) as manager:
        manager.save(1, _items(torch.ones(3)))
        if (child := os.fork()) == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(int(signal.set_wakeup_fd(-1) != -1))
        assert os.waitpid(child, 0)[1] == 0
        time.sleep(0.3)
        assert manager.all_steps() == [] and not manager.reached_preemption(2)


@pytest.mark.parametrize("wrong", [{"snapshot_every": 0}, {"grace_seconds": -1.0}])
def test_invalid_arguments_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(errors.UsageError, match=next(iter(wrong))):
        fc.policies.Preemption(**wrong)  # type: ignore[arg-type]
    assert repr(fc.policies.Preemption(snapshot_every=5)) == "Preemption(snapshot_every=5)"


_NUM_SIGNALS = int(os.environ.get("FUNCTIONAL_CKPT_SIGNALS", "50"))


@pytest.mark.skipif(not IS_FULL, reason="a process for each signal")
def test_signals_at_random_instants_lose_at_most_one_interval(tmp_path: Path) -> None:
    """The loop is killed once a step is durable that is at most one interval older."""
    context, draw = multiprocessing.get_context("forkserver"), random.Random(1)
    context.set_forkserver_preload(["sigterm_loop"])
    delays: list[float] = []
    for number in range(_NUM_SIGNALS):
        root, size = tmp_path / str(number), draw.choice([10, 1_000_000])
        pipe, theirs = context.Pipe()
        args = (str(root), size, theirs)
        process = context.Process(target=sigterm_loop.train, args=args)
        process.start()
        theirs.close()
        assert pipe.recv()[1] == 0 and process.pid is not None
        time.sleep(draw.uniform(0.0, 3.0))
        os.kill(process.pid, signal.SIGTERM)
        sent = time.monotonic()
        time.sleep(0.01)
        saved = [0]
        while pipe.poll() and (found := pipe.recv())[0] <= sent:
            saved.append(found[1])
        deadline = sent + 60
        while saved[-1] > 0 and _newest(root) < saved[-1] and time.monotonic() < deadline:
            time.sleep(0.005)
        delays.append(time.monotonic() - sent - sigterm_loop.GRACE_SECONDS)
        process.kill()
        process.join()
        assert _newest(root) >= saved[-1], f"signal {number}: step {saved[-1]} is lost"
        with fc.CheckpointManager(root) as manager:
            for step in manager.all_steps():
                assert not checkpoint.verify_checkpoint(LocalStorage(), str(root / str(step)), step)
                expected = sigterm_loop.items(step, size)["tree"]
                assert not testing.differences(manager.restore(step)["tree"], expected)
        shutil.rmtree(root)
    delays.sort()
    print(
        f"{len(delays)} signals; seconds after the grace period: median "
        f"{delays[len(delays) // 2]:.2f}, 90 % {delays[len(delays) * 9 // 10]:.2f}, "
        f"longest {delays[-1]:.2f}"
    )


def _newest(root: Path) -> int:
    return max((int(path.name) for path in root.iterdir() if path.name.isdigit()), default=0)
