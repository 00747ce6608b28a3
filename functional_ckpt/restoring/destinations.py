"""The memory that an array is read into: the target's own if possible, else new memory like it."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch

from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.restore_plan import plan
from functional_ckpt.core.tree import decode, encode, memory, structure
from functional_ckpt.runtime import device_copies


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceDestination:
    """Memory on a device for an array."""

    target: torch.Tensor
    value: torch.Tensor


def host_destination(read: plan.ReadArray) -> decode.Destination:
    """Returns the memory for one array."""
    if read.form == "fill":
        return _fill(read.node, cast("torch.Tensor", read.like))
    if read.form == "tensor":
        return _like(read.node, cast("torch.Tensor", read.like))
    node = read.node
    if read.form == "ndarray":
        node = dataclasses.replace(node, kind="ndarray", detail={})
    return decode.allocate(node)


def _local_node(node: structure.ArrayNode, tensor: torch.Tensor) -> structure.ArrayNode:
    """Returns this rank's part as a new array: the stored dtype, the local shape."""
    local = sharding.local_of(tensor)
    detail = {key: value for key, value in node.detail.items() if key == "dtype"}
    spec = dataclasses.replace(node.spec, shape=tuple(local.shape))
    return dataclasses.replace(node, kind="tensor", spec=spec, detail=detail)


def _fill(node: structure.ArrayNode, tensor: torch.Tensor) -> decode.Destination:
    local = tensor if memory.is_plain(tensor) else cast("torch.Tensor", sharding.local_of(tensor))
    if _is_direct(node, local):
        return decode.Destination(encode.host_view(local, node.spec.dtype), lambda: tensor)
    detour = decode.allocate(_local_node(node, tensor))

    def finish() -> torch.Tensor:
        with memory.writing(local):
            local.copy_(cast("torch.Tensor", detour.finish()))
        return tensor

    return decode.Destination(detour.array, finish)


def is_streamed(read: plan.ReadArray) -> bool:
    """Returns whether an array is wanted on a device that gets its bytes piece by piece."""
    return read.form in ("fill", "tensor") and device_copies.is_streamed(read.like)


def device_destination(read: plan.ReadArray) -> DeviceDestination | None:
    """Returns the destination for a plain contiguous tensor; None if it needs a host copy."""
    like = cast("torch.Tensor", read.like)
    if not is_streamed(read) or not memory.is_contiguous_strided(like):
        return None
    if read.node.dtype != encode.torch_dtype_name(like.dtype):
        return None
    value = like
    if read.form == "tensor":
        value = decode.apply_tensor_role(torch.empty_like(like.detach()), encode.tensor_role(like))
    return DeviceDestination(value.detach().view(-1).view(torch.uint8), value)


def _is_direct(node: structure.ArrayNode, tensor: torch.Tensor) -> bool:
    """Returns whether bytes can be read directly into the tensor's memory."""
    if not tensor.is_cpu or node.dtype != encode.torch_dtype_name(tensor.dtype):
        return False
    return memory.is_contiguous_strided(tensor) or (
        type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and tensor.layout == torch.strided
        and not (tensor.is_conj() or tensor.is_neg() or memory.is_expanded(tensor))
    )


def _like(node: structure.ArrayNode, like: torch.Tensor) -> decode.Destination:
    """Returns new memory with dtype, device and sharding of `like`; on the CPU if it is meta."""
    new = decode.allocate(_local_node(node, like))

    def finish() -> Any:
        local = cast("torch.Tensor", new.finish()).to(like.dtype)
        mesh = getattr(like, "device_mesh", None)
        if mesh is None:
            return decode.apply_tensor_role(
                local, encode.tensor_role(like), None if like.is_meta else like.device
            )
        tensor = cast("Any", like).__class__.from_local(
            local.to(mesh.device_type),
            mesh,
            cast("Any", like).placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return decode.apply_tensor_role(tensor, encode.tensor_role(like))

    return decode.Destination(new.array, finish)
