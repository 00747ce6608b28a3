#!/usr/bin/env python3
"""Checkpoints in a purely functional program: a frozen state goes in, a new one comes out.

    python examples/functional_state.py --workdir runs/functional

The training state is one frozen dataclass, registered as a pytree. `train_step` takes a state and
returns the next; `restore` takes a state, for its structure, shapes and dtypes only, and returns
another of the same type. Nothing that is passed in is ever changed.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, TypeAlias

import torch
from absl import app, flags
from sklearn.datasets import load_digits
from torch.func import functional_call, grad_and_value
from torch.utils import _pytree as pytree

import functional_ckpt as fc

Tree: TypeAlias = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """All there is to know of a training run between two steps.

    Attributes:
        step: How many steps were taken.
        params: The network's weights.
        momentum: A running mean of gradients, one for each of the weights.
        key: The state of the random number generator that the next step will use.
    """

    step: int
    params: Tree
    momentum: Tree
    key: torch.Tensor


pytree.register_dataclass(TrainState)

network = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
network.to("meta")  # the architecture, without weights: those are in the state


def initial_state(seed: int) -> TrainState:
    """The state before the first step."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(spec.shape, generator=generator) / spec.shape[-1] ** 0.5
        for name, spec in network.named_parameters()
    }
    return TrainState(
        step=0,
        params=params,
        momentum={name: torch.zeros_like(value) for name, value in params.items()},
        key=generator.get_state(),
    )


def loss_fn(params: Tree, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the network with the given weights."""
    return torch.nn.functional.cross_entropy(functional_call(network, params, (images,)), labels)


def train_step(
    state: TrainState, images: torch.Tensor, labels: torch.Tensor
) -> tuple[TrainState, float]:
    """The next state, and the loss on a random batch."""
    generator = torch.Generator()
    generator.set_state(state.key)
    batch = torch.randint(len(labels), (64,), generator=generator)
    gradients, loss = grad_and_value(loss_fn)(state.params, images[batch], labels[batch])
    momentum = {name: 0.9 * state.momentum[name] + gradients[name] for name in gradients}
    params = {name: value - 0.05 * momentum[name] for name, value in state.params.items()}
    next_state = TrainState(
        step=state.step + 1, params=params, momentum=momentum, key=generator.get_state()
    )
    return next_state, loss.item()


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images of handwritten digits, 64 numbers each, and their labels."""
    data: Any = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def train(workdir: Path, num_steps: int, save_interval_steps: int) -> TrainState:
    """Trains from the latest checkpoint, if there is one; returns the last state."""
    state = initial_state(seed=0)
    with fc.CheckpointManager(
        workdir,
        save_policy=fc.policies.every(save_interval_steps),
        keep_policy=fc.policies.LatestN(2),
    ) as manager:
        if (latest := manager.latest_step()) is not None:
            state = manager.restore(latest, {"state": state})["state"]
            print(f"resumed at step {state.step}")
        while state.step < num_steps:
            state, loss = train_step(state, *digits())
            if manager.save(state.step, {"state": state}):
                print(f"saving step {state.step}: loss {loss:.4f}")
    return state


def main(args: list[str]) -> None:
    if args[1:]:
        raise app.UsageError(f"Unknown arguments: {' '.join(args[1:])}")
    values = flags.FLAGS
    train(Path(values.workdir), values.num_steps, values.save_interval_steps)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/functional", "Where the checkpoints are.")
    flags.DEFINE_integer("num_steps", 200, "Steps to train.", lower_bound=1)
    flags.DEFINE_integer("save_interval_steps", 50, "Steps between checkpoints.", lower_bound=1)
    app.run(main)
