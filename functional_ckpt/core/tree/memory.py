"""Storage identity of leaves: which leaves share memory."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding

if TYPE_CHECKING:
    from collections.abc import Hashable

_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def _dispatch_of(kind: Any) -> object:
    return kind.__torch_dispatch__


_NO_DISPATCH = _dispatch_of(torch.Tensor)


def is_plain(value: object) -> bool:
    """Returns whether a value is of torch's own class: no DTensor, no other subclass."""
    return type(value) in _ORDINARY


def is_contiguous_strided(value: object) -> bool:
    """Returns whether a tensor is contiguous rows of its own memory: most are, and are fast."""
    if type(value) not in _ORDINARY:
        return False
    tensor = cast("torch.Tensor", value)
    return (
        tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not getattr(tensor, "_is_buffer", False)  # torch.nn.Buffer has no class of its own
        and not (tensor.is_meta or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
    )


def is_wrapper(value: torch.Tensor) -> bool:
    """Returns whether the tensor's class implements its operations, and has no memory itself."""
    return type(value) not in _ORDINARY and _dispatch_of(type(value)) is not _NO_DISPATCH


def is_opaque(value: torch.Tensor) -> bool:
    """Returns whether a tensor is a wrapper that cannot be taken apart: no DTensor, no parts.

    Fake tensors and ShardedTensors are such; most operations on one fail.
    """
    return (
        is_wrapper(value)
        and not callable(getattr(type(value), "__tensor_flatten__", None))
        and not hasattr(type(value), "device_mesh")
    )


def is_fake(value: torch.Tensor) -> bool:
    """Returns whether a tensor is one of torch's `FakeTensorMode`: a shape without values."""
    return type(value).__module__ == "torch._subclasses.fake_tensor"


def check_no_fake_mode() -> None:
    """Raises `UsageError` inside of a `FakeTensorMode`, where tensors have no values."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise errors.UsageError(
            "A FakeTensorMode is active, in which tensors have no values. Save and restore outside "
            "of its `with` block."
        )


def writing(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Returns the mode in which a tensor may be written: inference tensors need inference mode."""
    return torch.inference_mode() if tensor.is_inference() else torch.no_grad()


def is_expanded(tensor: torch.Tensor) -> bool:
    """Returns whether several elements share an address."""
    return any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def storage_key(value: object) -> Hashable | None:
    """Returns a key that is equal for leaves with the same memory and view; None if not shared."""
    if isinstance(value, torch.Tensor):
        is_ordinary = type(value) in _ORDINARY
        if not is_ordinary and is_opaque(value):
            return None
        if value.numel() == 0 or value.is_conj() or value.is_neg():
            return None
        pointer: Hashable
        if is_ordinary:
            pointer = value.data_ptr()
        else:
            local = sharding.local_of(value)
            if is_wrapper(local):
                return None  # its address is 0, as that of every other such tensor
            pointer = local.data_ptr()
            if local.numel() == 0:
                # This rank holds nothing of a sharded tensor, and there is no pointer to nothing:
                # all ranks must agree on ties, so the (empty) storage is used in its stead.
                pointer = (local.untyped_storage()._cdata, local.storage_offset())
        return ("torch", value.device, pointer, value.shape, value.stride(), value.dtype)
    if isinstance(value, np.ndarray) and value.size:
        pointer = value.__array_interface__["data"][0]
        return ("numpy", pointer, value.shape, value.strides, value.dtype.str)
    return None


def tie_key(tensor: torch.Tensor) -> Hashable | None:
    """As `storage_key`, for tensors on the meta device too, which a restore allocates once."""
    if not tensor.is_meta:
        return storage_key(tensor)
    local = sharding.local_of(tensor)
    storage = local.untyped_storage()._cdata
    return ("meta", storage, local.storage_offset(), tensor.shape, local.stride(), tensor.dtype)


def can_be_imitated(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor like this can be built from new memory: a plain one or a DTensor."""
    return is_plain(tensor) or sharding.sharding_of(tensor) is not None
