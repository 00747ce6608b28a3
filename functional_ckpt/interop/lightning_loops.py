"""The state of Lightning's loops and hyperparameters, as a step holds them. Free of Lightning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.core.tree import flatten
from functional_ckpt.policies.progress import Progress

_log = logging.getLogger("functional_ckpt")

# In the state of a `torchdata.StatefulDataLoader`.
FINISHED = "_iterator_finished"
_HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")


def at_epoch_end(progress: Progress) -> Progress:
    """Returns the progress at the end of its epoch, which is the start of the next."""
    return Progress(
        epoch=progress.epoch + 1,
        batch=progress.batch,
        batch_in_epoch=0,
        batches_per_epoch=progress.batches_per_epoch,
    )


def is_epoch_over(trainer: Any) -> bool:
    """Returns whether the batch that was trained last was the last one of its epoch."""
    batches = trainer.fit_loop.epoch_loop.batch_progress
    return bool(batches.is_last_batch) or batches.current.ready >= trainer.num_training_batches


def begin_epoch(loops: dict[str, Any]) -> None:
    """Sets the counts of batches to the start of an epoch.

    Lightning does so after `on_train_epoch_start`; a run that restarts in between would take the
    batches of the epoch before for those of the next, and skip it.
    """
    for name in list(loops):
        if name.startswith("epoch_loop.") and name.endswith("progress"):
            _zero_current(loops[name])
    batches = loops["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    for state in loops["state_dict"].get("combined_loader", ()):
        # Lightning draws as many batches as there are: the loader has not seen its end.
        if FINISHED in state:
            state[FINISHED] = True


def _zero_current(progress: Any) -> None:
    if not isinstance(progress, dict):
        return
    for key, value in cast("dict[str, Any]", progress).items():
        if key == "current":
            for count in value:
                value[count] = 0
        else:
            _zero_current(value)


def reopen_epoch(loops: dict[str, Any]) -> None:
    """Takes back that an epoch is over which was stopped in the middle (`max_steps`)."""
    for counts in loops["epoch_progress"].values():
        counts["processed"] -= 1
        counts["completed"] -= 1


def storable(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checkpoint with hyperparameters that no array or plain value can hold as text."""
    changed = dict(checkpoint)
    for name in _HYPER_PARAMETERS:
        values = changed.get(name)
        if not isinstance(values, Mapping):
            continue
        known = cast("Mapping[Any, Any]", values)
        stored = {key: value if is_storable(value) else str(value) for key, value in known.items()}
        as_text = sorted(str(key) for key in known if stored[key] is not known[key])
        if as_text:
            _log.warning("%s: %s saved as text", name, ", ".join(as_text))
        changed[name] = stored
    return changed


def is_storable(value: object) -> bool:
    """Returns whether a step can hold a value."""
    try:
        flatten.flatten(value, item="hyper_parameters")
    except errors.UnsupportedLeafError:
        return False
    return True
