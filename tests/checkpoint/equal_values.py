"""Equality to the bit, written without the code under test."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy as np
import torch

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


def assert_same(got: Any, expected: Any, *, is_own_class: bool = True) -> None:
    """Fails where `got` differs from `expected` in value, bits, type, dtype, keys or order.

    Args:
        got: The restored value.
        expected: The saved value.
        is_own_class: Whether named tuples must be of the very class; without a target they are of a
            fresh class of the same name and fields.
    """
    if isinstance(expected, tuple) and hasattr(expected, "_fields") and not is_own_class:
        assert type(got).__name__ == type(expected).__name__
        assert got._fields == expected._fields
    else:
        assert type(got) is type(expected), (type(got), type(expected))
    if isinstance(expected, torch.Tensor):
        _assert_same_tensor(got, expected)
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert got.dtype == expected.dtype and got.dtype.str == expected.dtype.str
        assert got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()
    elif isinstance(expected, float):
        assert struct.pack(">d", got) == struct.pack(">d", expected)
    elif isinstance(expected, complex):
        assert_same(got.real, expected.real)
        assert_same(got.imag, expected.imag)
    elif isinstance(expected, dict):
        assert len(got) == len(expected)
        for key, other in zip(got, expected, strict=True):
            assert_same(key, other)
            assert_same(got[key], expected[other], is_own_class=is_own_class)
    elif dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            one, other = getattr(got, field.name), getattr(expected, field.name)
            assert_same(one, other, is_own_class=is_own_class)
    elif hasattr(expected, "__iter__") and not isinstance(expected, (str, bytes)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other, is_own_class=is_own_class)
    else:
        assert got == expected


def _assert_same_tensor(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.dtype, got.layout, got.device) == (expected.dtype, expected.layout, expected.device)
    assert got.requires_grad == expected.requires_grad
    assert isinstance(got, torch.nn.Buffer) == isinstance(expected, torch.nn.Buffer)
    if hasattr(expected, "__tensor_flatten__"):
        names, context = expected.__tensor_flatten__()
        assert got.__tensor_flatten__() == (names, context)
        for name in names:
            assert_same(getattr(got, name), getattr(expected, name))
        return
    assert got.shape == expected.shape
    got, expected = got.detach(), expected.detach()
    if expected.is_quantized:
        assert got.qscheme() == expected.qscheme()
        assert torch.equal(got.int_repr(), expected.int_repr())
        if expected.qscheme() == torch.per_tensor_affine:
            assert_same(got.q_scale(), expected.q_scale())
            assert got.q_zero_point() == expected.q_zero_point()
        else:
            assert got.q_per_channel_axis() == expected.q_per_channel_axis()
            assert torch.equal(got.q_per_channel_scales(), expected.q_per_channel_scales())
            zeros = got.q_per_channel_zero_points(), expected.q_per_channel_zero_points()
            assert torch.equal(*zeros)
    elif expected.layout == torch.sparse_coo:
        assert got.is_coalesced() == expected.is_coalesced()
        assert_same(got._indices(), expected._indices())
        assert_same(got._values(), expected._values())
    elif expected.layout in _COMPRESSED:
        for name in (*_COMPRESSED[expected.layout], "values"):
            assert_same(getattr(got, name)(), getattr(expected, name)())
    else:
        assert bits(got) == bits(expected)


def bits(tensor: torch.Tensor) -> bytes:
    """The elements of a strided tensor, as it reads, in C order."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)
    plain.copy_(tensor.resolve_conj().resolve_neg())
    memory = torch.empty(0, dtype=torch.uint8).set_(plain.untyped_storage())
    return memory.numpy().tobytes()
