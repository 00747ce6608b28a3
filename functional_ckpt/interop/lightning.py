"""Lightning with a checkpoint manager: a callback that saves, and the plugin that does the I/O.

    manager = fc.CheckpointManager("run/ckpt", save_policy=fc.policies.every(500))
    io = ManagerIO(manager)
    trainer = lightning.pytorch.Trainer(
        plugins=[io], callbacks=[SaveCallback(io)], enable_checkpointing=False
    )
    trainer.fit(module, loader, ckpt_path=io.latest())      # None where there is no step

Saved at the end of an epoch (`policies.every("1ep")`), a run goes on exactly. Within an epoch
Lightning itself begins the epoch's data anew, unless the loader keeps its own place. The extra
`lightning` brings what this module imports.
"""

from __future__ import annotations

import os
from typing import Any

from functional_ckpt import errors
from functional_ckpt.handlers import PyTree, Rng
from functional_ckpt.manager import CheckpointManager
from functional_ckpt.policies.progress import Progress

try:
    from lightning.pytorch import callbacks
    from lightning.pytorch.plugins import io as lightning_io
except ImportError as error:
    raise ImportError(
        "functional_ckpt.interop.lightning needs lightning: pip install "
        "'functional-ckpt[lightning]'"
    ) from error

__all__ = ["ManagerIO", "SaveCallback"]

_ITEM = "lightning"


class ManagerIO(lightning_io.CheckpointIO):
    """Lightning's checkpoints as steps: the dict it makes is the item `lightning`, a pytree.

    Works with whatever saves through Lightning; a path is the manager's directory and the number of
    the step. Random numbers are saved beside it.

    Args:
        manager: Where to, and what is kept. When to save is `SaveCallback`'s to ask.
    """

    def __init__(self, manager: CheckpointManager) -> None:
        self.manager = manager
        self._told: tuple[dict[str, Any], Progress | None] = ({}, None)

    def latest(self) -> str | None:
        """The path of the latest step, for `fit(ckpt_path=...)`; None where there is none."""
        step = self.manager.latest_step()
        return None if step is None else self.path(step)

    def path(self, step: int) -> str:
        """The path by which Lightning means a step."""
        return os.path.join(self.manager.directory, str(step))

    def tell(self, metrics: dict[str, Any], progress: Progress) -> None:
        """Says what to save with the next checkpoint besides what Lightning knows."""
        self._told = (metrics, progress)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Saves the checkpoint as a step; it is committed in the background."""
        if storage_options is not None:
            raise errors.UsageError("storage_options: a manager has its own storage.")
        (metrics, progress), self._told = self._told, ({}, None)
        items = {_ITEM: PyTree(checkpoint), "rng": Rng()}
        step = self._step(path)
        self.manager.save(step, items, metrics=metrics or None, progress=progress, force=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint of a step, on the CPU; never a pickle."""
        del map_location, weights_only
        return self.manager.restore(self._step(path), only=_ITEM)[_ITEM]

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a step."""
        self.manager.delete(self._step(path))

    def teardown(self) -> None:
        """Waits for the commit under way."""
        self.manager.wait_until_finished()

    def _step(self, path: Any) -> int:
        folder, name = os.path.split(os.path.abspath(path))
        if folder != self.manager.directory or not name.isdigit():
            raise errors.UsageError(
                f"{path}: expected {self.manager.directory} and the number of a step, as "
                "ManagerIO.path(step) gives it.",
                path=path,
            )
        return int(name)


class SaveCallback(callbacks.Callback):
    """Saves a step when the manager's policies say so.

    A step is saved once everything that belongs to it is over: before the next batch, or at the end
    of the training. Where Lightning saves after a batch its loops count the batch as still to come,
    and the schedulers of an epoch's end have not been stepped.

    Args:
        io: The Trainer's plugin.
    """

    def __init__(self, io: ManagerIO) -> None:
        self._io = io
        self._resumed: int | None = None
        self._due: Progress | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Notes which step the run goes on from."""
        del pl_module
        step = int(trainer.global_step)
        self._resumed = step if step and trainer.ckpt_path else None
        self._due = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves what is over; in a run that goes on, first sets the random numbers of its step."""
        del pl_module, batch, batch_idx
        if self._resumed is not None:
            self._io.manager.restore(self._resumed, {"rng": Rng()})
            self._resumed = None
        self._save(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes how far the training is."""
        del pl_module, outputs, batch
        step, num_batches = int(trainer.global_step), trainer.num_training_batches
        self._due = Progress(
            epoch=int(trainer.current_epoch),
            batch=max(step, batch_idx + 1),
            batch_in_epoch=batch_idx + 1,
            batches_per_epoch=int(num_batches) if num_batches != float("inf") else None,
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Saves what the last batch made."""
        del pl_module
        self._save(trainer)

    def _save(self, trainer: Any) -> None:
        manager, step = self._io.manager, int(trainer.global_step)
        progress, self._due = self._due, None
        if progress is None:
            return
        if manager.should_save(step, progress=progress):
            metrics = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if value.numel() == 1
            }
            self._io.tell(metrics, progress)
            trainer.save_checkpoint(self._io.path(step), weights_only=False)
        if manager.reached_preemption(step):
            trainer.should_stop = True
