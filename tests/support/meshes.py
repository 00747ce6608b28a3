"""Known global arrays, and the parts of each rank of a mesh by torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

Layout: TypeAlias = tuple[int, ...]
"""Shape of a mesh over all ranks; () for plain tensors, on one process."""

SHAPES = (
    *((n,) for n in (1, 3, 5, 7, 10)),
    *((a, b) for a, b in ((1, 10), (3, 5), (5, 7), (7, 3), (10, 1), (10, 10))),
    (3, 7, 5),
    (2, 0),
)
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


def names(layout: Layout) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Any]]:
    """Name, shape, dtype and placements of every tensor of a tree; equal names are equal arrays."""
    for place, shape in enumerate(SHAPES):
        dtype = DTYPES[place % len(DTYPES)]
        for variant in range(6):
            name = f"{'x'.join(map(str, shape))}_{variant}"
            yield name, shape, dtype, placements(layout, len(shape), variant)
    yield "scalar", (), torch.float32, tuple(Replicate() for _ in layout)


def placements(layout: Layout, num_dims: int, variant: int) -> tuple[Placement, ...]:
    """One of the ways to spread an array of `num_dims` dims over a mesh."""
    last = num_dims - 1
    if len(layout) < 2:
        return ((Shard(0),), (Shard(last),), (Replicate(),))[variant % 3][: len(layout)]
    strided = _StridedShard(0, split_factor=layout[1])
    return (
        (Shard(0), Shard(last)),  # FSDP x TP, rowwise
        (strided, Shard(0)),  # FSDP x TP, colwise
        (Replicate(), Shard(0)),  # HSDP
        (Shard(last), Replicate()),
        (Shard(0), Shard(0)),
        (Replicate(), Replicate()),
    )[variant]


def whole(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The global array of a name: every element depends on its index and on the name."""
    seed = sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2**15), 2**15, (math.prod(shape) or 0,), generator=generator)
    return values.reshape(shape).to(dtype)


def local_part(tensor: torch.Tensor, mesh: DeviceMesh, spread: Any) -> torch.Tensor:
    """This rank's part, by torch's own splitting; none of the code under test has a say."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for mesh_dim, placement in enumerate(spread):
        if not placement.is_replicate():
            parts, _ = placement._split_tensor(tensor, mesh.size(mesh_dim), with_padding=False)
            tensor = parts[coordinate[mesh_dim]]
    return tensor


def tree(layout: Layout, *, filled: bool) -> dict[str, torch.Tensor]:
    """Every tensor of a layout, as saved; or of the same shapes, with other values in them."""
    mesh = init_device_mesh("cpu", layout) if layout else None
    found: dict[str, torch.Tensor] = {}
    for name, shape, dtype, spread in names(layout):
        tensor = whole(name, shape, dtype)
        if not filled:
            tensor = torch.zeros_like(tensor)
        if mesh is not None:
            tensor = DTensor.from_local(
                local_part(tensor, mesh, spread).clone(),
                mesh,
                spread,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )
        found[name] = tensor
    return found


def wrong(got: dict[str, Any], layout: Layout) -> list[str]:
    """Names whose value on this rank is not, bit for bit, its part of the global array."""
    mesh = init_device_mesh("cpu", layout) if layout else None
    bad: list[str] = []
    for name, shape, dtype, spread in names(layout):
        expected, tensor = whole(name, shape, dtype), got[name]
        if mesh is not None:
            if not isinstance(tensor, DTensor) or tensor.placements != tuple(spread):
                bad.append(f"{name}: {tensor!r:.80}")
                continue
            expected, tensor = local_part(expected, mesh, spread), tensor.to_local()
        if tensor.dtype != expected.dtype or not torch.equal(tensor, expected):
            bad.append(f"{name}: got {tensor!r:.200}, expected {expected!r:.200}")
    return bad
