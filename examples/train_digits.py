#!/usr/bin/env python3
"""Trains a small convolutional classifier on scikit-learn's handwritten digits, with checkpoints.

    python examples/train_digits.py --workdir runs/digits

Stop it however you like (Ctrl-C, SIGTERM, kill -9) and run the same command again: it resumes after
the last committed step, and ends with the same bits as an uninterrupted run: weights, optimizer,
random generators, position in the data, and loss curve.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from absl import app, flags
from curve import Curve
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler

import functional_ckpt as fc

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", "runs/digits", "Where checkpoints/ and curve.jsonl are.")
flags.DEFINE_integer("num_steps", 400, "Batches to train on.", lower_bound=1)
flags.DEFINE_integer("batch_size", 64, "Images in a batch.", lower_bound=1)
flags.DEFINE_float("learning_rate", 3e-3, "The peak of the schedule.", lower_bound=0.0)
flags.DEFINE_float("ema_decay", 0.98, "Of the moving average of the weights.", 0.0, 1.0)
flags.DEFINE_integer("seed", 0, "Of everything random.")

CKPT = fc.flags.define(required=False, save_every="20ba", keep_latest=3, keep_best="accuracy")

# Settings that a run cannot change when it resumes.
FIXED = ("num_steps", "batch_size", "learning_rate", "ema_decay", "seed")


class Classifier(nn.Module):
    """8x8 grey images to ten classes: 30,000 parameters, with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.hidden = nn.Linear(512, 48)
        self.output = nn.Linear(48, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.conv1(images)).relu()
        x = self.norm2(self.conv2(x)).relu()
        x = F.dropout(F.max_pool2d(x, 2).flatten(1), 0.2, self.training)
        x = F.dropout(self.hidden(x).relu(), 0.3, self.training)
        return self.output(x)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 images of 8x8 pixels from 0 to 16: every fifth to test with, the others to train on."""
    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    is_test = torch.arange(len(labels)) % 5 == 0
    return (
        TensorDataset(images[~is_test], labels[~is_test]),
        TensorDataset(images[is_test], labels[is_test]),
    )


def data_loader(data: TensorDataset) -> StatefulDataLoader[Any]:
    """Shuffled batches, which resume from any position.

    The sampler has a generator of its own: with `shuffle=True` the loader draws a seed for its
    workers from the same one in every epoch, which it forgets to do when it resumes.
    """
    shuffling, seeding = (torch.Generator().manual_seed(FLAGS.seed) for _ in range(2))
    sampler = RandomSampler(data, generator=shuffling)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchdata calls something that torch has deprecated
        return StatefulDataLoader(
            data, FLAGS.batch_size, sampler=sampler, drop_last=True, generator=seeding
        )


def endless(loader: StatefulDataLoader[Any]) -> Iterator[list[torch.Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from loader


@torch.no_grad()
def update_average(average: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Moves the average towards the parameters, and copies the buffers."""
    for name, parameter in model.named_parameters():
        average[name].lerp_(parameter, 1 - FLAGS.ema_decay)
    for name, buffer in model.named_buffers():
        average[name].copy_(buffer)


@torch.no_grad()
def accuracy(model: nn.Module, weights: dict[str, torch.Tensor], data: TensorDataset) -> float:
    """The share of images that the model gets right with the given weights."""
    images, labels = data.tensors
    model.eval()
    logits = torch.func.functional_call(model, weights, (images,))
    model.train()
    return (logits.argmax(1) == labels).double().mean().item()


def train(workdir: Path) -> None:
    random.seed(FLAGS.seed)
    np.random.seed(FLAGS.seed)
    torch.manual_seed(FLAGS.seed)
    train_data, test_data = digits()
    loader = data_loader(train_data)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=FLAGS.learning_rate, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=FLAGS.learning_rate, total_steps=FLAGS.num_steps
    )
    average = {name: value.clone() for name, value in model.state_dict().items()}
    config = {name: FLAGS[name].value for name in FIXED}
    items = {  # built once: each save captures the current values
        "model": model,
        "optimizer": fc.Optimizer(optimizer, model),
        "scheduler": scheduler,
        "rng": fc.Rng(),
        "loader": loader,
        "ema": {"decay": FLAGS.ema_decay, "average": average},
        "config": fc.Json(config),
    }

    with fc.flags.manager(
        CKPT, directory=workdir / "checkpoints", save_policy=fc.policies.Preemption()
    ) as manager:
        if (latest := manager.latest_step()) is not None:
            saved = manager.restore(latest, only="config")["config"]
            if saved != config:
                raise app.UsageError(f"{workdir} holds a run with {saved}, not with {config}.")
        restored = fc.flags.restore(CKPT, manager, items)  # from the checkpoint of --ckpt_resume
        items["ema"], average = restored["ema"], restored["ema"]["average"]  # pytrees are new
        start = restored.next_step
        if restored.step is not None:
            print(f"resumed after step {restored.step}", flush=True)
        curve = Curve(workdir / "curve.jsonl", start)

        batches = endless(loader)
        for step in range(start, FLAGS.num_steps):
            images, labels = next(batches)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            update_average(average, model)
            curve.add(step=step, loss=loss.item(), learning_rate=scheduler.get_last_lr()[0])

            metrics, is_last = None, step == FLAGS.num_steps - 1
            if is_last or manager.should_save(step):
                metrics = {"accuracy": accuracy(model, average, test_data)}
                print(f"step {step}: loss {loss.item():.4f}, {metrics}", flush=True)
            manager.save(step, items, metrics=metrics, force=is_last)
            if manager.reached_preemption(step):
                print(f"received SIGTERM, saved step {step}", flush=True)
                break


def main(args: list[str]) -> None:
    if args[1:]:
        raise app.UsageError(f"Unknown arguments: {' '.join(args[1:])}")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums do not depend on how many cores there are
    workdir = Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    train(workdir)


if __name__ == "__main__":
    app.run(main)
