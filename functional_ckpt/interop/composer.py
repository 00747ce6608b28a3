"""Files of MosaicML Composer: a training state under `state`, and `rng`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.interop import torch_save
from functional_ckpt.interop.source import Format, Source

__all__ = ["FORMAT"]

_RENAMED = {"metadata": "composer_metadata"}  # the name is reserved


def fits(path: str) -> bool:
    """Whether it is a file of torch.save with Composer's two keys."""
    if not torch_save.fits(path):
        return False
    try:
        content = torch_save.load(path)
    except errors.CheckpointError:
        return False  # torch's own reader says what is wrong
    return isinstance(content, Mapping) and {"state", "rng"} <= content.keys()


def _open(path: str) -> Source:
    content = torch_save.load(path)
    state = content["state"]
    if not isinstance(state, Mapping):
        raise errors.CorruptCheckpointError(f"{path}: its 'state' is not a mapping.", path=path)
    items: dict[str, Any] = {
        _RENAMED.get(name, name): value for name, value in cast("Mapping[str, Any]", state).items()
    }
    items["rng"] = content["rng"]
    if isinstance(model := items.get("model"), Mapping):
        items["model"] = dict(cast("Mapping[str, Any]", model))
    openers = {name: (lambda value=value: value) for name, value in items.items()}
    return Source(path, "composer", openers)


FORMAT = Format(
    name="composer",
    description="a file of MosaicML Composer",
    matches=fits,
    open=_open,
    supersedes=("torch",),
)
