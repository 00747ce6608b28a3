"""Encodes tensors, numpy arrays and plain values as leaves.

A leaf codec is two pure halves. This one turns a value into a node and a *source*, a tensor over
the caller's own memory from which the bytes will be copied; `decode` is the other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.arrays import spec as spec_lib
from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.core.tree import long_lists, memory, plain_json, structure

_CARRIED_BY = spec_lib.CARRIED_BY
# numpy kinds without a zarr counterpart: datetimes as their 64-bit counts.
_NUMPY_CARRIED_BY = {"M": "int64", "m": "int64"}
# Dtypes that other programs store and torch has not: these come back as numpy arrays of ml_dtypes.
NUMPY_ONLY = ("int2", "int4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz")
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.cache
@functools.cache
def torch_dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """`float32` -> `torch.float32`.

    Raises:
        UsageError: This torch has none of that name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise errors.UsageError(f"This torch {torch.__version__} has no dtype {name!r}.")
    return dtype


# ---------------------------------------------------------------------------------------- values


_PLAIN_KINDS: Mapping[type, str] = {
    type(None): "none",
    bool: "bool",
    int: "int",
    float: "float",
    complex: "complex",
    str: "str",
}


_MUTABLE_KINDS = ("set", "namespace")


def value_node(value: object) -> structure.ValueNode | None:
    """Returns the node of a plain value; None for anything else, also for subclasses."""
    if (kind := _PLAIN_KINDS.get(type(value))) is not None:
        return structure.ValueNode(kind=kind, value=value)
    if isinstance(value, torch.dtype):
        return structure.ValueNode(kind="torch_dtype", value=torch_dtype_name(value))
    if isinstance(value, torch.device):
        return structure.ValueNode(kind="torch_device", value=str(value))
    if (kind := plain_json.kind_of(value)) is not None and plain_json.is_plain(value):
        if kind in _MUTABLE_KINDS:  # a copy: the caller may change it before it is written
            value = plain_json.decode(kind, plain_json.encode(value))
        return structure.ValueNode(kind=kind, value=value)
    return long_lists.to_node(value)


def plain_value(node: structure.ValueNode) -> object:
    """Returns the value of a value node."""
    if long_lists.is_long(node):
        return long_lists.value_of(node)
    if node.kind == "torch_dtype":
        return torch_dtype(str(node.value))
    if node.kind == "torch_device":
        try:
            return torch.device(str(node.value))
        except RuntimeError as error:
            raise errors.CorruptCheckpointError(f"Not a device: {node.value!r:.80}.") from error
    return node.value


# ------------------------------------------------------------------------------------ array to node


def array_node(value: object, name: str) -> structure.ArrayNode | None:
    """Returns the node of a strided tensor, a numpy array or scalar, or bytes; else None.

    Raises:
        UnsupportedLeafError: The value is an array whose dtype or data cannot be carried.
    """
    if isinstance(value, torch.Tensor):
        return _tensor_node(value, name)
    if isinstance(value, (np.ndarray, np.generic)):
        return _numpy_node(value, name)
    if type(value) is bytes:
        return structure.ArrayNode(
            kind="bytes", spec=spec_lib.ArraySpec((len(value),), "uint8"), name=name
        )
    return None


_MAX_DESCRIBED = 4096
_described: dict[object, tuple[spec_lib.ArraySpec, Mapping[str, object]]] = {}


def ordinary_node(tensor: torch.Tensor, name: str) -> structure.ArrayNode:
    """As `array_node`, for an ordinary tensor; equal tensors share their description."""
    try:
        key = (type(tensor), tensor.shape, tensor.dtype, tensor.requires_grad)
    except RuntimeError as error:
        raise _without_shape(error) from error
    described = _described.get(key)
    if described is None:
        node = _tensor_node(tensor, name)
        if len(_described) >= _MAX_DESCRIBED:
            _described.clear()
        described = _described[key] = (node.spec, node.detail)
    return structure.ArrayNode(kind="tensor", spec=described[0], name=name, detail=described[1])


def _without_shape(error: RuntimeError) -> errors.UnsupportedLeafError:
    return errors.UnsupportedLeafError(
        f"a nested tensor without a shape cannot be stored ({error}); save value.unbind(), a list, "
        "or make it with layout=torch.jagged"
    )


def _tensor_node(tensor: torch.Tensor, name: str) -> structure.ArrayNode:
    if tensor.is_nested:
        raise _without_shape(RuntimeError("torch.nested, layout=torch.strided"))
    if not memory.can_be_imitated(tensor):
        raise errors.UnsupportedLeafError(
            f"{type(tensor).__module__}.{type(tensor).__qualname__} is a subclass of torch.Tensor "
            "without __tensor_flatten__: its class and attributes would be lost; pass a plain "
            "tensor of its values, value.as_subclass(torch.Tensor) where it has memory of its own"
        )
    dtype = torch_dtype_name(tensor.dtype)
    stored = _CARRIED_BY.get(dtype, dtype)
    if stored not in spec_lib.STORAGE_DTYPES or stored in NUMPY_ONLY:
        raise errors.UnsupportedLeafError(
            f"dtype {tensor.dtype} cannot be stored (torch itself cannot copy it); "
            "convert the tensor to an ordinary dtype, or leave it out of the item"
        )
    detail: dict[str, object] = {}
    if dtype != stored:
        detail["dtype"] = dtype
    detail |= tensor_role(tensor)
    is_sharded = sharding.sharding_of(tensor) is not None
    if not is_sharded and not tensor.is_contiguous() and _is_dense(tensor):
        # channels_last and transposed layouts come back with the same strides; other views come
        # back compact.
        detail["strides"] = list(tensor.stride())
    return structure.ArrayNode(
        kind="tensor",
        spec=spec_lib.ArraySpec(tuple(tensor.shape), stored),
        name=name,
        detail=detail,
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Returns whether the elements fill one gapless block of memory in some order of the dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0


def _numpy_node(array: Array | np.generic, name: str) -> structure.ArrayNode:
    kind = "ndarray" if isinstance(array, np.ndarray) else "numpy_scalar"
    if kind == "ndarray" and type(array) is not np.ndarray:
        raise errors.UnsupportedLeafError(
            f"{type(array).__name__} is a subclass of numpy.ndarray whose extra state would be "
            "lost; pass numpy.asarray(value)"
        )
    detail: dict[str, object] = {}
    dtype = array.dtype
    stored = _NUMPY_CARRIED_BY.get(dtype.kind) or dtype.name
    shape: tuple[int, ...] = tuple(array.shape)
    if dtype.kind in "MmSU" or not dtype.isnative:
        detail["dtype"] = dtype.str
        stored = _NUMPY_CARRIED_BY.get(dtype.kind) or dtype.newbyteorder("=").name
    if dtype.kind in "SU":
        stored, shape = "uint8", (*shape, dtype.itemsize)
    if stored not in spec_lib.STORAGE_DTYPES:
        raise errors.UnsupportedLeafError(
            f"numpy dtype {dtype} cannot be stored; convert it to a numeric dtype, or use lists or "
            "fc.Json"
        )
    if isinstance(array, np.ndarray) and array.flags.f_contiguous and not array.flags.c_contiguous:
        detail["order"] = "F"
    return structure.ArrayNode(
        kind=kind, spec=spec_lib.ArraySpec(shape, stored), name=name, detail=detail
    )


# ------------------------------------------------------------------------------------ node to bytes


def source_of(value: object, node: structure.ArrayNode) -> torch.Tensor:
    """Returns a tensor over the value's own memory, of the torch twin of the node's storage dtype.

    Copies only values without contiguous memory: conj and neg views, read-only or foreign-endian
    numpy arrays, numpy scalars and bytes.
    """
    if isinstance(value, torch.Tensor):
        # Detached even if it wants no gradient: `.data` may give the live one other memory.
        local = value if memory.is_plain(value) else sharding.local_of(value)
        if memory.is_wrapper(local):
            raise errors.UnsupportedLeafError(why_wrapped(local))
        tensor = local.detach()
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        if "dtype" in node.detail:
            tensor = tensor.view(torch_dtype(node.spec.dtype))
        return tensor
    if isinstance(value, bytes):
        return torch.from_numpy(np.frombuffer(value, np.uint8).copy())
    array = np.asarray(value)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind in "SU":  # each element becomes a row of bytes
        data = bytearray(array.tobytes())[: node.spec.size_bytes]  # an empty scalar grows to U1
        array = np.array(data, np.uint8).reshape(node.spec.shape)
    stored = spec_lib.numpy_dtype(node.spec.dtype)
    if array.dtype != stored:
        array = array.view(stored)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return tensor_over(array)


def why_wrapped(local: torch.Tensor) -> str:
    """Why a DTensor over a tensor subclass is no leaf."""
    kind = f"{type(local).__module__}.{type(local).__qualname__}"
    if memory.is_fake(local):
        return f"the local tensor of this DTensor is a {kind}, which has no values"
    return (
        f"the local tensor of this DTensor is a {kind}, a subclass without memory of its own, and "
        "the parts of such tensors cannot be put together over ranks; save a DTensor of plain "
        "tensors, or each rank's value with fc.Stateful(value, per_rank=True)"
    )


def tensor_over(array: Array) -> torch.Tensor:
    """Returns a tensor sharing a numpy array's memory, whatever its dtype."""
    if _is_registered(array.dtype):  # ml_dtypes register as void: go through an integer as wide
        carrier = torch.from_numpy(array.view(np.dtype(f"i{array.itemsize}")))
        name = array.dtype.name
        return carrier if name in NUMPY_ONLY else carrier.view(torch_dtype(name))
    return torch.from_numpy(array)


def host_view(tensor: torch.Tensor, dtype: str) -> Array:
    """Returns a numpy array of storage dtype `dtype` over the memory of a CPU tensor; no copy."""
    target, carrier = _host_dtypes(tensor.dtype, dtype)
    if tensor.requires_grad:
        tensor = tensor.detach()
    if carrier is not None:
        tensor = tensor.view(carrier)
    array = cast("Array", tensor.numpy())
    return array if array.dtype == target else array.view(target)


@functools.cache
def _host_dtypes(dtype: torch.dtype, stored: str) -> tuple[np.dtype[Any], torch.dtype | None]:
    """Returns the numpy dtype of the stored data, and the dtype to view a tensor as, if needed."""
    target = spec_lib.numpy_dtype(stored)
    if _is_registered(target) or torch_dtype_name(dtype) in _CARRIED_BY:
        return target, _INT_OF_SIZE[target.itemsize]
    return target, None


def _is_registered(dtype: np.dtype[Any]) -> bool:
    """Returns whether it is one of ml_dtypes; their kinds differ (float8_e5m2 `f`, others `V`)."""
    return dtype.isbuiltin == 2


def tensor_role(tensor: torch.Tensor) -> dict[str, object]:
    """Returns the role of a tensor, as a detail: Parameter, Buffer, requires_grad."""
    if isinstance(tensor, torch.nn.Parameter):
        return {"parameter": True, **({} if tensor.requires_grad else {"requires_grad": False})}
    detail: dict[str, object] = {"requires_grad": True} if tensor.requires_grad else {}
    if isinstance(tensor, torch.nn.Buffer):
        detail["buffer"] = "persistent" if tensor.persistent else "transient"
    return detail
