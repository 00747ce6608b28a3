"""torchtitan's manager over steps, driven as its trainer drives it: jobs for workers."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from titan_jobs import Training
from torch.distributed.tensor import DTensor

import functional_ckpt as fc


class TrainState:
    """The trainer's own state."""

    def __init__(self) -> None:
        self.step = 0
        self.ntokens_seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.ntokens_seen = state["step"], state["ntokens_seen"]


class Adapter:
    """Names of the hub: `up.weight` is `model.up.weight`."""

    fqn_to_index_mapping = None

    def __init__(self, hf_assets_path: str | None = None) -> None:
        self.hf_assets_path = hf_assets_path

    def to_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return {f"model.{name}": value for name, value in state.items()}

    def from_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix("model."): value for name, value in state.items()}

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> Any:
        return dcp.HuggingFaceStorageReader(path)


class Run:
    """A training with a manager, as torchtitan's trainer has one.

    Args:
        folder: The checkpoint folder.
        seed: Of the new objects.
        parts: The number of model parts, as stages of a pipeline.
        adapter: Whether the model has an adapter to the hub's names.
        keys: torchtitan's configuration.
    """

    def __init__(
        self, folder: str, seed: int = 0, parts: int = 1, adapter: Any = None, **keys: Any
    ) -> None:
        from functional_ckpt.interop.torchtitan import CheckpointManager

        self.training = Training(seed)
        self.state = TrainState()
        items = self.training.items
        named = items["model"].model[0]
        model_parts = [named]
        if parts == 2:
            model_parts = [torch.nn.ModuleDict({name: named[name]}) for name in named]
        config = CheckpointManager.Config(**{"enable": True, "interval": 2, **keys})
        base, name = os.path.split(folder)
        config.folder = name
        self.manager: Any = config.build(
            dataloader=items["dataloader"],
            model_parts=model_parts,
            optimizers=items["optimizer"],
            lr_schedulers=items["lr_scheduler"],
            states={"train_state": self.state},
            sd_adapter=adapter,
            base_folder=base,
        )

    def train(self, until: int, last: int | None = None) -> list[int]:
        """Trains to a step; returns the steps that were saved."""
        saved: list[int] = []
        while self.state.step < until:
            self.manager.maybe_wait_for_staging()
            self.training.train(1)
            torch.rand(1)
            self.state.step += 1
            self.state.ntokens_seen += 4
            if self.manager.save(self.state.step, last_step=self.state.step == last):
                saved.append(self.state.step)
        return saved

    def values(self) -> list[Any]:
        """Returns everything that a resumed run must have."""
        return [*self.training.values(), self.state.state_dict(), torch.rand(2).tolist()]

    def weights(self) -> list[Any]:
        """Returns the full weights."""
        state: Any = self.training.items["model"].state_dict()
        return [
            (value.full_tensor() if isinstance(value, DTensor) else value).tolist()
            for value in state.values()
        ]


def whole(folder: str, steps: int, keys: dict[str, Any]) -> list[Any]:
    """Trains from the latest step to `steps`; returns the saved steps and the values."""
    run = Run(folder, **keys)
    found = run.manager.load()
    saved = run.train(steps)
    run.manager.maybe_wait_for_saving()
    values = run.values()
    run.manager.close()
    return [found, saved, values]


def listed(folder: str) -> list[str]:
    """Returns the names in a folder."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def last(folder: str, keys: dict[str, Any]) -> list[Any]:
    """Trains 3 steps, the last one with `last_step`; returns the weights."""
    run = Run(folder, adapter=Adapter(), **keys)
    run.manager.load()
    run.train(3, last=3)
    weights = run.weights()
    run.manager.close()
    return weights


def initial(folder: str, keys: dict[str, Any], assets: str | None = None) -> list[Any]:
    """Starts in a new folder; returns whether a checkpoint was loaded, weights and state."""
    run = Run(folder, seed=7, adapter=Adapter(assets), **keys)
    before = run.weights()
    found = run.manager.load(keys.get("load_step", -1))
    outcome = [found, run.weights(), run.state.state_dict(), run.weights() == before]
    run.manager.close()
    return outcome


def native(folder: str) -> list[Any]:
    """Saves with torchtitan's own manager; returns the weights."""
    from torchtitan.components.checkpointer import CheckpointManager

    run = Run(f"{folder}-unused", enable=False)
    base, name = os.path.split(folder)
    config = CheckpointManager.Config(enable=True, folder=name, interval=1, keep_latest_k=0)
    items = run.training.items
    manager: Any = config.build(
        dataloader=items["dataloader"],
        model_parts=items["model"].model,
        optimizers=items["optimizer"],
        lr_schedulers=items["lr_scheduler"],
        states={"train_state": run.state},
        sd_adapter=None,
        base_folder=base,
    )
    run.training.train(2)
    run.state.step = 2
    manager.save(2)
    manager.close()
    return run.weights()


def seed(folder: str) -> list[Any]:
    """Saves a seed, as `create_seed_checkpoint` does."""
    run = Run(folder, export_dtype="bfloat16")
    run.manager.save(curr_step=0, last_step=True)
    run.manager.close()
    return run.weights()


def refused(folder: str, keys: dict[str, Any]) -> str:
    """Returns the error of a load."""
    run = Run(folder, seed=7, **keys)
    try:
        run.manager.load(keys.get("load_step", -1))
    except (fc.CheckpointError, ValueError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        run.manager.close()
        dist.barrier()
    return ""
