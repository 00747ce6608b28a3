"""A training with accelerate: `python accelerate_run.py DIRECTORY KILL_AT_STEP`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn

import functional_ckpt as fc
from functional_ckpt.interop.accelerate import Checkpointing

NUM_EPOCHS = 3


class Count:
    """An object that is registered for checkpointing."""

    def __init__(self) -> None:
        self.updates = 0

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]


def make_loader(kind: str) -> tuple[Any, dict[str, Any]]:
    """Returns a loader of 24 rows, and the options of its accelerator."""
    data = torch.randn(24, 4, generator=torch.Generator().manual_seed(3))
    rows = torch.utils.data.TensorDataset(data)
    options: dict[str, Any] = {}
    if kind != "shuffled":
        options = {kind: True}
    config = accelerate.DataLoaderConfiguration(**options)
    generator = torch.Generator().manual_seed(4) if kind == "shuffled" else None
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, generator=generator)
    return loader, {"dataloader_config": config}


def run(
    directory: Path,
    *,
    kind: str = "plain",
    kill_at: int | None = None,
    stop_at: int | None = None,
    accumulation: int = 1,
    save_policy: Any = 1,
    seed: int = 5,
) -> list[Any]:
    """Trains from the latest step to the end; returns the losses and the values.

    Args:
        directory: The manager's.
        kind: The kind of data loader.
        kill_at: The update in which the process is killed.
        stop_at: The update in which the training is left.
        accumulation: Batches of an update.
        save_policy: The manager's.
        seed: Of the new objects, which a resumed run replaces.
    """
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    loader, options = make_loader("shuffled" if kind == "plain" else kind)
    if kind == "plain":
        loader = torch.utils.data.DataLoader(loader.dataset, batch_size=4, shuffle=True)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulation, **options
    )
    torch.manual_seed(seed + accelerator.process_index)
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    count = Count()
    accelerator.register_for_checkpointing(count)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    losses: list[Any] = []
    with fc.CheckpointManager(directory, save_policy=save_policy) as manager:
        checkpointing = Checkpointing(accelerator, manager)
        step = checkpointing.load_state()
        assert step == count.updates
        torch.rand(3)  # a resumed run may draw other numbers until its first batch
        for _ in range(checkpointing.epoch(loader), NUM_EPOCHS):
            for (rows,) in checkpointing.skip_first_batches(loader):
                with accelerator.accumulate(model):
                    loss = (model(rows)[:, 0] - rows.sum(1)).square().mean()
                    accelerator.backward(loss)
                    if step == kill_at and accelerator.process_index == 0:
                        manager.wait_until_finished()
                        os.kill(os.getpid(), signal.SIGKILL)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                losses.append((step, rows.tolist(), loss.item()))
                if not accelerator.sync_gradients:
                    continue
                step += 1
                count.updates = step
                checkpointing.save_state(step)
                if step == stop_at:
                    return losses
            torch.rand(1)  # an evaluation
    state = [each.tolist() for each in accelerator.unwrap_model(model).state_dict().values()]
    return [*losses, state, scheduler.get_last_lr(), count.updates, torch.rand(2).tolist()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    outcome = run(Path(sys.argv[1]), kill_at=int(sys.argv[2]), save_policy=2)
    rank = int(os.environ.get("RANK", "0"))
    Path(sys.argv[1], f"outcome{rank}.txt").write_text(repr(outcome))
