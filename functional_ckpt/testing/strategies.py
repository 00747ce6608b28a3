"""Hypothesis strategies for values of a checkpoint; needs the `hypothesis` package."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from functional_ckpt.core.arrays import spec

__all__ = ["TENSOR_DTYPES", "item_names", "keys", "plain_values", "pytrees", "tensors"]

TENSOR_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128),
)
"""The dtypes that `tensors` draws from."""

_SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]] = _SHAPES) -> torch.Tensor:
    """Strided CPU tensors of any bits, some of them transposed, sliced, expanded or Parameters."""
    dtype = draw(st.sampled_from(TENSOR_DTYPES))
    shape = draw(shapes)
    num_bytes = math.prod(shape) * dtype.itemsize
    seed = draw(st.integers(0, 2**32 - 1))
    data = np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)
    if dtype is torch.bool:
        data &= 1
    tensor = (
        torch.from_numpy(data).view(dtype).reshape(shape)
        if num_bytes
        else torch.empty(shape, dtype=dtype, device="cpu")
    )
    form = draw(st.sampled_from(("plain", "transposed", "sliced", "expanded", "parameter")))
    if form == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.dim()))))
    if form == "sliced" and tensor.dim():
        return tensor[..., ::2]
    if form == "expanded":
        return tensor.expand(2, *tensor.shape)
    if form == "parameter" and tensor.is_floating_point():
        return torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
    return tensor


def plain_values() -> st.SearchStrategy[Any]:
    """Returns every plain value that a pytree may hold, of any size and exact in its bits."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.complex_numbers(),
        st.text(),
        st.binary(max_size=20),
        st.sampled_from((torch.float32, torch.bfloat16, torch.device("cpu"))),
    )


def keys() -> st.SearchStrategy[Any]:
    """Dict keys of every storable type; no two of one dict may read alike."""
    words = st.text(
        st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=8
    )
    return st.one_of(words, st.integers(), st.tuples(st.integers(0, 9), words))


def item_names() -> st.SearchStrategy[str]:
    """Valid names of items."""
    letters = st.sampled_from("abcdefghijklmnopqrstuvwxyz0123456789-é ")
    return st.text(letters, min_size=1, max_size=12).filter(
        lambda name: name not in ("metrics", "metadata", "progress")
    )


def pytrees(max_leaves: int = 12) -> st.SearchStrategy[Any]:
    """Nested containers of tensors, numpy arrays and plain values."""
    leaves = st.one_of(tensors(), plain_values(), _numpy_arrays())
    return st.recursive(leaves, _containers, max_leaves=max_leaves)


def _numpy_arrays() -> st.SearchStrategy[Any]:
    native = [name for name in spec.STORAGE_DTYPES if hasattr(np, name) or name == "bool"]
    return st.builds(_counting, st.sampled_from(native), _SHAPES)


def _counting(dtype: str, shape: tuple[int, ...]) -> Any:
    return np.arange(math.prod(shape)).astype(dtype).reshape(shape)


def _containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    # Two keys that read alike, such as 1 and '1', would share one name on disk: that is an error.
    mappings = st.dictionaries(keys(), children, max_size=4).filter(_has_names_of_its_own)
    return st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.lists(children, max_size=3).map(collections.deque),
        mappings,
        mappings.map(collections.OrderedDict),
    )


def _has_names_of_its_own(mapping: dict[Any, Any]) -> bool:
    names = [str(key) for key in mapping]
    return len(set(names)) == len(names) and not any("." in name for name in names)
