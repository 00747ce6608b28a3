"""A training by Lightning: `python lightning_run.py DIRECTORY KILL_AT_STEP`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import functional_ckpt as fc
from functional_ckpt.interop import lightning as lightning_lib

NUM_EPOCHS = 3


class Module(lightning.LightningModule):
    """A regression with dropout, so that random numbers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
        self.losses: dict[int, float] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if isinstance(batch, dict):  # of several loaders
            batch = [torch.cat([part[0] for part in batch.values()])]
        (x,) = batch
        loss = (self.layers(x)[:, 0] - x.sum(1)).square().mean()
        self.losses[self.global_step] = loss.item()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class OneCycle(Module):
    """Its schedule needs the number of batches, so Lightning sets the loaders up early."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class TwoOptimizers(Module):
    """Two optimizers that take turns by hand; Lightning counts the steps of both."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        first, last = self.layers[0], self.layers[3]
        return [
            torch.optim.AdamW(first.parameters(), lr=0.05),
            torch.optim.SGD(last.parameters(), lr=0.01, momentum=0.9),
        ]


class Kill(lightning.Callback):
    """SIGKILL in the middle of a step."""

    def __init__(self, manager: fc.CheckpointManager, at: int | None) -> None:
        self.manager, self.at = manager, at

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.at:
            self.manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)


def make_loader(**options: Any) -> torch.utils.data.DataLoader[Any]:
    """6 batches an epoch."""
    return torch.utils.data.DataLoader(make_samples(), batch_size=4, **options)


def make_trainer(
    root: Path, io: lightning_lib.ManagerIO, more: Sequence[lightning.Callback] = (), **changes: Any
) -> lightning.Trainer:
    """A Trainer whose callback saves with the manager."""
    return lightning.Trainer(
        **{
            "default_root_dir": str(root),
            "max_epochs": NUM_EPOCHS,
            "accelerator": "cpu",
            "devices": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "plugins": [io],
            **changes,
        },
        callbacks=[*more, lightning_lib.SaveCallback(io)],
    )


def fit(
    io: lightning_lib.ManagerIO,
    root: Path,
    module: Module | None = None,
    loader: Any = None,
    more: Sequence[lightning.Callback] = (),
    **changes: Any,
) -> Module:
    """Trains from the latest step."""
    lightning.seed_everything(5, verbose=False)
    module = module or Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers, loggers and log intervals
        trainer = make_trainer(root, io, more, **changes)
        trainer.fit(module, make_loader() if loader is None else loader, ckpt_path=io.latest())
    return module


def run(root: Path, kill_at: int | None = None, **options: Any) -> Module:
    """Trains, or resumes training; options are the manager's."""
    options = {"save_policy": fc.policies.every("1ep"), **options}
    with fc.CheckpointManager(root / "ckpt", **options) as manager:
        io = lightning_lib.ManagerIO(manager)
        return fit(io, root, more=[Kill(manager, kill_at)])


def run_ddp(root: Path, name: str, epochs: int) -> None:
    """Trains with two processes of torchrun, shuffled; rank 0 leaves its losses in a file."""
    io = lightning_lib.ManagerIO(root / name, save_policy=fc.policies.every("1ep"))
    module = fit(
        io, root, loader=make_loader(shuffle=True), max_epochs=epochs, strategy="ddp", devices=2
    )
    if module.global_rank == 0:
        (root / f"{name}-losses.json").write_text(json.dumps(module.losses))


class Noisy(torch.utils.data.Dataset[Any]):
    """24 samples, to which a worker adds random numbers."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> tuple[torch.Tensor]:
        return (torch.full((4,), number / 10) + torch.randn(4) / 10,)


class Part(torch.utils.data.IterableDataset[Any]):
    """A rank's 12 samples of a stream, and its position."""

    def __init__(self) -> None:
        self.rank, self.next = int(os.environ["RANK"]), 0

    def __iter__(self) -> Any:
        for number in range(self.next, 12):
            self.next = number + 1
            yield (torch.full((4,), number / 5 + self.rank),)
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        """Another structure on each rank."""
        return {"next": self.next, "of": [self.rank] * self.rank}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["of"] == [self.rank] * self.rank
        self.next = state["next"]


def make_samples() -> torch.utils.data.TensorDataset:
    """24 samples."""
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(3))
    return torch.utils.data.TensorDataset(x)


LOADERS: dict[str, Callable[[], Any]] = {
    "plain in workers": lambda: torch.utils.data.DataLoader(
        Noisy(), 4, shuffle=True, num_workers=1
    ),
    "generator": lambda: make_loader(shuffle=True, generator=torch.Generator().manual_seed(7)),
    "persistent workers": lambda: make_loader(shuffle=True, num_workers=1, persistent_workers=True),
    "stateful": lambda: StatefulDataLoader(make_samples(), 4, shuffle=True),
    "in workers": lambda: StatefulDataLoader(make_samples(), 4, shuffle=True, num_workers=1),
    "noisy workers": lambda: StatefulDataLoader(Noisy(), 4, shuffle=True, num_workers=1),
    "part": lambda: StatefulDataLoader(Part(), 4),
    "several": lambda: CombinedLoader(
        {
            "a": StatefulDataLoader(make_samples(), 4, shuffle=True),
            "b": StatefulDataLoader(make_samples(), 6, shuffle=True),
        },
        "max_size_cycle",
    ),
}


SAVING = ("stateful", "in workers", "part", "several")  # their positions


class StopHereError(Exception):
    """Ends a training."""


class StopHere(lightning.Callback):
    """Ends a training within an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            raise StopHereError


def run_loaders(root: Path, loader: str, policy: str) -> tuple[Module, Module]:
    """A complete training, and one that is stopped within its second epoch and resumed."""

    def train(name: str, *more: lightning.Callback) -> Module:
        io = lightning_lib.ManagerIO(root / name, save_policy=policy)
        torch.manual_seed(11)  # loaders draw seeds when they are made
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        how: dict[str, Any] = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, by Lightning's CombinedLoader
            made = LOADERS[loader]()
        return fit(io, root, loader=made, more=more, **how)

    whole = train("whole")
    with contextlib.suppress(StopHereError):
        train("cut", StopHere(max(whole.losses) // 2 + 1))
    return whole, train("cut")


def run_ddp_loaders(root: Path) -> None:
    """Two processes of torchrun go through the loaders; each leaves its losses in a file."""
    for loader in LOADERS:
        for policy in ("1ep", "2ba") if loader in SAVING else ("1ep",):
            name = f"{loader}-{policy}"
            (root / name).mkdir(exist_ok=True)
            trained = run_loaders(root / name, loader, policy)
            losses = [module.losses for module in trained]
            (root / name / f"losses-{trained[0].global_rank}.json").write_text(json.dumps(losses))


class SignalAt(lightning.Callback):
    """A signal to the process of rank 0, within an update."""

    def __init__(self, step: int, number: int = signal.SIGUSR1) -> None:
        self.step, self.number = step, number

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 0:
            self.step = -1
            os.kill(os.getpid(), self.number)


def run_slurm(root: Path, name: str, signal_at: int, *policies: Any) -> Module:
    """Trains in a job of SLURM, which `scontrol` of the PATH requeues; shuffled."""
    io = lightning_lib.ManagerIO(root / name, save_policy=[fc.policies.every(5), *policies])
    torch.manual_seed(5)  # the loader draws its order's seed when it is made
    module = fit(
        io,
        root,
        loader=StatefulDataLoader(make_samples(), batch_size=4, shuffle=True),
        more=[SignalAt(signal_at)],
        plugins=[io, SLURMEnvironment()],
        devices=int(os.environ["SLURM_NTASKS"]),
        strategy="ddp" if os.environ["SLURM_NTASKS"] != "1" else "auto",
    )
    (root / f"{name}-{signal_at}-{module.global_rank}").write_text(json.dumps(module.losses))
    return module


def slurm_environment(bin_directory: Path, rank: int = 0, num_ranks: int = 1) -> dict[str, str]:
    """The variables of a process of a job; makes an `scontrol` that notes how it is called."""
    bin_directory.mkdir(exist_ok=True)
    (bin_directory / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {bin_directory}/log\n')
    (bin_directory / "scontrol").chmod(0o755)
    names = {"JOB_NAME": "train", "JOB_ID": 77, "NODELIST": "localhost", "NNODES": 1, "NODEID": 0}
    numbers = {"NTASKS": num_ranks, "NTASKS_PER_NODE": num_ranks, "PROCID": rank, "LOCALID": rank}
    variables = {f"SLURM_{key}": str(value) for key, value in {**names, **numbers}.items()}
    return {**variables, "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "slurm":
        run_slurm(Path(sys.argv[1]), sys.argv[3], int(sys.argv[4]), fc.policies.Preemption())
    elif sys.argv[2] == "loaders":
        run_ddp_loaders(Path(sys.argv[1]))
    elif sys.argv[2] == "ddp":
        run_ddp(Path(sys.argv[1]), sys.argv[3], int(sys.argv[4]))
    else:
        run(Path(sys.argv[1]), int(sys.argv[2]))
