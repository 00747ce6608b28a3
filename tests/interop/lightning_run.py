"""A training by Lightning: `python lightning_run.py DIRECTORY KILL_AT_STEP`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import nn

import functional_ckpt as fc
from functional_ckpt.interop import lightning as lightning_lib

NUM_EPOCHS = 3


class Module(lightning.LightningModule):
    """A regression with dropout, so that random numbers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
        self.losses: dict[int, float] = {}

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        (x,) = batch
        loss = (self.layers(x)[:, 0] - x.sum(1)).square().mean()
        self.losses[self.global_step] = loss.item()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Kill(lightning.Callback):
    """SIGKILL in the middle of a step."""

    def __init__(self, manager: fc.CheckpointManager, at: int | None) -> None:
        self.manager, self.at = manager, at

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.at:
            self.manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)


def run(root: Path, kill_at: int | None = None, **options: Any) -> Module:
    """Trains, or goes on training; 6 batches an epoch."""
    lightning.seed_everything(5, verbose=False)
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(3))
    data = torch.utils.data.TensorDataset(x)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    module = Module()
    options = {"save_policy": fc.policies.every("1ep"), **options}
    with fc.CheckpointManager(root / "ckpt", **options) as manager, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers, loggers and log intervals
        io = lightning_lib.ManagerIO(manager)
        trainer = lightning.Trainer(
            default_root_dir=str(root),
            max_epochs=NUM_EPOCHS,
            accelerator="cpu",
            devices=1,
            plugins=[io],
            callbacks=[lightning_lib.SaveCallback(io), Kill(manager, kill_at)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        trainer.fit(module, loader, ckpt_path=io.latest())
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
