"""`_metadata` of state dicts: versions, by which modules know how to load older checkpoints."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import torch

from functional_ckpt.core.tree import context, structure
from functional_ckpt.handlers import module_names

_DEFAULT = {"version": 1}


def to_store(
    module: torch.nn.Module, state: object, is_used: Callable[[torch.nn.Module], bool]
) -> dict[str, object]:
    """Returns the detail of a module's tree.

    `is_used` says whether a submodule has its own way of loading, and so may look at its metadata.

    Returns:
        The metadata of such submodules by their clean names; empty where it is torch's default.
    """
    found = {name: local for name, local in _metadata(state).items() if local != _DEFAULT}
    if not found:
        return {}
    parts = dict(module.named_modules(remove_duplicate=False))
    used = {
        module_names.clean_prefix(module, name): local
        for name, local in found.items()
        if name in parts and is_used(parts[name]) and context.is_storable(local)
    }
    return {structure.METADATA: context.tag(used)} if used else {}


def stored(saved: object) -> dict[str, object]:
    """Returns the detail as it was saved; of a state dict in a foreign file, its metadata."""
    if isinstance(saved, structure.Described):
        return {key: saved.detail[key] for key in (structure.METADATA,) if key in saved.detail}
    found = {f"{name}." if name else "": local for name, local in _metadata(saved).items()}
    is_kept = bool(found) and context.is_storable(found)
    return {structure.METADATA: context.tag(found)} if is_kept else {}


def attach(module: torch.nn.Module, loaded: dict[str, Any], restored: object) -> dict[str, Any]:
    """Returns the state dict to load, with the metadata that was saved with it."""
    if not isinstance(restored, structure.Described) or structure.METADATA not in restored.detail:
        return loaded
    saved = context.untag(restored.detail[structure.METADATA])
    state: Any = collections.OrderedDict(loaded)
    state._metadata = collections.OrderedDict(
        (name, dict(saved.get(module_names.clean_prefix(module, name), _DEFAULT)))
        for name, _ in module.named_modules(remove_duplicate=False)
    )
    return state


def _metadata(state: object) -> Mapping[str, Any]:
    found = getattr(state, "_metadata", None)
    return found if isinstance(found, Mapping) else {}
