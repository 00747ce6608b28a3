"""`transformers.Trainer` with a checkpoint manager: a callback that saves, and a way to go on.

    manager = fc.CheckpointManager("run/ckpt", save_policy=fc.policies.every(500))
    trainer = transformers.Trainer(..., callbacks=[ManagerCallback(manager)])
    train(trainer, manager)                     # from the latest step, if there is one

Give the `TrainingArguments` `save_strategy="no"`: the Trainer need not write checkpoints of its
own. The extra `transformers` brings what this module imports.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from functional_ckpt import errors
from functional_ckpt.handlers import Json, Module, Optimizer, Rng, Stateful
from functional_ckpt.manager import CheckpointManager
from functional_ckpt.policies.progress import Progress

try:
    import transformers
    from transformers import trainer_callback
except ImportError as error:
    raise ImportError(
        "functional_ckpt.interop.trainer needs transformers: pip install "
        "'functional-ckpt[transformers]'"
    ) from error

__all__ = ["ManagerCallback", "train"]

_STATE_FILE = "trainer_state.json"


class ManagerCallback(trainer_callback.TrainerCallback):
    """Saves the model, its optimizer and scheduler, the random numbers and the Trainer's state.

    A step is what the Trainer calls so: one update of the weights. The manager's policies decide; a
    step is saved after what the Trainer logs and measures at it, and its latest numbers are the
    metrics of the step. After SIGTERM (`policies.Preemption()`) the training stops once it is
    saved.

    Args:
        manager: Where to, when, and what is kept.
        items: What else to save.
    """

    def __init__(self, manager: CheckpointManager, items: Mapping[str, Any] | None = None) -> None:
        self._manager = manager
        self._items = dict(items or {})
        self._due = False
        self._batches_per_epoch: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learns how long an epoch is."""
        del control
        loader = kwargs.get("train_dataloader")
        if loader is not None and hasattr(loader, "__len__"):
            num_batches = len(loader)
            self._batches_per_epoch = -(-num_batches // args.gradient_accumulation_steps)
        self._due = False
        del state

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights were updated; what the Trainer logs at this step is still to come."""
        del args, state, control, kwargs
        self._due = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All of the step before is over."""
        self._save(args, state, control, kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All of the last step of the epoch is over."""
        self._save(args, state, control, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step of a training that was stopped within an epoch."""
        self._save(args, state, control, kwargs)

    def _save(self, args: Any, state: Any, control: Any, parts: Mapping[str, Any]) -> None:
        if not self._due:
            return
        self._due = False
        step = int(state.global_step)
        self._manager.save(
            step,
            {**self._items, **_items(parts), "trainer": Json(_state_json(state))},
            metrics=_numbers(state),
            progress=self._progress(args, state),
        )
        if self._manager.reached_preemption(step):
            control.should_training_stop = True

    def _progress(self, args: Any, state: Any) -> Progress:
        step = int(state.global_step)
        epoch = 0 if self._batches_per_epoch is None else step // self._batches_per_epoch
        return Progress(
            epoch=epoch,
            batch=step,
            batch_in_epoch=step - epoch * (self._batches_per_epoch or 0),
            sample=step
            * args.train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size,
            token=int(state.num_input_tokens_seen),
            batches_per_epoch=self._batches_per_epoch,
            max_duration=f"{state.max_steps}ba" if state.max_steps > 0 else None,
        )


def train(trainer: transformers.Trainer, manager: CheckpointManager, **arguments: Any) -> Any:
    """`trainer.train()`, from the manager's latest step if there is one.

    Epoch, place in the data, log and callbacks' state go on by the Trainer's own rules; weights,
    optimizer, scheduler and random numbers are the step's.

    Args:
        trainer: The Trainer, with a `ManagerCallback` among its callbacks.
        manager: The callback's.
        arguments: Further arguments of `trainer.train`.

    Raises:
        UsageError: `resume_from_checkpoint` is among the arguments.
        MismatchError: The step is of another model or optimizer; nothing was touched.
    """
    if "resume_from_checkpoint" in arguments:
        raise errors.UsageError(
            "train() goes on from the manager's latest step: leave resume_from_checkpoint out."
        )
    step = manager.latest_step()
    if step is None:
        return trainer.train(**arguments)
    saved = manager.restore(step, only="trainer")["trainer"]
    target: Any = trainer

    # The Trainer reads its state and where it is in the data from a folder, and the rest from
    # files that are not there: the step has it.
    def nothing(*args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def restore(folder: Any) -> None:
        del folder
        _restore(target, manager, step)

    def restore_rng(folder: Any) -> None:
        del folder
        manager.restore(step, {"rng": Rng()})

    replaced = {
        "_load_from_checkpoint": nothing,
        "_load_optimizer_and_scheduler": restore,
        "_load_scaler": nothing,
        "_load_rng_state": restore_rng,
    }
    with tempfile.TemporaryDirectory() as folder:
        state = trainer_callback.TrainerState(**saved)
        state.save_to_json(os.path.join(folder, _STATE_FILE))
        vars(target).update(replaced)
        try:
            return target.train(resume_from_checkpoint=folder, **arguments)
        finally:
            for name in replaced:
                vars(target).pop(name, None)


def _restore(trainer: Any, manager: CheckpointManager, step: int) -> None:
    parts = {
        "model": trainer.model,
        "optimizer": trainer.optimizer,
        "lr_scheduler": trainer.lr_scheduler,
    }
    items = {name: item for name, item in _items(parts).items() if name != "rng"}
    manager.restore(step, items)


def _items(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The items of a Trainer's parts, as its callbacks are given them."""
    model, optimizer = parts["model"], parts["optimizer"]
    return {
        "model": Module(model),
        # accelerate wraps it.
        "optimizer": Optimizer(getattr(optimizer, "optimizer", optimizer), model),
        "scheduler": Stateful(parts["lr_scheduler"]),
        "rng": Rng(),
    }


def _state_json(state: Any) -> dict[str, Any]:
    record = dataclasses.asdict(state)
    callbacks = {
        name: value
        for name, value in record["stateful_callbacks"].items()
        if isinstance(value, (dict, list))
    }
    return {**record, "stateful_callbacks": callbacks}


def _numbers(state: Any) -> dict[str, float]:
    """What was logged and measured at this very step."""
    found: dict[str, float] = {}
    for entry in state.log_history:
        if entry.get("step") == state.global_step:
            found.update(
                {k: v for k, v in entry.items() if k != "step" and isinstance(v, (int, float))}
            )
    return found
