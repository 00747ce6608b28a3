"""`transformers.Trainer` with a checkpoint manager: a callback that saves, a call that resumes.

    manager = fc.CheckpointManager("run/ckpt", save_policy=fc.policies.every(500))
    trainer = transformers.Trainer(..., callbacks=[ManagerCallback(manager)])
    train(trainer, manager)                     # from the latest step, if there is one

Set `save_strategy="no"` in the `TrainingArguments`: the Trainer's own checkpoints are not needed.
The extra `transformers` installs the imports of this module.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.handlers import Json, Module, Optimizer, Rng, Stateful, classes
from functional_ckpt.interop.trainer_rng import is_of_this_many, set_generators
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

_log = logging.getLogger("functional_ckpt")

_STATE_FILE = "trainer_state.json"
_NON_FINITE = "non_finite_float"
_PROCESS_FIELDS = ("is_local_process_zero", "is_world_process_zero")


class ManagerCallback(trainer_callback.TrainerCallback):
    """Saves the model, its optimizer and scheduler, the random numbers and the Trainer's state.

    A step is one update of the weights, as in the Trainer. The manager's policies decide. A step is
    saved after everything that the Trainer logs and measures at it, the evaluation at the end of an
    epoch included; its latest numbers are the metrics of the step. The last step of a training is
    saved regardless of the policies, as the Trainer itself does. After SIGTERM
    (`policies.Preemption()`) the training stops once the step is saved.

    Start the training with `train`: it gives the callback the state of the other callbacks and the
    gradient scaler, which the Trainer's events lack.

    Args:
        manager: Directory and policies.
        items: Additional items to save.
        save_last: Whether the end of the training is saved in any case.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        items: Mapping[str, Any] | None = None,
        *,
        save_last: bool = True,
    ) -> None:
        self._manager = manager
        self._items = dict(items or {})
        self._save_last = save_last
        self._due = False
        self._batches_per_epoch: int | None = None
        self._trainer: Any = None

    def bind(self, trainer: Any) -> None:
        """Takes the Trainer whose training starts, for the state that its events lack."""
        self._trainer = trainer

    def uses(self, manager: CheckpointManager) -> bool:
        """Returns whether the callback saves with this manager."""
        return self._manager is manager

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learns how long an epoch is.

        Raises:
            UsageError: The training was not started by `train`, and some of its state would be
                left out of every step; or FSDP1 shards the model.
        """
        self._due = False
        _check_model(kwargs.get("model"))
        num_batches = _num_batches(kwargs.get("train_dataloader"))
        if num_batches is not None:
            self._batches_per_epoch = -(-num_batches // args.gradient_accumulation_steps)
        if self._trainer is None:
            stateful = sorted(set(state.stateful_callbacks) - {"TrainerControl"})
            if stateful or args.fp16:
                raise errors.UsageError(
                    f"The state of {', '.join(stateful) or 'the gradient scaler'} can only be "
                    "saved in a training that was started by "
                    "functional_ckpt.interop.trainer.train(trainer, manager); got trainer.train()."
                )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights were updated; the Trainer's logs of this step follow."""
        self._due = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything that belongs to the step before is over."""
        self._save(args, state, control, kwargs)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything that belongs to the epoch before is over, and no data were drawn since."""
        self._save(args, state, control, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves the last step."""
        self._save(args, state, control, kwargs, is_last=True)

    def _save(
        self,
        args: Any,
        state: Any,
        control: Any,
        parts: Mapping[str, Any],
        *,
        is_last: bool = False,
    ) -> None:
        if not self._due:
            return
        self._due = False
        step = int(state.global_step)
        self._manager.save(
            step,
            {
                **self._items,
                **_items(parts, self._trainer),
                # Rank 0 keeps the log: how long an evaluation took differs between ranks.
                "trainer": Json(_state_json(state, self._trainer), replicated="unchecked"),
            },
            metrics=_numbers(state),
            progress=self._progress(args, state),
            force=is_last and self._save_last,
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

    Epoch, position in the data, log and callbacks' state resume by the Trainer's rules; weights,
    optimizer, scheduler, gradient scaler and random numbers are the step's.

    Args:
        trainer: The Trainer, with a `ManagerCallback` among its callbacks.
        manager: The callback's.
        arguments: Other arguments of `trainer.train`. With `resume_from_checkpoint`, a folder of
            the Trainer, the run resumes from there instead.

    Raises:
        UsageError: No `ManagerCallback` of this manager is among the callbacks.
        MismatchError: The step is of another model or optimizer; nothing was touched.
    """
    target: Any = trainer
    bound = [
        callback
        for callback in target.callback_handler.callbacks
        if isinstance(callback, ManagerCallback) and callback.uses(manager)
    ]
    if not bound:
        raise errors.UsageError(
            "train(trainer, manager) needs a ManagerCallback(manager) among the Trainer's "
            "callbacks; got none of this manager."
        )
    for callback in bound:
        callback.bind(target)
    if manager.is_saving_in_progress():
        manager.wait_until_finished()  # a training before this one, in the same process
    step = manager.latest_step()
    if arguments.get("resume_from_checkpoint") or step is None:
        return target.train(**arguments)
    arguments.pop("resume_from_checkpoint", None)
    saved = _restored_state(manager.restore(step, only="trainer")["trainer"])
    if not is_of_this_many(manager, step):
        _log.warning(
            "Step %d was saved by another number of processes than %d: random numbers are derived "
            "from those of the step, and the Trainer skips as many batches of each process.",
            step,
            manager.num_ranks,
        )

    # The Trainer reads its state and where it is in the data from a folder, and the rest from
    # files that are not there: the step has it.
    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    def restore(folder: Any) -> None:
        _restore(target, manager, step)

    def restore_rng(folder: Any) -> None:
        set_generators(manager, step)

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
    items = {name: item for name, item in _items(parts, trainer).items() if name != "rng"}
    if "scaler" in items and "scaler" not in manager.metadata(step).items:
        del items["scaler"]  # saved without mixed precision: the scaler starts as new
    manager.restore(step, items)


def _items(parts: Mapping[str, Any], trainer: Any) -> dict[str, Any]:
    """Returns the items of a Trainer's parts, as its callbacks are given them."""
    model, optimizer = parts["model"], parts["optimizer"]
    _check_model(model)
    items: dict[str, Any] = {
        "model": Module(model),
        # accelerate wraps it.
        "optimizer": Optimizer(getattr(optimizer, "optimizer", optimizer), model),
        "scheduler": Stateful(parts["lr_scheduler"]),
        "rng": Rng(),
    }
    scaler = None if trainer is None else trainer.accelerator.scaler
    if scaler is not None:
        items["scaler"] = Stateful(scaler)
    return items


def _check_model(model: Any) -> None:
    if classes.is_a(model, classes.FSDP1):
        raise errors.UsageError(
            "FSDP1 keeps a model in flat pieces without names, which cannot be saved as steps. Use "
            'FSDP2: fsdp_config={"version": 2, ...} in the TrainingArguments, or fsdp_version: 2 '
            "in the configuration of accelerate."
        )


def _num_batches(loader: Any) -> int | None:
    """Returns the length of a loader; None for a stream, whose `len` raises `TypeError`."""
    try:
        return len(loader)
    except TypeError:
        return None


def _state_json(state: Any, trainer: Any) -> dict[str, Any]:
    """Returns the Trainer's state, with that of its callbacks as they are now."""
    record = dataclasses.asdict(state)
    callbacks: dict[str, Any] = {
        name: value
        for name, value in record["stateful_callbacks"].items()
        if isinstance(value, (dict, list))
    }
    if trainer is not None:
        callbacks |= _callback_states(trainer.callback_handler.callbacks)
    for name in _PROCESS_FIELDS:  # of the process, not of the training
        record.pop(name, None)
    return _to_json({**record, "stateful_callbacks": callbacks})


def _callback_states(all_callbacks: Sequence[Any]) -> dict[str, Any]:
    """State by class; a list of states where several callbacks are of one class."""
    states: dict[str, list[Any]] = {}
    for callback in all_callbacks:
        if isinstance(callback, trainer_callback.ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: each[0] if len(each) == 1 else each for name, each in states.items()}


def _to_json(value: Any) -> Any:
    """Returns a copy for JSON: a NaN or an infinity, as in logs, becomes a small record."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(each) for key, each in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(each) for each in cast("Sequence[Any]", value)]
    if not isinstance(value, (bool, int, float, str, type(None))) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {_NON_FINITE: str(value)}
    return value


def _restored_state(value: Any) -> Any:
    """Returns the opposite of `_to_json`."""
    if isinstance(value, dict):
        record = cast("dict[str, Any]", value)
        if set(record) == {_NON_FINITE}:
            return float(record[_NON_FINITE])
        return {key: _restored_state(each) for key, each in record.items()}
    if isinstance(value, list):
        return [_restored_state(each) for each in cast("list[Any]", value)]
    return value


def _numbers(state: Any) -> dict[str, float]:
    """Returns the logs and metrics of this step."""
    found: dict[str, float] = {}
    for entry in state.log_history:
        if entry.get("step") == state.global_step:
            numbers = {key: _to_json(value) for key, value in entry.items() if key != "step"}
            found.update({k: v for k, v in numbers.items() if isinstance(v, (int, float))})
    return found
