"""How a module of transformers is a directory of the Hugging Face hub: configuration and names."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from functional_ckpt.core.files.hub_configs import CONFIGS, RUNTIME

_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """A module as its directory shows it to other programs.

    Attributes:
        texts: The configuration files, by name.
        names: Name of a tensor -> its name on the hub, where that is another one.
        targets: Names of tensors that the model ties to others: the hub has the others alone.
        has_tensors: Whether the hub has the same tensors; else they must be converted.
    """

    texts: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    names: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    targets: frozenset[str] = frozenset()
    has_tensors: bool = True

    def stored_names(self, tied: Mapping[str, str]) -> dict[str, str]:
        """Returns the names of arrays in data files, where they are others.

        Args:
            tied: Name of a leaf that shares the memory of an array -> the array's name.
        """
        groups: dict[str, list[str]] = {owner: [owner] for owner in tied.values()}
        for alias, owner in tied.items():
            groups[owner].append(alias)
        found = dict(self.names)
        for owner, group in groups.items():
            kept = next((name for name in group if name not in self.targets), owner)
            found[owner] = self.names.get(kept, kept)
            if kept != owner:
                found[kept] = self.names.get(owner, owner)
        return {name: stored for name, stored in found.items() if name != stored}


def hub_of(module: Any, tree: Any) -> Hub:
    """Returns how a module is shown to other programs.

    Args:
        module: The module.
        tree: Its tensors by name.
    """
    texts, model = files_of(module), unwrapped(module)
    if not texts or not isinstance(tree, Mapping):
        return Hub(texts=texts)
    names = names_on_hub(model, cast("Mapping[str, Any]", tree))
    if names is None:
        named = {RUNTIME + name: text for name, text in texts.items()}
        return Hub(texts=named, targets=tied_targets(model), has_tensors=False)
    return Hub(texts=texts, names=names, targets=tied_targets(model))


def tied_targets(model: Any) -> frozenset[str]:
    """Returns the names that a model of transformers ties to others and does not save."""
    found: Any = getattr(model, "all_tied_weights_keys", None)
    return frozenset(found or getattr(model, "_tied_weights_keys", None) or ())


def converted(model: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns tensors of a model under the names, and in the form, that the hub has them in."""
    revert = _reverting(model)
    return tensors if revert is None else revert(model, dict(tensors))


def _reverting(model: Any) -> Callable[[Any, dict[str, Any]], Mapping[str, Any]] | None:
    """Returns the function of transformers 5 that converts a model's tensors; None if none does."""
    library: Any = sys.modules.get("transformers.core_model_loading")
    revert: Any = getattr(library, "revert_weight_conversion", None)
    nothing: dict[str, Any] = {}
    return None if revert is None or revert(model, nothing) is nothing else revert


def names_on_hub(model: Any, tree: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Returns name -> name on the hub where they differ; None if other things than names do."""
    try:
        if (revert := _reverting(model)) is None:
            return {}
        made = {
            name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for name, value in tree.items()
            if isinstance(value, torch.Tensor)
        }
        found = revert(model, dict(made))
    except Exception as error:  # noqa: BLE001 - the library's own code; the weights are saved
        _log.warning("the names of %s on the hub are unknown: %s", type(model).__name__, error)
        return None
    originals = {id(tensor): name for name, tensor in made.items()}
    pairs = {originals.get(id(tensor)): name for name, tensor in found.items()}
    if None in pairs or len(pairs) != len(made):
        return None
    return {name: stored for name, stored in pairs.items() if name is not None and name != stored}


def unwrapped(model: Any) -> Any:
    """Returns the module in a DistributedDataParallel, or the module itself."""
    is_wrapped = isinstance(model, torch.nn.parallel.DistributedDataParallel)
    return model.module if is_wrapped else model


def _class_of(model: Any) -> type:
    """Returns the class of a module without those that FSDP2 and `replicate` put before it."""

    def is_torchs(kind: type) -> bool:
        return kind.__module__.startswith("torch.distributed.")

    kinds = type(model).__mro__
    return next(
        kind for kind in kinds if not is_torchs(kind) and not any(map(is_torchs, kind.__bases__))
    )


def files_of(model: Any) -> dict[str, str]:
    """Returns the configuration files that a module of transformers brings, by name."""
    texts: dict[str, str] = {}
    model = unwrapped(model)
    for attribute, file in zip(("config", "generation_config"), CONFIGS, strict=True):
        own = getattr(model, attribute, None)
        if not isinstance(model, torch.nn.Module) or not hasattr(own, "to_json_string"):
            continue
        try:
            record = json.loads(cast("Any", own).to_json_string())
        except Exception as error:  # noqa: BLE001 - the library's own code; the weights are saved
            _log.warning("%s of %s is not JSON: %s", attribute, type(model).__name__, error)
            continue
        if attribute == "config":
            record["architectures"] = record.get("architectures") or [_class_of(model).__name__]
            if isinstance(dtype := getattr(model, "dtype", None), torch.dtype):
                name = "torch_dtype" if "torch_dtype" in record else "dtype"
                record[name] = str(dtype).removeprefix("torch.")
        texts[file] = json.dumps(record, indent=2, sort_keys=True) + "\n"
    return texts
