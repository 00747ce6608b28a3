"""Weights of a model of transformers under the names, and in the form, that the hub has them in."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from typing import Any

from functional_ckpt import errors
from functional_ckpt.interop import weights
from functional_ckpt.interop.weights import Weights


def of_config(given: Weights, config: str | None, stored: Collection[str]) -> Weights:
    """Returns the weights of a model that its configuration describes, as the hub has them.

    Args:
        given: The weights, by the names in the module.
        config: The text of `config.json`; None for weights of anything else.
        stored: The names in files of complete tensors, if there are any.

    Raises:
        UsageError: The installed transformers cannot describe the model.
    """
    if config is None:
        return given
    if (model := _meta_model(config)) is not None:
        return of_model(given, model)
    from functional_ckpt.handlers import hub_config

    targets = frozenset(name for name in (*given.sizes, *given.tied) if name not in stored)
    return given.renamed(hub_config.Hub(targets=targets).stored_names(given.tied))


def of_model(given: Weights, model: Any) -> Weights:
    """Returns the weights of a model as the hub has them."""
    import torch

    from functional_ckpt.handlers import hub_config

    made = {
        name: torch.empty(shape, dtype=getattr(torch, given.dtypes[name]), device="meta")
        for name, shape in given.shapes.items()
    }
    made |= {alias: torch.empty_like(made[name]) for alias, name in given.tied.items()}
    names = hub_config.names_on_hub(model, made)
    if names is not None:
        hub = hub_config.Hub(names=names, targets=hub_config.tied_targets(model))
        return given.renamed(hub.stored_names(given.tied))
    found = hub_config.converted(model, given.fetch(given.sizes))
    tensors = {name: tensor.contiguous() for name, tensor in found.items()}

    def fetch(wanted: Collection[str]) -> dict[str, torch.Tensor]:
        return {name: tensors[name] for name in wanted}

    return Weights(
        sizes={name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()},
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        tied={},
        fetch=fetch,
        stream=functools.partial(weights.stream_tensors, fetch),
    )


def _meta_model(text: str) -> Any:
    """Returns the model of a configuration, without memory; None if it is not of transformers."""
    record = json.loads(text)
    try:
        import torch
        import transformers

        library: Any = transformers
        kind: Any = getattr(library, (record.get("architectures") or [""])[0], None)
        if kind is None:
            return None
        with torch.device("meta"):
            return kind(kind.config_class.from_dict(record))
    except Exception as error:
        raise errors.UsageError(
            "The item is a model of transformers, which alone knows its names on the hub, and "
            f"cannot make it: {type(error).__name__}: {error}. Install the version that saved it; "
            "or write the names in the module, with --to safetensors."
        ) from error
