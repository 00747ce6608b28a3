"""Lightning with a checkpoint manager: a callback that saves, and the plugin that does the I/O.

    io = ManagerIO("run/ckpt", save_policy=fc.policies.every(500))
    trainer = lightning.pytorch.Trainer(
        plugins=[io], callbacks=[SaveCallback(io)], enable_checkpointing=False
    )
    trainer.fit(module, loader, ckpt_path=io.latest())      # None where there is no step

A run that was saved at the end of an epoch (`policies.every("1ep")`) resumes exactly. Within an
epoch Lightning restarts the epoch's data, unless the loader saves its position. The processes of a
replicating strategy (DDP) save together: give `ManagerIO` the arguments of the manager, so that the
manager is made after the process group. The extra `lightning` installs its imports.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import SingleProcess
from functional_ckpt.handlers import PyTree, Rng
from functional_ckpt.interop import lightning_loops as loops
from functional_ckpt.interop.lightning_loaders import LOADERS, LoaderPositions, has_stateful_loaders
from functional_ckpt.interop.lightning_signals import Signals
from functional_ckpt.interop.trainer_rng import set_generators
from functional_ckpt.manager import CheckpointManager
from functional_ckpt.policies.progress import Progress

try:
    from lightning.pytorch import callbacks
    from lightning.pytorch.plugins import io as lightning_io
    from lightning.pytorch.utilities.exceptions import SIGTERMException
except ImportError as error:
    raise ImportError(
        "functional_ckpt.interop.lightning needs lightning: pip install "
        "'functional-ckpt[lightning]'"
    ) from error

__all__ = ["ManagerIO", "SaveCallback"]

_ITEM = "lightning"


class ManagerIO(lightning_io.CheckpointIO):
    """Lightning's checkpoints as steps: the dict it makes is the item `lightning`, a pytree.

    A path is the manager's directory and the number of the step. Any other path (of the Trainer's
    `save_checkpoint("final.ckpt")`, of a tuner, of a checkpoint that Lightning wrote) goes to
    Lightning's own `TorchCheckpointIO`.

    Args:
        manager: A manager; or its directory, with the manager's arguments. In the latter case the
            manager is made when training starts and closed when it ends.
        options: The manager's arguments, with a directory.
    """

    def __init__(self, manager: CheckpointManager | str | os.PathLike[str], **options: Any) -> None:
        if isinstance(manager, CheckpointManager) and options:
            raise errors.UsageError(
                f"ManagerIO(manager) takes no options beside a manager; got {sorted(options)}."
            )
        self._manager = manager if isinstance(manager, CheckpointManager) else None
        self._directory: Any = None if self._manager is not None else manager
        self._options = options
        self._other = lightning_io.TorchCheckpointIO()
        self.is_requeued = False

    @property
    def manager(self) -> CheckpointManager:
        """The manager; one that was given as a directory is made now."""
        if self._manager is None:
            self._manager = CheckpointManager(self._directory, **self._options)
        return self._manager

    def latest(self) -> str | None:
        """Returns the path of the latest step, for `fit(ckpt_path=...)`; None if there is none."""
        if self._manager is not None:
            return self._path_of_latest(self._manager)
        known = {name: self._options[name] for name in ("step_name",) if name in self._options}
        alone = SingleProcess()  # each process looks for itself: there may be no group yet
        with CheckpointManager(
            self._directory, read_only=True, coordinator=alone, **known
        ) as looking:
            return self._path_of_latest(looking)

    def path(self, step: int) -> str:
        """Returns the path by which Lightning means a step."""
        return _join(self._root(), step)

    def save_step(
        self,
        step: int,
        checkpoint: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        progress: Progress | None = None,
        loaders: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves Lightning's checkpoint as a step; every process calls it, with its own loaders."""
        # Replicas are equal but for the buffers of their own batches: those of rank 0 count.
        item = PyTree(loops.storable(checkpoint), replicated="unchecked")
        items: dict[str, Any] = {_ITEM: item, "rng": Rng()}
        if loaders:
            items[LOADERS] = PyTree(loaders, per_rank=True)
        self.manager.save(step, items, metrics=metrics or None, progress=progress, force=True)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Saves the checkpoint as a step, in the background, or as Lightning does elsewhere.

        Raises:
            UsageError: A step of several processes, which Lightning asks one process for; or
                `storage_options` for a step.
        """
        step = self._step(path)
        if step is None:
            # A step is saved: Lightning's own file for SLURM is not needed.
            if not (self.is_requeued and os.path.basename(path).startswith("hpc_ckpt_")):
                self._other.save_checkpoint(checkpoint, path, storage_options)
            return
        if storage_options is not None:
            raise errors.UsageError("storage_options: a manager has its own storage.")
        if (num_ranks := self.manager.num_ranks) > 1:
            raise errors.UsageError(
                f"{path}: a step of {num_ranks} processes is saved by SaveCallback, on all of "
                "them; Lightning's save_checkpoint reaches one.",
                path=str(path),
            )
        self.save_step(step, checkpoint)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Returns the checkpoint of a step, on the CPU; or a file of Lightning, without pickles."""
        step = self._step(path)
        if step is None:
            return self._other.load_checkpoint(path, map_location, weights_only)
        return self.manager.restore(step, only=_ITEM)[_ITEM]

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a step, or a checkpoint of Lightning's own."""
        step = self._step(path)
        if step is None:
            self._other.remove_checkpoint(path)
        else:
            self.manager.delete(step)

    def teardown(self) -> None:
        """Waits for the commit under way; closes a manager that was made here."""
        if self._manager is None:
            return
        if self._directory is None:
            self._manager.wait_until_finished()
        else:
            self._manager.close()
            self._manager = None

    def _root(self) -> str:
        if self._manager is not None:
            return self._manager.directory
        text = os.fspath(self._directory)
        return text.rstrip("/") if "://" in text else os.path.abspath(os.path.expanduser(text))

    def _path_of_latest(self, manager: CheckpointManager) -> str | None:
        step = manager.latest_step()
        return None if step is None else _join(manager.directory, step)

    def _step(self, path: Any) -> int | None:
        """Returns the step of a path; None for a path outside the manager's directory."""
        text, root = os.fspath(path), self._root()
        if "://" not in text:
            text = os.path.abspath(text)
        folder, _, name = text.rpartition("/")
        if folder != root:
            return None
        if not name.isdigit():
            raise errors.UsageError(
                f"{path}: expected {root} and the number of a step, as ManagerIO.path(step) gives "
                "it; Lightning's own checkpoints need another directory.",
                path=text,
            )
        return int(name)


class SaveCallback(callbacks.Callback):
    """Saves a step when the manager's policies accept it, and at the end of the training.

    A step is an update of the weights. It is saved once everything that belongs to it is over:
    before the next batch; at the end of an epoch before the next epoch starts, so that a resumed
    run calls `on_train_epoch_start` and draws the same data; at the end of the training; when the
    training is ended by SIGTERM, SLURM's requeue signal or an exception.

    Args:
        io: The Trainer's plugin.
        save_last: Whether the end of the training is saved regardless of the policies.
    """

    def __init__(self, io: ManagerIO, *, save_last: bool = True) -> None:
        self._io = io
        self._save_last = save_last
        self._resumed: int | None = None
        self._seen: int | None = None
        self._due: Progress | None = None
        self._decided: bool | None = None  # whether the step that is due is saved; None: not asked
        self._is_preempted = False
        self._restarts: int | None = None
        self._loaders = LoaderPositions()
        self._signals = Signals()

    def state_dict(self) -> dict[str, Any]:
        """Returns the batches that were drawn in advance of the step."""
        return {"drawn": self._loaders.drawn} if self._loaders.drawn else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the batches of a step for the start of the training."""
        self._loaders.drawn = state_dict["drawn"]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks that all processes save together.

        Raises:
            UsageError: The manager was made before the processes knew each other, or the strategy
                shards the model.
        """
        if stage != "fit":
            return
        strategy = type(trainer.strategy).__name__
        if any(word in strategy for word in ("FSDP", "ModelParallel", "DeepSpeed")):
            raise errors.UsageError(
                f"{strategy} shards the model, which Lightning's checkpoint of one process cannot "
                "hold. Save fc.Module(...) and fc.Optimizer(...) items with a manager of your own "
                "in a callback and restore them in on_train_start (the Trainer then counts epochs, "
                "and shuffles, from 0), or use a DDP strategy."
            )
        num_ranks = self._io.manager.num_ranks
        if num_ranks != trainer.world_size:
            raise errors.UsageError(
                f"The Trainer has {trainer.world_size} processes, the manager {num_ranks}: it was "
                "made before the processes knew each other. Give ManagerIO the manager's directory "
                "and arguments; it makes the manager then."
            )
        self._signals = Signals(waits_for_signal=self._io.manager.waits_for_signal)
        self._loaders.watch(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves Lightning's loop as it was."""
        self._loaders.unwatch(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Gives each process the positions of its loaders, in a run that resumes.

        At the end of an epoch also the random generators: Lightning draws the first data of the
        epoch before it calls anything else.
        """
        path, self._is_preempted = trainer.ckpt_path, False
        self._resumed = self._restarts = None
        self._due = self._decided = None
        self._io.is_requeued = False
        step = self._io._step(path) if path else None
        if step is None:
            return
        # `estimated_stepping_batches` in `configure_optimizers` has started the loaders, before the
        # generators and the loops are restored: Lightning starts them once more.
        trainer.fit_loop._combined_loader = None
        manager = self._io.manager
        self._loaders.load(manager, step, trainer._checkpoint_connector._loaded_checkpoint)
        progress = manager.metadata(step).progress
        if progress is not None and progress.batch_in_epoch == 0:
            set_generators(manager, step)
            self._restarts = step
        else:
            self._resumed = step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Puts the loaders where the step has them, and takes the signals from Lightning."""
        self._seen = int(trainer.global_step)
        if self._resumed is not None and has_stateful_loaders(trainer):
            self._loaders.restart(trainer)
        self._signals.take(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Saves the state at the end of the previous epoch; if resumed there, restores it."""
        if self._restarts is not None:
            step, self._restarts = self._restarts, None
            self._loaders.restart(trainer, lambda: set_generators(self._io.manager, step))
            return
        self._end_epoch()
        self._save(trainer)
        if trainer.current_epoch > 0:  # Lightning starts the loaders after this
            self._loaders.note_start(trainer)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves the state so far; if resumed within an epoch, restores random generators."""
        if self._resumed is not None:
            set_generators(self._io.manager, self._resumed)
            self._loaders.set_generators(trainer)
            self._resumed = None
        self._save(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes how far the training is, where the batch has updated the weights."""
        step, num_batches = int(trainer.global_step), trainer.num_training_batches
        if step == self._seen:
            return
        self._seen = step
        self._due = Progress(
            epoch=int(trainer.current_epoch),
            batch=int(trainer.fit_loop.epoch_loop.batch_progress.total.ready),
            batch_in_epoch=batch_idx + 1,
            batches_per_epoch=int(num_batches) if num_batches != float("inf") else None,
        )
        self._decided = None
        if has_stateful_loaders(trainer) and not loops.is_epoch_over(trainer):
            # A loader's position is saved before the next batch is drawn.
            self._decided = self._wants(step, self._due)
            if self._decided:
                self._loaders.note(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Saves the state after the last batch."""
        if self._is_preempted:
            self._due = None  # saved already; Lightning has run one more batch since
        if loops.is_epoch_over(trainer):
            self._end_epoch()
        self._save(trainer, force=self._save_last, is_end=True)
        if self._is_preempted and self._signals.is_requeue_wanted(trainer):
            self._io.manager.wait_until_finished()
            self._io.is_requeued = True
            self._signals.requeue()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Saves the last complete update, if all processes are at the same one."""
        is_whole = self._seen == int(trainer.global_step)
        if not is_whole or self._due is None:
            return
        if trainer.world_size > 1 and not isinstance(exception, SIGTERMException):
            return  # other processes may be in the middle of an update
        if loops.is_epoch_over(trainer):
            self._end_epoch()
        try:
            self._save(trainer, force=True)
            self._io.manager.wait_until_finished()
        except errors.CheckpointError as error:
            exception.add_note(f"The last step could not be saved: {error}")

    def _end_epoch(self) -> None:
        """Notes that the step that is due is the last one of its epoch."""
        if self._due is not None:
            self._due, self._decided = loops.at_epoch_end(self._due), None

    def _wants(self, step: int, progress: Progress) -> bool:
        """Returns whether the policies or a signal want the step."""
        manager = self._io.manager
        is_wanted = manager.should_save(step, progress=progress)
        is_asked = self._signals.is_requeue_asked and manager.num_ranks == 1
        self._is_preempted = manager.reached_preemption(step) or is_asked
        return is_wanted or self._is_preempted

    def _save(self, trainer: Any, *, force: bool = False, is_end: bool = False) -> None:
        step, progress = int(trainer.global_step), self._due
        decided, self._due, self._decided = self._decided, None, None
        if progress is None:
            return
        if decided is None:
            decided = self._wants(step, progress)
        if force or decided:
            metrics = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if value.numel() == 1
            }
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
            fit_loop = checkpoint["loops"]["fit_loop"]
            if progress.batch_in_epoch == 0:
                loops.begin_epoch(fit_loop)
            elif is_end:
                loops.reopen_epoch(fit_loop)
            own = self._loaders.take(
                trainer, checkpoint, self.state_key, is_epoch_over=progress.batch_in_epoch == 0
            )
            self._io.save_step(step, checkpoint, metrics=metrics, progress=progress, loaders=own)
        self._loaders.forget()
        if self._is_preempted:
            trainer.should_stop = True


def _join(root: str, step: int) -> str:
    return f"{root.rstrip('/')}/{step}"
