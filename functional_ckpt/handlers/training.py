"""The usual items of a training program, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from functional_ckpt import errors
from functional_ckpt.handlers.base import Item
from functional_ckpt.handlers.optimizer import Optimizer
from functional_ckpt.handlers.rng import Rng
from functional_ckpt.handlers.stateful import Stateful


def training_items(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
    loader: Any = None,
    scaler: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the items to save and restore: everything that a resumed run needs.

    >>> model = torch.nn.Linear(1, 1)
    >>> sorted(training_items(model, torch.optim.SGD(model.parameters())))
    ['model', 'optimizer', 'rng']

    Args:
        model: The model.
        optimizer: Its optimizer; None for none.
        scheduler: A learning-rate scheduler, or None.
        loader: A data loader with a state, such as torchdata's `StatefulDataLoader`, or None.
            `torch.utils.data.DataLoader` has none.
        scaler: A `torch.amp.GradScaler`, or None.
        extra: More items by name, added to the others.

    Returns:
        Name -> item: `model`, `optimizer`, `scheduler`, `loader` and `scaler` where given, `rng`
        (Python's, numpy's and torch's global generators), and those of `extra`.

    Raises:
        UsageError: A value has no state, or `extra` repeats a name.
    """
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.UsageError(
            f"model must be a torch.nn.Module, not an item; got {type(model).__name__}. Replace "
            "the item 'model' of the result where it needs options."
        )
    items: dict[str, Any] = {"model": model}
    if optimizer is not None:
        items["optimizer"] = Optimizer(optimizer, model)
    parts = {"scheduler": scheduler, "loader": loader, "scaler": scaler}
    for name, part in parts.items():
        if part is not None:
            items[name] = part if isinstance(part, Item) else _stateful(name, part)
    items["rng"] = Rng()
    if repeated := sorted(items.keys() & (extra or {}).keys()):
        raise errors.UsageError(f"extra repeats the names {', '.join(repeated)}; use others.")
    return {**items, **(extra or {})}


def _stateful(name: str, part: Any) -> Stateful:
    try:
        return Stateful(part)
    except errors.UsageError as error:
        hint = " Use torchdata.stateful_dataloader.StatefulDataLoader." if name == "loader" else ""
        raise errors.UsageError(f"{name}: {error.message}{hint}", key_path=name) from error
