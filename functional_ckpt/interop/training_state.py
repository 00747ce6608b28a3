"""Files that trainers write beside weights: optimizers, schedulers, generators, loaders, counters.

transformers.Trainer (`checkpoint-500`) and accelerate (`save_state`) put each into a file of its
own. Optimizers number their parameters: `fc.Optimizer(optimizer, model)` takes them by its own
order. `fc.Rng()` restores the generators.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.handlers.rng import python_state
from functional_ckpt.interop import torch_save
from functional_ckpt.interop.file_names import match_files
from functional_ckpt.interop.hf_config import load_json

# File -> item. The number is that of the optimizer or of the rank.
_FILES = {
    r"optimizer(?:_(\d+))?\.(?:pt|bin)": "optimizer",
    r"scheduler(?:_(\d+))?\.(?:pt|bin)": "scheduler",
    r"scaler\.pt()": "scaler",
    r"rng_state(?:_(\d+))?\.pth": "rng",
    r"random_states_(\d+)\.pkl": "rng",
    r"dl_state_dict(?:_(\d+))?\.bin": "loader",
    r"trainer_state\.json()": "trainer",
}
# Of a generator's state: in torch's own words, transformers', accelerate's, Composer's.
_RNG_KEYS = {
    "python": ("python", "random_state"),
    "numpy": ("numpy", "numpy_random_seed"),
    "torch": ("torch", "cpu", "torch_manual_seed"),
    "cuda": ("cuda", "torch_cuda_manual_seed"),
}
# Suffixes of files that may hold state of a run.
_STATES = (".pt", ".pth", ".bin", ".pkl", ".safetensors")


def openers_of(
    path: str, is_weights: Callable[[str], bool]
) -> tuple[dict[str, Callable[[], Any]], Sequence[str]]:
    """Returns the items beside the weights, and the names of the files that are in no item.

    `is_weights` returns whether a file of this name is opened as weights.

    Raises:
        UsageError: Two files are the same item.
    """
    found: dict[str, dict[str, str]] = {}
    left_out: list[str] = []
    for name in match_files(path, lambda name: not is_weights(name)):
        if (item_of := _item_of(name)) is None:
            left_out += [name] if name.endswith(_STATES) else []
            continue
        item, number = item_of
        if (other := found.setdefault(item, {}).setdefault(number, name)) != name:
            raise errors.UsageError(
                f"{path}: {other} and {name} are the same item ({item}); move one away.", path=path
            )
    openers: dict[str, Callable[[], Any]] = {}
    for item, files in found.items():
        read = _READERS.get(item, torch_save.load)
        is_one_rank = item == "rng" and len(files) == 1
        for number, name in files.items():
            key = f"{item}_{number}" if number and not is_one_rank else item
            openers[key] = functools.partial(read, os.path.join(path, name))
    return openers, left_out


def _item_of(name: str) -> tuple[str, str] | None:
    """Returns the item of a file, and the number of its optimizer or rank; None for other files."""
    for pattern, item in _FILES.items():
        if (match := re.fullmatch(pattern, name)) is not None:
            return item, match[1] or ""
    return None


_READERS: Mapping[str, Callable[[str], Any]] = {
    "rng": lambda file: rng_state(torch_save.load(file), file),
    "trainer": load_json,
}


def rng_state(content: Any, path: str) -> dict[str, Any]:
    """Returns the state of a process's generators as `fc.Rng()` restores it.

    Raises:
        CorruptCheckpointError: It is none.
    """
    try:
        states = {
            item: next((content[key] for key in keys if key in content), None)
            for item, keys in _RNG_KEYS.items()
        }
        python, cuda = cast("tuple[Any, ...]", states["python"]), states["cuda"]
        bit_generator, key, position, has_gauss, gauss = cast("tuple[Any, ...]", states["numpy"])
        return {
            "python": python_state(python),
            "numpy": {
                "bit_generator": str(bit_generator),
                "state": {"key": key, "pos": int(position)},
                "has_gauss": int(has_gauss),
                "gauss": float(gauss),
            },
            "torch": states["torch"],
            "cuda": list(cast("Sequence[Any]", cuda)) if isinstance(cuda, (list, tuple)) else [],
            "generators": {},
        }
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise errors.CorruptCheckpointError(
            f"{path}: not the state of Python's, numpy's and torch's generators "
            f"({type(error).__name__}: {error}).",
            path=path,
        ) from error
