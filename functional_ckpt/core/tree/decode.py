"""Leaves built again: memory that restore fills, and the value that it becomes.

The other half of the codec of `encode`: `allocate` turns a stored node into a *destination*, an
array that restore fills, and `finish`, which makes the value out of it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import spec as spec_lib
from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.core.tree import encode, structure

_ALIGNED_FROM_BYTES = 2**20
_UNFIT = (TypeError, ValueError, OverflowError, RuntimeError, MemoryError)


class Destination(NamedTuple):
    """Host memory that restore fills, and the value it becomes.

    Attributes:
        array: The memory, of the shape of this rank's part; may be strided.
        finish: Called once after the last byte is in `array`; returns the restored value.
    """

    array: Array
    finish: Callable[[], object]


def allocate(node: structure.ArrayNode) -> Destination:
    """New memory for an array as it was saved: the same kind, dtype and layout.

    Raises:
        CorruptCheckpointError: No such array can exist (`finish` raises it too).
        StorageError: There is not enough memory.
    """
    try:
        new = _allocate(node)
    except _UNFIT as error:
        raise _unfit(node, error) from error

    def finish() -> object:
        try:
            return new.finish()
        except _UNFIT as error:
            raise _unfit(node, error) from error

    return Destination(new.array, finish)


def _unfit(node: structure.ArrayNode, error: Exception) -> errors.CheckpointError:
    if isinstance(error, errors.CheckpointError):
        return error
    if isinstance(error, MemoryError) or "allocate" in str(error):
        return errors.StorageError(
            f"Out of memory: cannot allocate {node.spec.size_bytes} bytes for {node.name!r}: "
            f"{error}",
            errno=errno.ENOMEM,
            key_path=node.name,
        )
    return errors.CorruptCheckpointError(
        f"Cannot decode leaf {node.name!r}: {type(error).__name__}: {error}",
        key_path=node.name,
    )


def _allocate(node: structure.ArrayNode) -> Destination:
    if node.kind == "tensor" and node.spec.dtype not in encode.NUMPY_ONLY:
        tensor = _new_tensor(node)
        destination = encode.host_view(tensor, node.spec.dtype)
        return Destination(destination, lambda: apply_tensor_role(tensor, node.detail))
    dtype = spec_lib.numpy_dtype(node.spec.dtype)
    array = _new_array(node, dtype)
    if node.kind == "bytes":
        return Destination(array, array.tobytes)
    if node.kind in ("ndarray", "tensor"):
        return Destination(array, lambda: _numpy_value(array, node))
    if node.kind == "numpy_scalar":
        return Destination(array, lambda: _numpy_value(array, node)[()])
    if node.kind == "number":
        return Destination(array, lambda: array[()].item())
    raise errors.CorruptCheckpointError(f"Unknown kind of array {node.kind!r}.", key_path=node.name)


def _new_array(node: structure.ArrayNode, dtype: np.dtype[Any]) -> Array:
    """Returns an uninitialised array of the node's shape and layout; torch allocates large ones.

    It starts at a multiple of 64 bytes. numpy's memory starts 16 bytes after a page, where the
    kernel copies at a quarter of the speed on some processors.
    """
    order = "C" if _is_text(node) else _order(node)
    if node.spec.size_bytes < _ALIGNED_FROM_BYTES:
        return np.empty(node.spec.shape, dtype, order=order)
    flat = torch.empty(node.spec.size_bytes, dtype=torch.uint8, device="cpu").numpy().view(dtype)
    return flat.reshape(node.spec.shape, order=order)


def _new_tensor(node: structure.ArrayNode) -> torch.Tensor:
    """Returns an uninitialised CPU tensor of the node's torch dtype, shape and layout."""
    name = node.dtype
    strides = node.detail.get("strides")
    carrier = encode.torch_dtype(node.spec.dtype)
    if isinstance(strides, list):
        tensor = torch.empty_strided(
            node.spec.shape, cast("list[int]", strides), dtype=carrier, device="cpu"
        )
    else:
        tensor = torch.empty(node.spec.shape, dtype=carrier, device="cpu")
    return tensor.view(encode.torch_dtype(name)) if name != node.spec.dtype else tensor


def apply_tensor_role(
    tensor: torch.Tensor, detail: Mapping[str, object], device: torch.device | None = None
) -> torch.Tensor:
    """Returns a filled CPU tensor on the leaf's device and in its recorded role."""
    if device is not None and device != tensor.device:
        tensor = tensor.to(device)
    if detail.get("parameter"):
        requires_grad = bool(detail.get("requires_grad", True))
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    if "buffer" in detail:
        tensor = torch.nn.Buffer(tensor, persistent=detail["buffer"] == "persistent")
    if detail.get("requires_grad"):
        tensor.requires_grad_()
    return tensor


def _order(node: structure.ArrayNode) -> Literal["C", "F"]:
    return "F" if node.detail.get("order") == "F" else "C"


def _is_text(node: structure.ArrayNode) -> bool:
    """Returns whether it is an array of strings; on disk its last dim is the bytes of a string."""
    return str(node.detail.get("dtype", ""))[1:2] in ("S", "U")


def _numpy_value(array: Array, node: structure.ArrayNode) -> Array:
    name = node.detail.get("dtype")
    if name is None:
        return array
    dtype = np.dtype(str(name))
    if dtype.kind in "SU":
        shape = node.spec.shape[:-1]
        if not dtype.itemsize:
            return np.zeros(shape, dtype)
        native = np.ndarray(shape, dtype.newbyteorder("="), array.tobytes())
        return native.astype(dtype, order=_order(node))
    if dtype.kind in "Mm":
        return array.view(dtype.newbyteorder("=")).astype(dtype, copy=False)
    return array.astype(dtype)
