"""Detects changes of leaves between `save` and their copy in the background.

torch counts the changes of a tensor, but misses writes through `.data`, a numpy view or the
storage, fused kernels that are called directly, and other processes. So bytes are compared: some of
them at every save, or all of them with `fc.Overlapped(checked=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import xxhash

from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.core.tree import encode
from functional_ckpt.format.data_file import flat_bytes

# Few enough not to delay `save`, and evenly spread over the leaves and over each of them.
_MAX_SAMPLED_LEAVES = 64
_NUM_SAMPLES = 16
_SAMPLE_BYTES = 32


_T = TypeVar("_T")


def sampled(leaves: Sequence[_T]) -> Sequence[_T]:
    """Returns a few of them, evenly spread."""
    return leaves[:: -(-len(leaves) // _MAX_SAMPLED_LEAVES) or 1]


class CopiedLeaf(NamedTuple):
    """A region that is copied in the background."""

    name: str
    live: torch.Tensor
    dtype: str
    host: Array


def remember(leaves: Sequence[CopiedLeaf], *, is_whole: bool) -> Callable[[], list[str]]:
    """Remembers the values of leaves, to be compared with the copies.

    Args:
        leaves: The leaves to copy; `sampled` of them if not every byte is compared.
        is_whole: Whether to compare every byte, for which `save` reads all of them.

    Returns:
        A function to call after the copy, which names the leaves whose copies differ.
    """
    fingerprint = _digest if is_whole else _samples
    if not is_whole:
        leaves = [leaf for leaf in leaves if leaf.live.is_contiguous()]
    expected = [(leaf.name, leaf.host, fingerprint(_bytes(leaf))) for leaf in leaves]
    return lambda: [name for name, host, was in expected if fingerprint(flat_bytes(host)) != was]


def _bytes(leaf: CopiedLeaf) -> Array:
    live = leaf.live if leaf.live.is_cpu else leaf.live.cpu()
    return flat_bytes(encode.host_view(live, leaf.dtype))


def _digest(flat: Array) -> bytes:
    return xxhash.xxh3_128_digest(flat.data)


def _samples(flat: Array) -> bytes:
    if len(flat) <= _NUM_SAMPLES * _SAMPLE_BYTES:
        return flat.tobytes()
    rows = flat[: len(flat) // _NUM_SAMPLES * _NUM_SAMPLES].reshape(_NUM_SAMPLES, -1)
    return rows[:, :_SAMPLE_BYTES].tobytes()
