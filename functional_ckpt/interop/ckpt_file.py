"""Checkpoints of Lightning (`.ckpt`): files of `torch.save` with a state dict and the loops."""

from __future__ import annotations

from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.interop import torch_save
from functional_ckpt.interop.source import Format, Source, numbered, source_of

_KEYS = {"state_dict", "pytorch-lightning_version"}
# Lists of states -> name of the items.
_LISTS = {"optimizer_states": "optimizer", "lr_schedulers": "scheduler"}


def _open(path: str) -> Source:
    content = cast("dict[str, Any]", torch_save.load(path))
    items: dict[str, Any] = {"model": dict(content.pop("state_dict"))}
    for key, name in _LISTS.items():
        items |= numbered(name, content.pop(key, []))
    others = {_item_name(name): value for name, value in content.items()}
    if both := sorted(items.keys() & others.keys()):
        raise errors.UsageError(
            f"{path}: its entries {', '.join(both)} have the names of Lightning's own state. Open "
            "it with fc.interop.open(path, 'torch'), which keeps the names of the file.",
            path=path,
        )
    return source_of(path, "lightning", items | others)


def _item_name(name: str) -> str:
    return "lightning_version" if name == "pytorch-lightning_version" else name


FORMAT = Format(
    name="lightning",
    description="a checkpoint of Lightning",
    matches=lambda path: torch_save.has_keys(path, _KEYS),
    open=_open,
    supersedes=("torch",),
)
