"""Orbax's view of native values, and comparison of trees to the last bit."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import torch

from functional_ckpt.core.arrays import spec
from functional_ckpt.core.tree import encode, long_lists


def as_orbax(value: Any) -> Any:
    """Orbax's restored form of `value`: string keys, lists, numpy arrays, plain values."""
    if isinstance(value, dict):
        return {str(key): as_orbax(child) for key, child in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: as_orbax(child) for name, child in zip(value._fields, value, strict=True)}
    if isinstance(value, tuple) and not value:
        return ()
    if (long := long_lists.to_node(value)) is not None:
        return long.value if long.kind == long_lists.PLAIN_LIST else np.array(long.value)
    if isinstance(value, (list, tuple, collections.deque)):
        return [as_orbax(child) for child in value]
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, (np.ndarray, np.generic)):
        node = encode.array_node(value, "x")
        assert node is not None
        return encode.host_view(encode.source_of(value, node), node.spec.dtype)
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8)
    if isinstance(value, complex):
        return np.array(value)
    if type(value) is int and not -(2**63) <= value < 2**63:
        return hex(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    return value


def _tensor(tensor: torch.Tensor) -> Any:
    if tensor.layout == torch.sparse_coo:
        return {"indices": _tensor(tensor._indices()), "values": _tensor(tensor._values())}
    if tensor.is_quantized:
        return {
            "int_repr": _tensor(tensor.int_repr()),
            "scale": tensor.q_scale(),
            "zero_point": tensor.q_zero_point(),
        }
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    name = encode.torch_dtype_name(tensor.dtype)
    carrier = {"complex32": "int32", "float4_e2m1fn_x2": "uint8"}.get(name, name)
    size = tensor.element_size()
    integers = {
        1: torch.uint8,
        2: torch.int16,
        4: torch.int32,
        8: torch.int64,
        16: torch.complex128,
    }
    if not tensor.numel():
        return np.empty(tuple(tensor.shape), spec.numpy_dtype(carrier))
    bits = tensor.view(integers[size]).numpy()
    return bits.view(spec.numpy_dtype(carrier))


def differences(got: Any, expected: Any, path: str = "") -> list[str]:
    """Where two trees differ in container, type, dtype, shape or a single bit."""
    if isinstance(expected, dict):
        if not isinstance(got, dict) or set(got) != set(expected):
            return [f"{path}: keys of {got!r:.200}, expected {sorted(map(str, expected))}"]
        pairs = [(got[key], expected[key], f"{path}[{key!r}]") for key in expected]
        return [line for a, b, where in pairs for line in differences(a, b, where)]
    if isinstance(expected, (list, tuple)):
        if type(got) is not type(expected) or len(got) != len(expected):
            kind = type(expected).__name__
            return [f"{path}: {got!r:.200}, expected a {kind} of {len(expected)}"]
        pairs = zip(got, expected, range(len(got)), strict=True)
        return [line for a, b, i in pairs for line in differences(a, b, f"{path}[{i}]")]
    if isinstance(expected, np.ndarray):
        array = np.asarray(got)
        if array.dtype != expected.dtype or array.shape != expected.shape:
            return [
                f"{path}: {array.dtype}{array.shape}, expected {expected.dtype}{expected.shape}"
            ]
        return [] if array.tobytes() == expected.tobytes() else [f"{path}: other bytes"]
    if isinstance(expected, float) and expected != expected:
        return [] if got != got else [f"{path}: {got!r}, expected nan"]
    if type(got) is not type(expected) or got != expected:
        return [f"{path}: {got!r} ({type(got).__name__}), expected {expected!r}"]
    return []
