"""`accelerate` with a checkpoint manager, instead of `save_state` and `load_state`.

    checkpointing = Checkpointing(accelerator, manager)
    step = checkpointing.load_state()               # 0 where there is no step
    for epoch in range(checkpointing.epoch(loader), num_epochs):
        for batch in checkpointing.skip_first_batches(loader):
            ...
            step += 1
            checkpointing.save_state(step)

The extra `transformers` installs accelerate.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from functional_ckpt import errors
from functional_ckpt.handlers import Module, Optimizer, Rng, Stateful, classes
from functional_ckpt.handlers.rng import RngHandler
from functional_ckpt.manager import CheckpointManager
from functional_ckpt.policies.progress import Progress
from functional_ckpt.saving.background import Commit

try:
    import accelerate
except ImportError as error:
    raise ImportError(
        "functional_ckpt.interop.accelerate needs accelerate: pip install "
        "'functional-ckpt[transformers]'"
    ) from error

__all__ = ["Checkpointing"]

_NUMBERED = re.compile(r"(model|optimizer|scheduler|custom)(_\d+)?|scaler")
_SHARDED = ("DEEPSPEED", "MEGATRON_LM", "XLA")


@dataclasses.dataclass(slots=True)
class _Position:
    """Where a loader is in its data.

    Attributes:
        epoch: The passes over the data that have ended.
        batch: The batches of the current pass that were given out.
        start: The random numbers at the start of the pass; None before the first batch.
        is_resumed: Whether the next pass is the rest of a restored one.
    """

    epoch: int = 0
    batch: int = 0
    start: dict[str, Any] | None = None
    is_resumed: bool = False


class Checkpointing:
    """Saves and restores everything that an `Accelerator` has prepared, and its position in data.

    A step holds the models, optimizers, schedulers and data loaders that were prepared, the objects
    of `register_for_checkpointing`, the gradient scaler, and every rank's random numbers. A run
    that is killed and resumed continues bit for bit if its batches come from `skip_first_batches`
    and its data sets draw no random numbers of their own: a batch is fetched ahead of its use.

    Args:
        accelerator: The accelerator.
        manager: A `CheckpointManager`, made after the accelerator, on every rank.
        items: Additional items to save.
    """

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        manager: CheckpointManager,
        items: Mapping[str, Any] | None = None,
    ) -> None:
        self._accelerator: Any = accelerator
        self._manager = manager
        self._extra = dict(items or {})
        self._positions: dict[int, _Position] = {}
        self._resumed: dict[str, Any] = {}

    def save_state(
        self, step: int, *, metrics: Mapping[str, Any] | None = None, force: bool = False
    ) -> Commit | None:
        """Saves a step if the manager's policies say so.

        Args:
            step: The number of updates so far.
            metrics: The step's metrics.
            force: Whether to save whatever the policies say.

        Returns:
            The commit; None if nothing is saved.

        Raises:
            UsageError: Gradients of an update are being accumulated: they are part of no item.
        """
        if not self._accelerator.sync_gradients:
            raise errors.UsageError(
                "save_state() within the accumulation of gradients, which a step does not hold. "
                "Call it after an update: if accelerator.sync_gradients: ..."
            )
        items, progress = self._items(), self._progress(step)
        return self._manager.save(step, items, metrics=metrics, progress=progress, force=force)

    def load_state(self, step: int | None = None) -> int:
        """Restores a step.

        Args:
            step: The step; None for the latest, if there is one.

        Returns:
            The step; 0 where there is none and nothing was restored.

        Raises:
            MismatchError: The step holds other objects than those prepared; nothing was touched.
        """
        if self._manager.is_saving_in_progress():
            self._manager.wait_until_finished()
        if step is None and (step := self._manager.latest_step()) is None:
            return 0
        items = self._items()
        saved = self._manager.metadata(step).items
        if spare := [name for name in saved if name not in items and _NUMBERED.fullmatch(name)]:
            raise errors.MismatchError(
                f"Step {step} holds {', '.join(sorted(spare))}, for which nothing was prepared or "
                "registered. Prepare and register the same objects, in the same order."
            )
        self._manager.restore(step, items)
        self._resumed = _random_numbers({})
        return step

    def skip_first_batches(self, loader: Any) -> Iterator[Any]:
        """Yields a loader's batches: after `load_state` those that are left, then all of them.

        Args:
            loader: A loader that `accelerator.prepare` returned.
        """
        position = self._position(self._index(loader))
        is_resumed, position.is_resumed = position.is_resumed, False
        if not is_resumed:
            position.epoch += position.batch > 0  # the pass before was not finished
            if _is_stateful(loader) and not position.epoch:
                _drop_first_iterator(loader)
            position.batch, position.start = 0, _random_numbers(_generators(loader))
        skipped = position.batch
        is_over = is_resumed and skipped >= _length(loader)
        source: Any = loader
        if is_resumed and not is_over:
            _set_random_numbers(position.start, _generators(loader))
            if not _is_stateful(loader):
                source = self._accelerator.skip_first_batches(loader, skipped)
        for batch in () if is_over else source:
            if is_resumed and position.batch == skipped:
                _set_random_numbers(self._resumed, {})
            position.batch += 1
            yield batch
        if is_resumed and position.batch == skipped:
            _set_random_numbers(self._resumed, {})
        if (is_over or source is not loader) and hasattr(loader, "iteration"):
            loader.iteration += 1  # the copy has counted the pass, and the loader has not
        position.epoch, position.batch, position.start = position.epoch + 1, 0, None

    def epoch(self, loader: Any) -> int:
        """Returns how many passes over a loader's data have ended."""
        return self._position(self._index(loader)).epoch

    # ------------------------------------------------------------------------------- as an item

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's position in the data."""
        return {
            "step": self._accelerator.step,
            "loaders": [
                _loader_state(loader, self._position(index))
                for index, loader in enumerate(self._accelerator._dataloaders)
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a saved position."""
        loaders = self._accelerator._dataloaders
        if len(loaders) != len(state["loaders"]):
            raise errors.MismatchError(
                f"The step holds {len(state['loaders'])} data loaders, {len(loaders)} are prepared."
            )
        self._accelerator.step = state["step"]
        for index, (loader, saved) in enumerate(zip(loaders, state["loaders"], strict=True)):
            self._positions[index] = _Position(
                saved["epoch"], saved["batch"], saved["start"], saved["batch"] > 0
            )
            _load_loader(loader, saved)

    # ------------------------------------------------------------------------------------- parts

    def _items(self) -> dict[str, Any]:
        self._check()
        accelerator = self._accelerator
        models = _numbered("model", accelerator._models)
        items: dict[str, Any] = {name: Module(model) for name, model in models.items()}
        for name, optimizer in _numbered("optimizer", accelerator._optimizers).items():
            inner = getattr(optimizer, "optimizer", optimizer)
            items[name] = Optimizer(inner, _owner(inner, models))
        for kind, objects in [
            ("scheduler", accelerator._schedulers),
            ("custom", accelerator._custom_objects),
        ]:
            items |= {name: Stateful(each) for name, each in _numbered(kind, objects).items()}
        if accelerator.scaler is not None:
            items["scaler"] = Stateful(accelerator.scaler)
        items |= {"rng": Rng(), "accelerate": Stateful(self, per_rank=True)}
        if both := sorted(items.keys() & self._extra.keys()):
            raise errors.UsageError(f"items: {', '.join(both)} is saved already; rename it.")
        return items | self._extra

    def _check(self) -> None:
        accelerator = self._accelerator
        kind = str(getattr(accelerator.distributed_type, "name", accelerator.distributed_type))
        if kind in _SHARDED:
            raise errors.UsageError(f"accelerate's {kind} keeps states of its own: not supported.")
        if any(classes.is_a(model, classes.FSDP1) for model in accelerator._models):
            raise errors.UsageError(
                "FSDP1 keeps a model in flat pieces without names. Use FSDP2 (fsdp_version: 2)."
            )
        if accelerator._save_model_state_pre_hook or accelerator._load_model_state_pre_hook:
            raise errors.UsageError(
                "Hooks of register_save_state_pre_hook and register_load_state_pre_hook get the "
                "folder of save_state, which a step is not. Give their objects as items=, or "
                "register them for checkpointing."
            )

    def _progress(self, step: int) -> Progress | None:
        if not self._accelerator._dataloaders:
            return None
        position, length = self._position(0), _length(self._accelerator._dataloaders[0])
        if length == _ENDLESS:
            return Progress(epoch=position.epoch, batch=step, batch_in_epoch=position.batch)
        total = position.epoch * length + position.batch
        return Progress(
            epoch=total // length,
            batch=total,
            batch_in_epoch=total % length,
            batches_per_epoch=length,
        )

    def _index(self, loader: Any) -> int:
        for index, known in enumerate(self._accelerator._dataloaders):
            if known is loader:
                return index
        raise errors.UsageError("The loader is none that accelerator.prepare() has returned.")

    def _position(self, index: int) -> _Position:
        return self._positions.setdefault(index, _Position())


_ENDLESS = 1 << 62


def _length(loader: Any) -> int:
    try:
        return max(1, len(loader))
    except TypeError:
        return _ENDLESS


def _numbered(name: str, objects: Any) -> dict[str, Any]:
    """Returns objects by the names of their items: the first has no number."""
    return {f"{name}_{index}" if index else name: each for index, each in enumerate(objects)}


def _owner(optimizer: torch.optim.Optimizer, models: Mapping[str, Any]) -> Any:
    """Returns the model whose parameters an optimizer updates, or all models by name."""
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for model in models.values():
        if held <= {id(each) for each in model.parameters()}:
            return model
    return dict(models)


# ------------------------------------------------------------------------------------------ loaders


def _is_stateful(loader: Any) -> bool:
    return bool(getattr(loader, "use_stateful_dataloader", False))


def _loader_state(loader: Any, position: _Position) -> dict[str, Any]:
    generators = _generators(loader)
    return {
        "epoch": position.epoch,
        "batch": position.batch,
        "start": position.start,
        "iteration": getattr(loader, "iteration", None),
        "seed": getattr(_sampler(loader), "initial_seed", None),
        "generators": {name: each.get_state() for name, each in generators.items()},
        "stateful": loader.state_dict() if _is_stateful(loader) else None,
    }


def _load_loader(loader: Any, saved: Mapping[str, Any]) -> None:
    if saved["iteration"] is not None and hasattr(loader, "iteration"):
        loader.iteration = saved["iteration"]
    if saved["seed"] is not None and hasattr(_sampler(loader), "initial_seed"):
        _sampler(loader).initial_seed = saved["seed"]
    for name, generator in _generators(loader).items():
        if name in saved["generators"]:
            generator.set_state(saved["generators"][name])
    if saved["stateful"] is not None:
        is_between = saved["batch"] in (0, _length(loader)) and (saved["epoch"] or saved["batch"])
        # Between two passes an iterator is created with the random numbers of that time.
        loader.load_state_dict({} if is_between else saved["stateful"])


def _drop_first_iterator(loader: Any) -> None:
    """Drops the iterator that a new loader has made, with random numbers of that time."""
    if getattr(loader.base_dataloader, "next_iter_state", None) is None:
        loader.load_state_dict({})


def _sampler(loader: Any) -> Any:
    return loader.get_sampler() if hasattr(loader, "get_sampler") else None


def _generators(loader: Any) -> dict[str, torch.Generator]:
    """Returns the generators that a loader shuffles with, beside the global ones."""
    found = {
        "loader": getattr(loader, "generator", None),
        "synchronized": getattr(loader, "synchronized_generator", None),
        "sampler": getattr(_sampler(loader), "generator", None),
    }
    return {name: each for name, each in found.items() if isinstance(each, torch.Generator)}


def _random_numbers(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    states = {name: generator.get_state() for name, generator in generators.items()}
    return {"process": RngHandler().lower(None), "generators": states}


def _set_random_numbers(
    saved: Mapping[str, Any] | None, generators: Mapping[str, torch.Generator]
) -> None:
    if saved is None:
        return
    RngHandler().lift(None, saved["process"])
    for name, generator in generators.items():
        if name in saved["generators"]:
            generator.set_state(saved["generators"][name])
