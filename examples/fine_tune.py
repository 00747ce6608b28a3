#!/usr/bin/env python3
"""Trains a small classifier by epochs, then fine-tunes its body under another head.

    python examples/fine_tune.py --workdir runs/fine_tune
    ls -l runs/fine_tune/base runs/fine_tune/fine

The base run saves at the end of each epoch under names such as `ep2-ba46`, with a link to the
latest. The second run starts from its weights: its body has another name, and its head another
size. Run it again and both resume, or have nothing left to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from absl import app, flags, logging
from sklearn.datasets import load_digits
from torch import nn

import functional_ckpt as fc

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "runs/fine_tune", "Where the two runs are.")
flags.DEFINE_integer("num_epochs", 3, "Epochs of each run.", lower_bound=1)
flags.DEFINE_integer("batch_size", 64, "Images in a batch.", lower_bound=1)

NAMES = fc.step_names.StepTemplate(template="ep{epoch}-ba{batch}")
BASE = fc.flags.define("base", required=False, save_every="1ep", keep_latest=2)
FINE = fc.flags.define("fine", required=False, save_every="1ep", keep_latest=2)


class Base(nn.Module):
    """8x8 grey images to ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.LayerNorm(48))
        self.head = nn.Linear(48, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(images))


class Fine(nn.Module):
    """The same body, called otherwise, to two classes: even and odd."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Base().encoder
        self.head = nn.Linear(48, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


def batches(
    labels: torch.Tensor, images: torch.Tensor, epoch: int, start: int
) -> Iterator[list[torch.Tensor]]:
    """The batches of an epoch from one on: their order depends on the epoch alone."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
    for chosen in list(order.split(FLAGS.batch_size))[start:]:
        yield [images[chosen], labels[chosen]]


def train(
    defined: fc.flags.CheckpointFlags,
    directory: Path,
    model: nn.Module,
    labels: torch.Tensor,
    images: torch.Tensor,
    weights: Path | None = None,
) -> None:
    """Trains by epochs, from the latest step if there is one, else with the weights given."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model), "rng": fc.Rng()}
    with fc.flags.manager(
        defined, directory=directory, step_name=NAMES, latest_link="latest"
    ) as manager:
        if manager.latest_step() is None and weights is not None:
            fc.restore(
                weights,
                {"model": model},
                key_map={"model.encoder": "model.body"},
                ignore="model.head.*",
            )
        restored = fc.flags.restore(defined, manager, items)
        num_batches = -(-len(images) // FLAGS.batch_size)
        progress = restored.progress or fc.Progress(
            max_duration=f"{FLAGS.num_epochs}ep", batches_per_epoch=num_batches
        )
        while progress.epoch < FLAGS.num_epochs:
            losses: list[float] = []
            for x, y in batches(labels, images, progress.epoch, progress.batch_in_epoch):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                progress = progress.next_batch(samples=len(x))
            progress = progress.next_epoch()
            mean = sum(losses) / len(losses)
            manager.save(progress.batch, items, metrics={"loss": mean}, progress=progress)
            print(f"{directory.name}: epoch {progress.epoch}, loss {mean:.4f}", flush=True)


def main(args: list[str]) -> None:
    if args[1:]:
        raise app.UsageError(f"Unknown arguments: {' '.join(args[1:])}")
    logging.set_verbosity(logging.WARNING)
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    workdir = Path(FLAGS.workdir)
    train(BASE, workdir / "base", Base(), labels, images)
    train(FINE, workdir / "fine", Fine(), labels % 2, images, workdir / "base" / "latest")


if __name__ == "__main__":
    app.run(main)
