"""The real Lightning: saved by the callback, killed, gone on with to the same end."""

from __future__ import annotations

import contextlib
import enum
import functools
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import functional_ckpt as fc

pytest.importorskip("lightning")

import lightning.pytorch as pl
import lightning_run
from full import IS_FULL, drawn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torchdata.stateful_dataloader import StatefulDataLoader

from functional_ckpt.interop import lightning, lightning_loaders, lightning_loops


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> lightning_run.Module:
    return lightning_run.run(tmp_path_factory.mktemp("whole"))


def check_same(whole: lightning_run.Module, other: lightning_run.Module, start: int) -> None:
    assert other.losses == {step: x for step, x in whole.losses.items() if step >= start}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_killed_training_resumes_exactly(whole: lightning_run.Module, tmp_path: Path) -> None:
    script = Path(lightning_run.__file__)
    done = subprocess.run(
        [sys.executable, script, tmp_path, "10"], capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr.decode()
    with fc.CheckpointManager(tmp_path / "ckpt", read_only=True) as manager:
        assert manager.all_steps() == [6]
        metadata = manager.metadata(6)
    assert metadata.progress is not None
    assert metadata.progress.count("epoch") == 1
    assert metadata.metrics == {"loss": pytest.approx(whole.losses[5])}
    check_same(whole, lightning_run.run(tmp_path), 6)


def test_steps_within_an_epoch(whole: lightning_run.Module, tmp_path: Path) -> None:
    other = lightning_run.run(tmp_path, save_policy=fc.policies.every(4))
    check_same(whole, other, 0)
    with fc.CheckpointManager(tmp_path / "ckpt") as manager:
        assert manager.all_steps() == [4, 8, 12, 16, 18]
        checkpoint = manager.restore(8)["lightning"]
        assert checkpoint["global_step"] == 8
        assert (
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 8
        )


def whole_and_resumed(
    tmp_path: Path, epochs: int = 1, **how: Any
) -> tuple[lightning_run.Module, lightning_run.Module]:
    """A complete training, and one that ends after some epochs and is resumed."""
    make = {name: how.pop(name) for name in ("module", "loader", "more") if name in how}

    def train(name: str, **changes: Any) -> lightning_run.Module:
        io = lightning.ManagerIO(tmp_path / name, save_policy=fc.policies.every("1ep"))
        torch.manual_seed(5)
        parts = {part: each() for part, each in make.items()}
        return lightning_run.fit(io, tmp_path, **parts, **{**how, **changes})

    whole = train("whole")
    train("cut", max_epochs=epochs)
    return whole, train("cut")


def test_shuffled_loader_resumes_in_the_same_order(tmp_path: Path) -> None:
    shuffled = functools.partial(lightning_run.make_loader, shuffle=True)
    check_same(*whole_and_resumed(tmp_path, 2, loader=shuffled), 12)


@pytest.mark.parametrize("loader", ["generator", "persistent workers", "several"])
def test_loaders_resume_at_the_end_of_an_epoch(tmp_path: Path, loader: str) -> None:
    check_same(*lightning_run.run_loaders(tmp_path, loader, "1ep"), 6)


def test_another_number_of_processes_starts_the_epoch_s_data_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lightning_loaders, "is_of_this_many", lambda *_: False)
    _, resumed = lightning_run.run_loaders(tmp_path, "stateful", "4ba")
    assert sorted(resumed.losses) == list(range(8, 18))
    assert "Step 8 was saved by another number of processes than 1" in caplog.text


def stateful_loader(**options: Any) -> Any:
    torch.manual_seed(11)  # the loader draws its order's seed when it is made
    return StatefulDataLoader(lightning_run.make_samples(), batch_size=4, shuffle=True, **options)


class StatefulStream(torch.utils.data.IterableDataset[Any]):
    """24 samples; Lightning draws a batch in advance, as it does not know the length."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Any:
        for number in range(self.next, 24):
            self.next = number + 1
            yield (torch.full((4,), number / 10),)
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


LOADERS = {
    "shuffled": stateful_loader,
    "workers": functools.partial(stateful_loader, num_workers=1),
    "stream": lambda: StatefulDataLoader(StatefulStream(), batch_size=4),
}


@pytest.mark.parametrize(
    ("loader", "policy", "cut_at"),
    drawn(
        [
            (loader, policy, cut_at)
            for loader in LOADERS
            for policy, cut_at in (("1ep", 13), ("4ba", 9), ("7ba", 8), ("2ba", 5))
        ],
        4,
        lambda case: "-".join(map(str, case)),
    ),
)
def test_a_loader_that_saves_its_position_resumes_there(
    tmp_path: Path, loader: str, policy: str, cut_at: int
) -> None:
    def run(name: str, more: Sequence[pl.Callback] = ()) -> lightning_run.Module:
        io = lightning.ManagerIO(tmp_path / name, save_policy=policy)
        accumulated = 2 if policy == "2ba" else 1
        return lightning_run.fit(
            io, tmp_path, loader=LOADERS[loader](), more=more, accumulate_grad_batches=accumulated
        )

    whole = run("whole")
    with pytest.raises(lightning_run.StopHereError):
        run("cut", more=[lightning_run.StopHere(cut_at)])
    with fc.CheckpointManager(tmp_path / "cut", read_only=True) as manager:
        latest = manager.latest_step()
    check_same(whole, run("cut"), latest)


@pytest.mark.parametrize(
    ("loader", "policy"),
    [("plain", "1ep"), ("plain and shuffled", "1ep"), ("shuffled", "1ep"), ("shuffled", "4ba")],
)
def test_a_schedule_that_needs_the_number_of_batches_resumes_exactly(
    tmp_path: Path, loader: str, policy: str
) -> None:
    plain = {
        "plain": lightning_run.make_loader,
        "plain and shuffled": functools.partial(lightning_run.make_loader, shuffle=True),
    }

    def run(name: str, more: Sequence[pl.Callback] = ()) -> lightning_run.Module:
        io = lightning.ManagerIO(tmp_path / name, save_policy=policy)
        made = {**LOADERS, **plain}[loader]()
        torch.manual_seed(5)
        return lightning_run.fit(io, tmp_path, lightning_run.OneCycle(), made, more=more)

    whole = run("whole")
    with pytest.raises(lightning_run.StopHereError):
        run("cut", more=[lightning_run.StopHere(9)])
    with fc.CheckpointManager(tmp_path / "cut", read_only=True) as manager:
        latest = manager.latest_step()
    check_same(whole, run("cut"), latest)


class Epochs(pl.Callback):
    seen: ClassVar[list[int]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(trainer.current_epoch)


def test_resumed_epoch_starts_like_any_other(tmp_path: Path) -> None:
    Epochs.seen.clear()
    whole_and_resumed(tmp_path, more=lambda: [Epochs()])
    assert Epochs.seen == [0, 1, 2, 0, 1, 2]


def test_accumulation_that_changes_by_epoch_is_resumed_in_time(tmp_path: Path) -> None:
    scheduler = functools.partial(pl.callbacks.GradientAccumulationScheduler, {0: 1, 1: 2})
    whole, resumed = whole_and_resumed(tmp_path, more=lambda: [scheduler()])
    assert max(whole.losses) == max(resumed.losses) == 6 + 3 + 3 - 1
    check_same(whole, resumed, 6)


@pytest.mark.parametrize("policy", [fc.policies.every(2), fc.policies.every("2ba")])
def test_accumulated_batches_are_saved_where_they_update(tmp_path: Path, policy: Any) -> None:
    io = lightning.ManagerIO(tmp_path / "ckpt", save_policy=policy)
    lightning_run.fit(io, tmp_path, accumulate_grad_batches=3)
    with fc.CheckpointManager(tmp_path / "ckpt", read_only=True) as manager:
        steps = manager.all_steps()
        assert steps == ([2, 4, 6] if policy == fc.policies.every(2) else [1, 2, 3, 4, 5, 6])
        assert [manager.metadata(step).progress.batch for step in steps] == [3 * s for s in steps]


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(lightning_run.make_loader())


def test_an_epoch_of_a_stream_is_saved_at_its_end(tmp_path: Path) -> None:
    stream = functools.partial(torch.utils.data.DataLoader, Stream(), batch_size=None)
    check_same(*whole_and_resumed(tmp_path, loader=stream), 6)
    with fc.CheckpointManager(tmp_path / "whole", read_only=True) as manager:
        assert manager.all_steps() == [6, 12, 18]


class SignalAt(lightning_run.SignalAt):
    is_lightning_s = False

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        super().on_before_zero_grad(trainer, pl_module, optimizer)
        self.is_lightning_s |= trainer.received_sigterm


@pytest.mark.parametrize("preemption", [True, False], ids=["preemption", "lightning"])
def test_sigterm_saves_the_step(
    whole: lightning_run.Module, tmp_path: Path, preemption: bool
) -> None:
    policies = [fc.policies.every(100), *([fc.policies.Preemption()] if preemption else [])]
    io = lightning.ManagerIO(tmp_path / "ckpt", save_policy=policies)
    ends = contextlib.nullcontext() if preemption else pytest.raises(SIGTERMException)
    signal_at = SignalAt(8, signal.SIGTERM)
    with ends:
        lightning_run.fit(io, tmp_path, more=[signal_at])
    # Lightning's handler communicates, and blocks where one process of several has the signal.
    assert not (preemption and signal_at.is_lightning_s)
    with fc.CheckpointManager(tmp_path / "ckpt", read_only=True) as manager:
        assert manager.all_steps() == [9]


@pytest.mark.parametrize("signal_at", [8, 12], ids=["within an epoch", "at its end"])
def test_slurm_s_signal_saves_the_step_and_requeues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_at: int
) -> None:
    for name, value in lightning_run.slurm_environment(tmp_path / "bin").items():
        monkeypatch.setenv(name, value)
    whole = lightning_run.run_slurm(tmp_path, "whole", -1)
    assert not (tmp_path / "bin" / "log").exists()
    lightning_run.run_slurm(tmp_path, "cut", signal_at)
    assert (tmp_path / "bin" / "log").read_text() == "requeue 77\n"
    assert list(tmp_path.glob("hpc_ckpt*")) == []  # Lightning's own, which would be a second one
    step = signal_at + 1  # the signal comes within an update
    assert fc.CheckpointManager(tmp_path / "cut", read_only=True).latest_step() == step
    check_same(whole, lightning_run.run_slurm(tmp_path, "cut", -1), step)


@pytest.mark.skipif(not IS_FULL, reason="with FUNCTIONAL_CKPT_FULL=1")
@pytest.mark.timeout(600)
def test_slurm_s_signal_to_one_of_two_processes(tmp_path: Path) -> None:
    def launch(name: str, signal_at: int) -> dict[str, Any]:
        command = [sys.executable, lightning_run.__file__, tmp_path, "slurm", name, str(signal_at)]
        running = [
            subprocess.Popen(
                command,
                env={**os.environ, **lightning_run.slurm_environment(tmp_path / "bin", rank, 2)},
            )
            for rank in range(2)
        ]
        assert [process.wait() for process in running] == [0, 0]
        return json.loads((tmp_path / f"{name}-{signal_at}-1").read_text())

    whole = launch("whole", -1)
    launch("cut", 4)
    assert (tmp_path / "bin" / "log").read_text() == "requeue 77\n"
    resumed = launch("cut", -1)
    assert list(resumed) in (["5", "6", "7", "8"], ["6", "7", "8"])  # where the processes agreed
    assert resumed == {step: whole[step] for step in resumed}


class Fail(pl.Callback):
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 9:
            raise ZeroDivisionError


def test_an_exception_saves_the_last_whole_update(tmp_path: Path) -> None:
    io = lightning.ManagerIO(tmp_path / "ckpt", save_policy=fc.policies.every(100))
    with pytest.raises(ZeroDivisionError):
        lightning_run.fit(io, tmp_path, more=[Fail()])
    with fc.CheckpointManager(tmp_path / "ckpt", read_only=True) as manager:
        assert manager.all_steps() == [9]


def test_training_that_ends_within_an_epoch_resumes_there(tmp_path: Path) -> None:
    io = lightning.ManagerIO(tmp_path / "ckpt", save_policy=fc.policies.every(100))
    lightning_run.fit(io, tmp_path, max_steps=8)
    resumed = lightning_run.fit(io, tmp_path)
    assert sorted(resumed.losses) == list(range(8, 18))


def test_two_optimizers_are_saved_and_resumed(tmp_path: Path) -> None:
    whole, resumed = whole_and_resumed(tmp_path, module=lightning_run.TwoOptimizers)
    check_same(whole, resumed, 12)


class Kind(enum.Enum):
    A = 1


def test_hyperparameters_of_any_kind_are_saved(tmp_path: Path) -> None:
    module = lightning_run.Module()
    module.save_hyperparameters({"root": Path("/data"), "kind": Kind.A, "lr": 0.1, "tags": {"a"}})
    io = lightning.ManagerIO(tmp_path / "ckpt", save_policy=fc.policies.every("1ep"))
    lightning_run.fit(io, tmp_path, module, max_epochs=1)
    saved = fc.restore(tmp_path / "ckpt" / "6")["lightning"]["hyper_parameters"]
    assert saved == {"root": Path("/data"), "kind": "Kind.A", "lr": 0.1, "tags": {"a"}}


def test_the_hyperparameters_that_are_saved_as_text_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    known = {"kind": Kind.A, "lr": 0.1}
    assert lightning_loops.storable({"hyper_parameters": known}) == {
        "hyper_parameters": {"kind": "Kind.A", "lr": 0.1}
    }
    assert [r.getMessage() for r in caplog.records] == ["hyper_parameters: kind saved as text"]


def test_lightning_s_own_checkpoints_are_passed_through(tmp_path: Path) -> None:
    io = lightning.ManagerIO(tmp_path / "ckpt", save_policy=fc.policies.every(100))
    own = tmp_path / "own.ckpt"
    lightning.SaveCallback(io)

    class SaveOwn(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(own)

    lightning_run.fit(io, tmp_path, more=[SaveOwn()], max_epochs=1)
    assert torch.load(own, weights_only=True)["global_step"] == 6
    assert io.load_checkpoint(own)["global_step"] == 6
    io.remove_checkpoint(own)
    assert not own.exists()


@pytest.mark.timeout(600)
def test_two_processes_save_and_resume_together(tmp_path: Path) -> None:
    script = Path(lightning_run.__file__)

    def launch(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", str(script), str(tmp_path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / f"{arguments[1]}-losses.json").read_text())

    whole = launch("ddp", "whole", "3")
    launch("ddp", "cut", "1")
    resumed = launch("ddp", "cut", "3")
    assert resumed == {step: loss for step, loss in whole.items() if int(step) >= 3}
    one, other = (fc.restore(tmp_path / name / "9")["lightning"] for name in ("whole", "cut"))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name


@pytest.mark.skipif(not IS_FULL, reason="with FUNCTIONAL_CKPT_FULL=1")
@pytest.mark.timeout(900)
def test_two_processes_resume_at_the_positions_of_their_own_loaders(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(lightning_run.__file__)
    done = subprocess.run(
        [*command, str(script), str(tmp_path), "loaders"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends = {"1ep": 3, "2ba": 4}
    names = [f"{loader}-1ep" for loader in lightning_run.LOADERS]
    for name in [*names, *(f"{loader}-2ba" for loader in lightning_run.SAVING)]:
        for rank in range(2):
            losses = (tmp_path / name / f"losses-{rank}.json").read_text()
            whole, resumed = json.loads(losses)
            start = ends[name[-3:]]
            assert resumed == {step: x for step, x in whole.items() if int(step) >= start}, name


def test_a_manager_that_was_made_too_early_is_refused(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "ckpt") as manager:
        trainer = types.SimpleNamespace(strategy=object(), world_size=2)
        callback = lightning.SaveCallback(lightning.ManagerIO(manager))
        with pytest.raises(fc.errors.UsageError, match="Give ManagerIO the manager's directory"):
            callback.setup(trainer, None, "fit")


def test_steps_have_the_manager_s_paths(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "ckpt") as manager:
        io = lightning.ManagerIO(manager)
        assert io.latest() is None
        with pytest.raises(fc.errors.UsageError, match="the number of a step"):
            io.load_checkpoint(tmp_path / "ckpt" / "last")
        with pytest.raises(fc.errors.UsageError, match="its own storage"):
            io.save_checkpoint({}, io.path(1), storage_options={})
        with pytest.raises(fc.errors.StepNotFoundError):
            io.load_checkpoint(io.path(1))
        with pytest.raises(fc.errors.UsageError, match="takes no options"):
            lightning.ManagerIO(manager, save_policy=None)


def test_a_job_that_is_requeued_leaves_out_lightning_s_file_for_slurm_alone(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "ckpt") as manager:
        io = lightning.ManagerIO(manager)
        io.is_requeued = True
        for name in ("hpc_ckpt_1.ckpt", "final.ckpt"):
            io.save_checkpoint({"x": 1}, tmp_path / name)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["final.ckpt"]
