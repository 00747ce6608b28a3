"""The values of the golden checkpoints, from literals: equal on every machine and torch version.

Never change the values of a committed version: a new format gets a new folder, and new values if
need be.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree

__all__ = ["Pair", "Point", "Wrapped", "module", "optimizer", "orbax_tree", "tree"]

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "complex32")
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Point:
    """A registered pytree node."""

    x: Any
    y: Any


def _flatten(point: Point) -> tuple[list[Any], dict[str, Any]]:
    return [point.x, point.y], {"unit": "m"}


def _unflatten(children: Any, context: Any) -> Point:
    if context != {"unit": "m"}:
        raise ValueError(f"context {context!r}")
    return Point(*children)


_pytree.register_pytree_node(
    Point, _flatten, _unflatten, serialized_type_name="functional_ckpt.golden.Point"
)


class Wrapped(torch.Tensor):
    """A tensor subclass made of two tensors."""

    inner: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, scale: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: torch.Tensor, scale: torch.Tensor) -> None:
        self.inner, self.scale = inner, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner", "scale"], {"bits": 8}

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], context: Any, shape: Any, strides: Any
    ) -> Wrapped:
        if context != {"bits": 8} or tuple(shape) != tuple(inner["inner"].shape):
            raise ValueError(f"context {context!r}, shape {shape!r}, strides {strides!r}")
        return cls(inner["inner"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner, args[0].scale)
        raise NotImplementedError(f"{func}")


def bits(name: str) -> torch.Tensor:
    """Six elements of any dtype from fixed bytes: NaN payloads and denormals among them."""
    dtype = getattr(torch, name)
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.arange(6 * size, dtype=torch.uint8).mul(37).view(dtype).reshape(2, 3)


def tree() -> dict[Any, Any]:
    """Every kind of leaf and container that is restored as it was without a target."""
    shared = torch.arange(6.0)
    values = torch.tensor([1.0, 2.0, 3.0])
    pointers, indices = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
    counter = collections.Counter({"a": 2, "b": 0})
    defaults = collections.defaultdict(list, {"k": [1]})
    compressed, blocked = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2])
    diagonal, checked = torch.tensor([0, 1]), {"check_invariants": True}
    blocks = torch.arange(8.0).reshape(2, 2, 2)
    return {
        "none": None,
        "bools": [True, False],
        "ints": [0, -1, 2**53, 2**63, -(2**80)],
        "floats": [0.1, float("inf"), float("-inf"), float("nan"), -0.0, 5e-324],
        "complex": complex(-0.0, float("inf")),
        "texts": ["", "é💾\n", "lone \ud800 surrogate"],
        "bytes": [b"", bytes(range(256))],
        "torch": [torch.bfloat16, torch.device("cuda", 1), torch.Size([2, 3])],
        "sequences": ((1,), [2, ()], collections.deque([3], maxlen=4)),
        "empties": [{}, [], (), collections.OrderedDict(), collections.deque()],
        "mappings": [collections.OrderedDict(b=1, a=2), defaults, counter],
        "keys": {
            1: 1,
            "1x": 2,
            2.5: 3,
            False: 4,
            None: 5,
            b"k": 6,
            (1, ("a", None)): 7,
            "": 8,
            "a.b": 9,
            "a/b": 10,
            "ключ": 11,
        },
        "registered": Point(torch.arange(3), [1, "m"]),
        "tensors": {name: bits(name) for name in (*INTEGERS, *FLOATS, *FLOAT8)},
        "bool tensor": torch.tensor([True, False, True]),
        "float4": torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "zero dims": torch.tensor(2.5),
        "zero size": [torch.empty(0), torch.empty(2, 0, 3, dtype=torch.bfloat16)],
        "ragged": torch.arange(5 * 7, dtype=torch.int16).reshape(5, 7),
        "tied": [shared, {"again": shared}, torch.nn.Parameter(shared)],
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "numpy": [
            *(np.arange(4, dtype=">i4"), np.float32(1.5), np.array("x"), np.array([b"ab", b"c"])),
            *(np.array(["2020-02-29"], "M8[D]"), np.asfortranarray(np.ones((2, 3), np.uint16))),
        ],
        "sparse": [
            torch.sparse_coo_tensor(
                torch.tensor([[0, 1, 1], [2, 0, 2]]), values, (2, 3), **checked
            ),
            torch.sparse_csr_tensor(pointers, indices, values, (2, 3), **checked),
            torch.sparse_csc_tensor(compressed, torch.tensor([0, 1, 0]), values, (2, 3), **checked),
            torch.sparse_bsr_tensor(blocked, diagonal, blocks, (4, 4), **checked),
            torch.sparse_bsc_tensor(blocked, diagonal, blocks, (4, 4), **checked),
        ],
        "quantized": [
            torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.qint8),
            torch.quantize_per_channel(
                torch.ones(2, 2), torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.quint8
            ),
        ],
    }


def module(*, filled: bool) -> torch.nn.Module:
    """A module with a tied parameter and a buffer; zeros, or the numbers of the checkpoint."""
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = torch.nn.Sequential(first, torch.nn.BatchNorm1d(3), second)
    with torch.no_grad():
        for index, tensor in enumerate(model.state_dict().values()):
            numbers = torch.arange(tensor.numel()).reshape(tensor.shape) + 10 * index
            tensor.copy_(numbers if filled else torch.zeros(()))
    return model


def optimizer(model: torch.nn.Module, *, filled: bool) -> torch.optim.Optimizer:
    """AdamW over it, in two groups; with the checkpoint's state, or fresh."""
    parameters = list(model.parameters())
    new = torch.optim.AdamW([{"params": parameters[:1], "lr": 0.25}, {"params": parameters[1:]}])
    if filled:
        for index, parameter in enumerate(parameters):
            new.state[parameter] = {
                "step": torch.tensor(float(3 + index)),
                "exp_avg": torch.full_like(parameter, 0.5 + index),
                "exp_avg_sq": torch.full_like(parameter, 0.125 * (1 + index)),
            }
    return new


def seed() -> None:
    """Puts the global generators where they were when the checkpoint was written."""
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)


def orbax_tree() -> dict[str, Any]:
    """Orbax's values, as numpy arrays and plain values."""
    return {
        "params": {
            "kernel": np.arange(12, dtype=np.float32).reshape(3, 4) / 8,
            "mask": np.array([True, False]),
        },
        "layers": [np.arange(3, dtype=np.int32), {"count": np.array(7, np.int64)}],
        "step": 12,
        "rate": 0.1,
        "nothing": None,
        "empty": {},
    }
