"""A training by transformers.Trainer: `python trainer_run.py DIRECTORY KILL_AT_STEP`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import functional_ckpt as fc
from functional_ckpt.interop import trainer as trainer_lib

NUM_STEPS = 14


class Model(nn.Module):
    """A regression with dropout, so that random numbers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.layers(x)
        return {"loss": (y[:, 0] - labels).square().mean(), "logits": y}


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(24, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.x[index].sum()}


class Kill(transformers.TrainerCallback):
    """SIGKILL in the middle of a step."""

    def __init__(self, manager: fc.CheckpointManager, at: int | None) -> None:
        self.manager, self.at = manager, at

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            self.manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)


def arguments(root: Path, **changes: Any) -> transformers.TrainingArguments:
    """6 updates an epoch, on the CPU; the Trainer saves nothing itself."""
    return transformers.TrainingArguments(
        **{
            "output_dir": str(root / "out"),
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 5,
            "dataloader_pin_memory": False,
            **changes,
        }
    )


def make_trainer(
    root: Path,
    manager: fc.CheckpointManager,
    *,
    more_callbacks: Sequence[Any] = (),
    parts: Mapping[str, Any] | None = None,
    **changes: Any,
) -> transformers.Trainer:
    """A Trainer whose callback saves with the manager."""
    transformers.set_seed(5)
    return transformers.Trainer(
        **{
            "model": Model(),
            "args": arguments(root, **changes),
            "train_dataset": Data(),
            **(parts or {}),
        },
        callbacks=[trainer_lib.ManagerCallback(manager), *more_callbacks],
    )


def run(root: Path, kill_at: int | None = None, **options: Any) -> transformers.Trainer:
    """Trains, or resumes training; options are the manager's."""
    options = {"save_policy": fc.policies.every(5), **options}
    with fc.CheckpointManager(root / "ckpt", **options) as manager:
        trainer = make_trainer(root, manager, more_callbacks=[Kill(manager, kill_at)])
        trainer_lib.train(trainer, manager)
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
