"""The values that the soak saves: objects in the state of a step and version, and their digest.

The model is a frozen base with a trained adapter, so that steps share the files of the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash

import functional_ckpt as fc

# At this interval of versions a tensor is large enough to be written around the page cache.
_LARGE_EVERY = 23
_LARGE_ELEMENTS = 5_000_000
# A square of float32 is larger than a megabyte: smaller files are not shared.
_BASE_SIZE = 520
# The base changes at this interval of versions.
_BASE_EVERY = 11


def new_items() -> dict[str, Any]:
    """Live objects; `fill` gives them the state of a step."""
    model = torch.nn.ModuleDict(
        {
            "base": torch.nn.Linear(_BASE_SIZE, _BASE_SIZE, bias=False).requires_grad_(False),
            "adapter": torch.nn.Sequential(
                torch.nn.Linear(24, 48),
                torch.nn.BatchNorm1d(48),
                torch.nn.Linear(48, 8, bias=False),
            ),
        }
    )
    trained = list(model["adapter"].parameters())
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {
        "model": model,
        "optimizer": fc.Optimizer(optimizer, model),
        "tree": {"step": 0, "version": 0, "shadow": [torch.zeros(0), torch.zeros(0)]},
        "config": fc.Json({"version": 0}),
    }


def fill(items: dict[str, Any], step: int, version: int) -> dict[str, Any]:
    """The same objects in the state that `version` of `step` has, every bit of it."""
    generator = torch.Generator().manual_seed(step * 1_000_003 + version)
    optimizer = items["optimizer"].value
    optimizer.step()  # waits for the copy of an overlapped save
    with torch.no_grad():
        base = items["model"]["base"].weight
        base.normal_(generator=torch.Generator().manual_seed(version // _BASE_EVERY))
        for tensor in _tensors(items["model"]["adapter"], optimizer):
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
            else:
                tensor.random_(0, 1000, generator=generator)
    size = _LARGE_ELEMENTS if version % _LARGE_EVERY == 0 else 1000 + version % 7
    shadow = [torch.randn(17, 3, generator=generator), torch.randn(size, generator=generator)]
    items["tree"] = {"step": step, "version": version, "shadow": shadow}
    items["config"] = fc.Json({"version": version})
    return items


def targets(items: Mapping[str, Any]) -> dict[str, Any]:
    """What to restore into: the live model and optimizer; the rest comes as it was saved."""
    return {
        "model": items["model"],
        "optimizer": items["optimizer"],
        "tree": None,
        "config": None,
    }


def digest(items: Mapping[str, Any], restored: Mapping[str, Any] | None = None) -> str:
    """A digest of every value, of live or restored objects."""
    source = items if restored is None else restored
    tree, config = source["tree"], source["config"]
    config = config.value if isinstance(config, fc.Json) else config
    found = xxhash.xxh3_64()
    for tensor in (
        *_tensors(items["model"], items["optimizer"].value),
        *tree["shadow"],
    ):
        found.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    found.update(f"{tree['step']} {tree['version']} {config['version']}".encode())
    return found.hexdigest()


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    yield from model.state_dict().values()
    for parameter in (each for each in model.parameters() if each.requires_grad):
        state = optimizer.state[parameter]
        yield from (state[name] for name in sorted(state))


def accuracy(step: int) -> float:
    """The metric of a step, whatever its version, so that every process can compute the best."""
    return step * 7919 % 1000 / 1000
