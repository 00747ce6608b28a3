"""`fc.Rng`, and new random streams for another number of ranks, worked out of the saved ones."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import torch

from functional_ckpt import errors
from functional_ckpt.handlers.base import CheckpointItem
from functional_ckpt.handlers.rng import GeneratorLike, RngHandler, check_generator, python_state

__all__ = ["DerivingRngHandler", "Rng"]

_CUDA_STATE_BYTES = 16  # Philox: a seed and an offset, 8 bytes each


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DerivingRngHandler(RngHandler):
    """As `RngHandler`, and another number of ranks takes up new streams.

    Every stream is seeded by SHA-256 of all the saved states, the rank, the number of ranks and the
    stream's place: the same checkpoint on the same number of ranks gives the same numbers, and no
    two ranks the same ones. It is not the stream that any saved rank would have gone on with.
    """

    def resize(self, trees: Sequence[Any], rank: int, num_ranks: int) -> Any:
        """One rank's states: of the kinds that rank 0 saved, newly seeded."""
        digest = hashlib.sha256()
        for part in _parts(list(trees)):
            digest.update(part)
        digest.update(struct.pack("<qq", rank, num_ranks))
        return _reseeded(trees[0], digest.digest())


class Rng(CheckpointItem):
    """The process's generators: Python's, numpy's legacy one, torch's on the CPU and on CUDA.

    Args:
        generators: Further generators by name, set in place by restore.
        same_devices: Whether another number of CUDA devices than at the save is an error; if not,
            those that both have are restored.
        other_ranks: What another number of ranks than at the save does: an `error`, or `derive`
            new streams from the saved ones, different on every rank.

    Raises:
        UsageError: Not a generator, or one without a state.
    """

    __slots__ = ()

    def __init__(
        self,
        generators: Mapping[str, GeneratorLike] | None = None,
        *,
        same_devices: bool = True,
        other_ranks: Literal["error", "derive"] = "error",
    ) -> None:
        if other_ranks not in ("error", "derive"):
            raise errors.UsageError(
                f"other_ranks must be 'error' or 'derive'; got {other_ranks!r}."
            )
        given = dict(generators or {})
        for name, generator in given.items():
            check_generator(generator, name)
        handler = RngHandler if other_ranks == "error" else DerivingRngHandler
        super().__init__(MappingProxyType(given), handler(same_devices=same_devices))


def _parts(tree: Any) -> Iterator[bytes]:
    """Everything in a tree of states, in a fixed order, each with its length."""
    if isinstance(tree, Mapping):
        known = cast("Mapping[str, Any]", tree)
        for key in sorted(known):
            yield from _parts(key)
            yield from _parts(known[key])
    elif isinstance(tree, list | tuple):
        for child in cast("Sequence[Any]", tree):
            yield from _parts(child)
    else:
        array = np.asarray(tree) if isinstance(tree, torch.Tensor | np.ndarray) else None
        data = repr(tree).encode() if array is None else array.tobytes()
        yield struct.pack("<q", len(data)) + data


def _reseeded(tree: Any, entropy: bytes) -> Any:
    """The same kinds of states, each seeded anew."""
    if isinstance(tree, torch.Tensor):
        return _torch_state(tree, entropy)
    if isinstance(tree, Mapping):
        known = cast("Mapping[str, Any]", tree)
        if "version" in known:
            return python_state(random.Random(entropy).getstate())
        if "bit_generator" in known:
            return _numpy_state(known, entropy)
        return {key: _reseeded(known[key], _below(entropy, key)) for key in sorted(known)}
    states = cast("Sequence[Any]", tree)
    return [_reseeded(state, _below(entropy, str(i))) for i, state in enumerate(states)]


def _below(entropy: bytes, key: str) -> bytes:
    return hashlib.sha256(entropy + key.encode()).digest()


def _torch_state(saved: torch.Tensor, entropy: bytes) -> torch.Tensor:
    seed = int.from_bytes(entropy[:8], "little") >> 1
    if saved.numel() == _CUDA_STATE_BYTES:
        return torch.frombuffer(bytearray(struct.pack("<qq", seed, 0)), dtype=torch.uint8)
    return torch.Generator().manual_seed(seed).get_state()


def _numpy_state(saved: Mapping[str, Any], entropy: bytes) -> Any:
    bit_generator = getattr(np.random, saved["bit_generator"])
    new = bit_generator(np.frombuffer(entropy, np.uint32))
    if "has_gauss" in saved:
        return np.random.RandomState(new).get_state(legacy=False)
    return new.state
