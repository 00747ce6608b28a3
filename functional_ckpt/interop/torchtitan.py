"""torchtitan's checkpoint manager over steps, configured by torchtitan's keys.

    from functional_ckpt.interop.torchtitan import CheckpointManager

    checkpoint=CheckpointManager.Config(enable=True, interval=500)

torchtitan installs the imports of this module.
"""

# torchtitan is installed only where scripts/test_integrations runs.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from functional_ckpt import errors, manager
from functional_ckpt.checkpoint import metadata
from functional_ckpt.handlers import CheckpointItem, Module, ModuleHandler, PyTree, Rng
from functional_ckpt.handlers.base import Handler, Item
from functional_ckpt.interop import huggingface
from functional_ckpt.policies import LatestN
from functional_ckpt.saving.options import Blocking, Eager, Overlapped
from functional_ckpt.storage.paths import is_remote

# By name, as Any: type checkers need not have torchtitan.
base: Any
try:
    base = importlib.import_module("torchtitan.components.checkpointer.base")
    _DTYPES: Any = importlib.import_module("torchtitan.config").TORCH_DTYPE_MAP
    filesystem: Any = importlib.import_module("torchtitan.tools.filesystem")
except ImportError as error:
    raise ImportError(
        "functional_ckpt.interop.torchtitan needs torchtitan 0.3: pip install torchtitan"
    ) from error

__all__ = ["CheckpointManager"]

_Manager: Any = base.BaseCheckpointManager
_Config: Any = _Manager.Config

_STEP_NAME = "step-{step}"
_STAGING = {"disabled": Blocking(), "async": Eager(), "async_with_pinned_mem": Overlapped()}


class CheckpointManager(_Manager):
    """Saves and loads torchtitan's training as steps, by the keys of torchtitan's configuration.

    A step holds the items `model`, `optimizer`, `lr_scheduler`, `dataloader`, the trainer's other
    states, and `rng`, every rank's random numbers. Its directory is `step-N` in the folder.
    """

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(_Config):
        """torchtitan's keys.

        Attributes:
            async_mode: `disabled`: a save returns when the step is durable. `async`: when the state
                is copied into host memory. `async_with_pinned_mem`: before that; the next optimizer
                step waits for the copy.
        """

        async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"

        def __post_init__(self) -> None:
            """Raises `ValueError` for keys that contradict each other."""
            _Config.__post_init__(self)
            if self.async_mode not in _STAGING:
                raise ValueError(f"Invalid async_mode: {self.async_mode}")

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: list[torch.nn.Module],
        optimizers: Any,
        lr_schedulers: Any,
        states: dict[str, Any],
        sd_adapter: Any,
        base_folder: str = "",
    ) -> None:
        self.enable = config.enable
        self.save_future: Any = None
        if not self.enable:
            return
        self._config = config
        self._adapter = sd_adapter
        if config.last_save_in_hf and sd_adapter is None:
            raise ValueError("last_save_in_hf is True, but sd_adapter is not provided.")
        self._parts = list(model_parts)
        states.update(
            {
                base.MODEL: base.ModelWrapper(self._parts),
                base.OPTIMIZER: optimizers,
                base.DATALOADER: dataloader,
                base.LR_SCHEDULER: lr_schedulers,
            }
        )
        self.states = states
        self._manager = manager.CheckpointManager(
            filesystem.join(base_folder, config.folder),
            keep_policy=LatestN(config.keep_latest_k) if config.keep_latest_k else None,
            step_name=_STEP_NAME,
            read_only=config.load_only,
            overwrite=True,
            staging=_STAGING[config.async_mode],
        )

    def __del__(self) -> None:
        # A process group may be gone: what failed was raised by the last save or `close`.
        with contextlib.suppress(errors.CheckpointError):
            self.close()

    # ----------------------------------------------------------------------------------- saving

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        config = self._config
        is_first = curr_step == 1 and config.enable_first_step_checkpoint
        if config.load_only or not (is_first or last_step or curr_step % config.interval == 0):
            return False
        if last_step and config.last_save_model_only:
            self.save_future = self._manager.save(curr_step, {base.MODEL: self._exported()})
        else:
            self.save_future = self._manager.save(curr_step, self._items())
        if last_step:
            self.maybe_wait_for_saving()
            if config.last_save_in_hf:
                self._export(curr_step)
        return True

    @torch.no_grad()
    def _exported(self) -> Item:
        """Returns the model's state in the dtype and the names of the export."""
        dtype = _DTYPES[self._config.export_dtype]
        state = {
            name: value.to(dtype)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in self.states[base.MODEL].state_dict().items()
        }
        return PyTree(self._adapter.to_hf(state) if self._config.last_save_in_hf else state)

    def _export(self, step: int) -> None:
        """Writes the last step's model as a directory of the Hugging Face hub, beside the step."""
        path = self._manager.path(step)
        dist = importlib.import_module("torch.distributed")
        if dist.get_rank() == 0:
            assets = getattr(self._adapter, "hf_assets_path", None)
            config = assets and os.path.join(assets, "config.json")
            huggingface.export(
                path,
                f"{path}-hf",
                config=config if config and os.path.isfile(config) else None,
                overwrite=True,
            )
        dist.barrier()

    def _wait_for_saving(self) -> None:
        self._manager.wait_until_finished()
        self.save_future = None

    def _maybe_wait_for_staging(self) -> None:
        self._manager.fence()

    def _close(self) -> None:
        if hasattr(self, "_manager"):
            self._manager.close()

    # ---------------------------------------------------------------------------------- loading

    def _load(self, step: int = -1) -> bool:
        found = self._manager.latest_step() if step == -1 else step
        if found is None:
            return self._load_initial()
        if step != -1 and step not in self._manager.all_steps():
            raise FileNotFoundError(
                f"checkpoint.load_step={step} is not among the steps of {self._manager.directory}: "
                f"{self._manager.all_steps()}."
            )
        saved = self._manager.metadata(found).items
        if found == 0:  # a seed: the model alone, maybe in the dtype of the export
            self._manager.restore(0, {base.MODEL: self._model()}, cast=True)
            return True
        items = self._items_to_load()
        if base.OPTIMIZER in items and base.OPTIMIZER not in saved:
            raise errors.MismatchError(
                f"Step {found} of {self._manager.directory} is the end of a training: it holds the "
                "model only (last_save_model_only). Load an earlier step with load_step, or start "
                "a training in another folder with initial_load_path."
            )
        self._manager.restore(found, items)
        self._keep_random_numbers(items)
        return True

    def _keep_random_numbers(self, items: Mapping[str, Any]) -> None:
        """Lets the loader's next iterator draw its seed from a generator of its own.

        In the uninterrupted run this iterator exists already: from the restored random numbers it
        would draw once more.
        """
        loader: Any = items.get(base.DATALOADER)
        if loader is None or "rng" not in items:  # excluded from loading
            return
        if getattr(loader, "generator", loader) is None:
            loader.generator = torch.Generator("cpu").manual_seed(torch.initial_seed())

    def _load_initial(self) -> bool:
        config = self._config
        path = config.initial_load_path
        if config.initial_load_in_hf:
            path = path or getattr(self._adapter, "hf_assets_path", None)
            if self._adapter is None or path is None or not filesystem.isdir(path):
                raise ValueError(
                    "initial_load_in_hf needs an sd_adapter, and a directory as initial_load_path "
                    f"or hf_assets_path; got {path!r}."
                )
            self._load_hf(path)
            return True
        if path is None:
            return False
        if not is_remote(path) and not os.path.isdir(path):
            raise ValueError(f"initial_load_path is no directory: {path}")
        if not is_remote(path) and os.path.isfile(os.path.join(path, ".metadata")):
            self._load_dcp(path)
            return True
        model_only = config.initial_load_model_only
        items = {base.MODEL: self._model()} if model_only else self._items_to_load()
        if "rng" in items and "rng" not in metadata(path).items:
            del items["rng"]
        folder, name = os.path.split(path.rstrip("/"))
        if model_only or (number := re.fullmatch(r"step-(\d+)", name)) is None:
            self._manager.restore_or(items, fallback=path, cast=model_only)
        else:  # every rank has states of its own
            with manager.CheckpointManager(folder, step_name=_STEP_NAME, read_only=True) as other:
                other.restore(int(number[1]), items)
        self._keep_random_numbers(items)
        return True

    @torch.no_grad()
    def _load_hf(self, path: str) -> None:
        """Loads a directory of the Hugging Face hub, as torchtitan does."""
        dcp: Any = importlib.import_module("torch.distributed.checkpoint")
        state = self._adapter.to_hf(self.states[base.MODEL].state_dict())
        reader = self._adapter.get_hf_storage_reader(
            path, self._config.initial_load_in_hf_quantized
        )
        dcp.load(state, storage_reader=reader)
        self.states[base.MODEL].load_state_dict(self._adapter.from_hf(state))

    @torch.no_grad()
    def _load_dcp(self, path: str) -> None:
        """Loads a checkpoint of torchtitan's own manager."""
        dcp: Any = importlib.import_module("torch.distributed.checkpoint")
        wanted: dict[str, Any] = dict(self.states[base.MODEL].state_dict())
        if not self._config.initial_load_model_only:
            excluded = (base.MODEL, *self._config.exclude_from_loading)
            wanted |= {name: value for name, value in self.states.items() if name not in excluded}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(wanted, checkpoint_id=path)
        self.states[base.MODEL].load_state_dict(wanted)

    # ------------------------------------------------------------------------------------- items

    def _model(self) -> Item:
        if len(self._parts) == 1:
            return Module(self._parts[0])
        return CheckpointItem(self._parts, _PartsHandler())

    def _items(self) -> dict[str, Any]:
        others = {
            name: value
            for name, value in self.states.items()
            if name != base.MODEL and value is not None
        }
        return {base.MODEL: self._model(), **others, "rng": Rng(other_ranks="derive")}

    def _items_to_load(self) -> dict[str, Any]:
        items, excluded = self._items(), self._config.exclude_from_loading
        for name in excluded:
            if name not in self.states and name not in items:
                raise ValueError(f"exclude_from_loading: there is no state {name!r}.")
        return {name: value for name, value in items.items() if name not in excluded}


@dataclasses.dataclass(frozen=True, slots=True)
class _PartsHandler(Handler):
    """Several parts of one model, as stages of a pipeline have: their names differ."""

    def lower(self, value: Sequence[torch.nn.Module]) -> dict[str, Any]:
        """Returns the union of the parts' states."""
        return _union([ModuleHandler().lower(part) for part in value])

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> dict[str, Any]:
        """Returns the union of the parts' targets."""
        return _union([ModuleHandler().target(part, saved, strict=strict) for part in value])

    def own(self, value: Any) -> dict[str, Any]:
        """Returns the union of the parts' values."""
        return _union([ModuleHandler().own(part) for part in value])

    def lift(self, value: Any, tree: Any) -> Any:
        """Returns the parts, filled."""
        for part in value:
            ModuleHandler().lift(part, tree)
        return value


def _union(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for state in states:
        if both := sorted(found.keys() & state.keys()):
            raise errors.NameCollisionError(f"Two model parts have the name {both[0]!r}.")
        found |= state
    return found
