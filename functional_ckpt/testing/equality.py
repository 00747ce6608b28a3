"""Bit-for-bit comparison of restored and saved values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch

from functional_ckpt.core.tree import encode, flatten


def differences(got: Any, expected: Any, where: str = "value") -> list[str]:
    """Everything in which two pytrees differ; empty when they are equal bit for bit.

    Values, types, dtypes, keys, their order and containers all count; NaNs are equal when their
    bits are. Parameters and plain tensors differ; strides and devices do not count.

    Args:
        got: One pytree.
        expected: The other.
        where: Name of the root in the answer.

    >>> differences({"a": [1, 2.0]}, {"a": [1, 2]})
    ["value['a'][1]: got float 2.0, expected int 2"]
    """
    return list(_differences(got, expected, where))


def _differences(got: Any, expected: Any, where: str) -> Iterator[str]:
    if type(got) is not type(expected) and not _are_named_alike(got, expected):
        yield f"{where}: got {_show(got)}, expected {_show(expected)}"
    elif isinstance(expected, torch.Tensor):
        yield from _tensor_differences(got, expected, where)
    elif isinstance(expected, (np.ndarray, np.generic)):
        yield from _array_differences(got, cast("Any", expected), where)
    elif (opened := flatten.flatten_one_level(expected)) is not None:
        yield from _container_differences(got, opened, where)
    elif isinstance(expected, (float, complex)):
        if np.array(got).tobytes() != np.array(expected).tobytes():
            yield f"{where}: got {_show(got)}, expected {_show(expected)}"
    elif got != expected:
        yield f"{where}: got {_show(got)}, expected {_show(expected)}"


def _are_named_alike(got: Any, expected: Any) -> bool:
    """Named tuples whose class this process does not know come back as a new class of that name."""
    fields: Any = getattr(expected, "_fields", None)
    return (
        isinstance(got, tuple)
        and isinstance(expected, tuple)
        and fields is not None
        and (type(got).__name__, getattr(got, "_fields", None)) == (type(expected).__name__, fields)
    )


def _container_differences(got: Any, expected: flatten.FlatNode, where: str) -> Iterator[str]:
    found = flatten.flatten_one_level(got)
    if found is None or found.keys != expected.keys or found.detail != expected.detail:
        yield f"{where}: got {_show(found)}, expected {_show(expected)}"
        return
    if [type(key.value) for key in found.keys] != [type(key.value) for key in expected.keys]:
        yield f"{where}: keys of other types: got {found.keys}, expected {expected.keys}"
    children = zip(expected.keys, found.children, expected.children, strict=True)
    for key, one, other in children:
        yield from _differences(one, other, f"{where}[{key.value!r}]")


def _tensor_differences(got: torch.Tensor, expected: torch.Tensor, where: str) -> Iterator[str]:
    opened = flatten.flatten_one_level(expected)
    if got.layout != expected.layout or got.is_quantized != expected.is_quantized:
        yield f"{where}: got {_show(got)}, expected {_show(expected)}"
        return
    if opened is not None:  # sparse, quantized, subclass: equal in their parts
        yield from _container_differences(got, opened, where)
        return
    if (got.dtype, got.shape, got.requires_grad) != (
        expected.dtype,
        expected.shape,
        expected.requires_grad,
    ):
        yield (
            f"{where}: got {got.dtype}{list(got.shape)} requires_grad={got.requires_grad}, "
            f"expected {expected.dtype}{list(expected.shape)} "
            f"requires_grad={expected.requires_grad}"
        )
        return
    different = _bits(got) != _bits(expected)
    if different.any():
        num_different = int(different.any(axis=1).sum())
        yield f"{where}: {num_different} of {got.numel()} elements differ"


def _bits(tensor: torch.Tensor) -> Any:
    node = encode.array_node(tensor, "value")
    if node is None:
        raise TypeError(f"not a strided tensor: {_show(tensor)}")
    source = encode.source_of(tensor, node).cpu()
    host = np.ascontiguousarray(encode.host_view(source, node.spec.dtype))
    return host.reshape(-1).view(np.uint8).reshape(host.size, host.itemsize)


def _array_differences(got: Any, expected: Any, where: str) -> Iterator[str]:
    if got.dtype != expected.dtype or got.shape != expected.shape:
        yield f"{where}: got {got.dtype}{got.shape}, expected {expected.dtype}{expected.shape}"
    elif np.ascontiguousarray(got).tobytes() != np.ascontiguousarray(expected).tobytes():
        yield f"{where}: elements differ"


def _show(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value.layout} {value.dtype}{list(value.shape)}"
    return f"{type(value).__name__} {value!r:.80}"
