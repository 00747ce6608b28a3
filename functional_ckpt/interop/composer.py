"""Files of MosaicML Composer: a training state under `state`, and `rng`.

Times are spans of `datetime.timedelta` there; here they are seconds. Versions of torch are text.
`fc.Rng()` restores the generators: `rng`, or `rng_0`, `rng_1` ... of several ranks.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, cast

from torch.torch_version import TorchVersion

from functional_ckpt import errors
from functional_ckpt.interop import torch_save, training_state
from functional_ckpt.interop.source import Format, Source, numbered, source_of

_RENAMED = {"metadata": "composer_metadata"}  # the name is reserved


def _open(path: str) -> Source:
    content = torch_save.load(path)
    state = content["state"]
    if not isinstance(state, Mapping):
        raise errors.CorruptCheckpointError(f"{path}: its 'state' is not a mapping.", path=path)
    items: dict[str, Any] = {
        _RENAMED.get(name, name): _plain(value)
        for name, value in cast("Mapping[str, Any]", state).items()
    }
    items |= numbered("rng", [training_state.rng_state(each, path) for each in content["rng"]])
    if isinstance(model := items.get("model"), Mapping):
        items["model"] = dict(cast("Mapping[str, Any]", model))
    return source_of(path, "composer", items)


def _plain(value: Any) -> Any:
    """Returns the value with seconds for spans of time, and text for versions of torch."""
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, TorchVersion):
        return str(value)
    if type(value) is list or type(value) is tuple:
        return type(value)(map(_plain, cast("list[Any]", value)))
    if type(value) is dict:
        return {_plain(key): _plain(entry) for key, entry in cast("dict[Any, Any]", value).items()}
    return value


FORMAT = Format(
    name="composer",
    description="a file of MosaicML Composer",
    matches=lambda path: torch_save.has_keys(path, {"state", "rng"}),
    open=_open,
    supersedes=("torch",),
)
