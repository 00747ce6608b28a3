"""One of everything that a pytree may hold, by name."""

from __future__ import annotations

import collections
import dataclasses
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch.utils import _pytree

__all__ = ["CASES", "Pair", "State", "TwoParts", "WithContext"]

Case = Callable[[], Any]


class Pair(NamedTuple):
    first: Any
    second: Any = 0


class Nothing(NamedTuple):
    pass


@dataclasses.dataclass
class State:
    """As a functional program keeps its state: registered by `register_dataclass`."""

    params: Any
    step: int
    schedule: Any = None
    ema: Any = None


class WithContext:
    """Registered with a context that is data and not a child."""

    def __init__(self, child: Any, context: Any) -> None:
        self.child = child
        self.context = context

    def __iter__(self) -> Any:
        return iter((self.child, self.context))

    def __len__(self) -> int:
        return 2


class Opaque(WithContext):
    """Registered with a context that only the program knows, and without keys."""


_pytree.register_dataclass(State)
_pytree.register_pytree_node(
    WithContext,
    lambda node: ([node.child], node.context),
    lambda children, context: WithContext(*children, context),
    serialized_type_name="tests.WithContext",
    flatten_with_keys_fn=lambda node: ([(_pytree.GetAttrKey("child"), node.child)], node.context),
)
_pytree.register_pytree_node(
    Opaque,
    lambda node: ([node.child], node.context),
    lambda children, context: Opaque(*children, context),
)


class TwoParts(torch.Tensor):
    """A wrapper subclass: the sum of two tensors that are kept apart."""

    low: torch.Tensor
    high: torch.Tensor
    scale: int

    @staticmethod
    def __new__(cls, low: torch.Tensor, high: torch.Tensor, scale: int) -> TwoParts:
        made = torch.Tensor._make_wrapper_subclass(cls, low.shape, dtype=low.dtype)
        made.low, made.high, made.scale = low, high, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["low", "high"], {"scale": self.scale, "names": ("low", "high")}

    @staticmethod
    def __tensor_unflatten__(parts: Any, context: Any, size: Any, stride: Any) -> TwoParts:
        assert context["names"] == ("low", "high")
        assert tuple(size) == tuple(parts["low"].shape)
        return TwoParts(parts["low"], parts["high"], context["scale"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return TwoParts(args[0].low.detach(), args[0].high.detach(), args[0].scale)
        raise NotImplementedError(func)


TENSOR_DTYPES = (
    *("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    "float4_e2m1fn_x2",
)
NUMPY_DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128", "<M8[ns]", "<m8[D]", "S3", "U2"),
    *(">i4", ">f8", ">c8", ">U2", ">M8[s]"),
)
ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
ML_DTYPES_MORE = ("float8_e8m0fnu", "float8_e3m4", "float8_e4m3b11fnuz")
SMALL_DTYPES = ("int2", "int4", "float4_e2m1fn")


def _random_bytes(num_bytes: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


def _tensor(dtype: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """A tensor of any bits: NaNs with payloads, subnormals, negative zeros."""
    kind = getattr(torch, dtype)
    data = _random_bytes(math.prod(shape) * torch.empty((), dtype=kind).element_size(), seed)
    if kind is torch.bool:
        data = data % 2
    flat = torch.from_numpy(data)
    return flat.view(kind).reshape(shape) if flat.numel() else torch.empty(shape, dtype=kind)


def _array(dtype: Any, *shape: int) -> np.ndarray[Any, Any]:
    kind = np.dtype(dtype)
    if kind.kind in "SU":
        words = np.array(["", "a", "é\U0001f600" if kind.kind == "U" else "b\1c", "zz"], object)
        return np.resize(words.astype(kind), shape)
    data = _random_bytes(math.prod(shape) * kind.itemsize)
    return (data % 2 if kind == np.bool_ else data).view(kind).reshape(shape)


def _nested(depth: int) -> Any:
    value: Any = {"leaf": torch.arange(3), "number": 1.5}
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def _read_only() -> np.ndarray[Any, Any]:
    array = np.arange(6)
    array.flags.writeable = False
    return array


def _coo(**options: Any) -> torch.Tensor:
    indices = torch.tensor([[0, 2, 2], [1, 0, 0]])
    return torch.sparse_coo_tensor(indices, torch.tensor([1.0, -0.0, 3.0]), (3, 2), **options)


def _hybrid() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.randn(2, 4), (3, 4))


def _blocks(layout: torch.layout) -> torch.Tensor:
    dense = torch.zeros(4, 6)
    dense[0, 0], dense[3, 5] = 1.5, float("nan")
    blocksize = (2, 3) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    return dense.to_sparse(layout=layout, blocksize=blocksize)


def _per_channel(axis: int) -> torch.Tensor:
    scales, zeros = torch.tensor([0.1, 0.25], dtype=torch.float64), torch.tensor([0, 3])
    return torch.quantize_per_channel(torch.randn(2, 2), scales, zeros, axis, torch.qint8)


def _jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.arange(2.0), torch.arange(3.0)], layout=torch.jagged)


def _nan(payload: int) -> float:
    return struct.unpack(">d", struct.pack(">Q", 0x7FF8000000000000 | payload))[0]


_VALUES: dict[str, Any] = {
    "none": None,
    "true": True,
    "false": False,
    "int_zero": 0,
    "int_negative": -7,
    "int_2_53": 2**53,
    "int_2_63": 2**63,
    "int_min_64": -(2**63),
    "int_huge": 10**400,
    "int_huge_negative": -(10**400) - 1,
    "int_beyond_decimal": 1 << 40_000,
    "float_nan": float("nan"),
    "float_nan_payload": _nan(0xDEAD),
    "float_nan_negative": -_nan(0xBEEF),
    "float_inf": float("inf"),
    "float_negative_inf": float("-inf"),
    "float_negative_zero": -0.0,
    "float_subnormal": 5e-324,
    "float_third": 1 / 3,
    "float_whole": 1e22,
    "float_max": 1.7976931348623157e308,
    "complex": 1.5 - 2j,
    "complex_odd": complex(-0.0, float("nan")),
    "str_empty": "",
    "str_nul": "a\0b",
    "str_emoji": "naïve \U0001f600\u2028",
    "str_surrogates": "\ud800x\udfff",
    "str_mixed_surrogate": "\U0001f600\ud800",
    "str_surrogate_pair": "\ud83d\ude00 \U0001f600\ud800",
    "str_long": "x" * 70_000,
    "bytes_empty": b"",
    "bytes": bytes(range(256)),
    "torch_dtype": torch.bfloat16,
    "torch_device": torch.device("cuda:1"),
}

_CONTAINERS: dict[str, Case] = {
    "dict_empty": dict,
    "list_empty": list,
    "tuple_empty": tuple,
    "ordered_dict_empty": collections.OrderedDict,
    "deque_empty": lambda: collections.deque(maxlen=3),
    "named_tuple_empty": Nothing,
    "empties_nested": lambda: {"a": {}, "b": [[], ()], "c": collections.Counter()},
    "list": lambda: [1, [2.0, [None]], "x"],
    "tuple": lambda: (1, (torch.ones(2), ()), b"x"),
    "named_tuple": lambda: Pair(torch.arange(2), Pair(1)),
    "ordered_dict": lambda: collections.OrderedDict([("z", 1), ("a", 2), ("m", torch.zeros(1))]),
    "dict_order": lambda: {"z": 1, "a": 2, "m": 3},
    "default_dict_list": lambda: collections.defaultdict(list, {"a": [1], "b": []}),
    "default_dict_none": lambda: collections.defaultdict(None, {"a": 1}),
    "counter": lambda: collections.Counter("abracadabra"),
    "deque": lambda: collections.deque([1, torch.ones(1), "c"], maxlen=5),
    "torch_size": lambda: torch.ones(2, 3).shape,
    "registered_dataclass": lambda: State({"w": torch.ones(2)}, 3, schedule=(1, 2)),
    "registered_dataclass_nested": lambda: [State(State(1, 2), 3, ema=torch.zeros(2))],
    "registered_context": lambda: WithContext(torch.ones(1), ("static", 1, {"a": [b"x", 1.5]})),
    "registered_context_nan": lambda: WithContext(1, [math.inf, None, 2j]),
    "keys_int": lambda: {0: 1, -3: torch.ones(1), 10**30: "big"},
    "keys_mixed": lambda: {
        0: "int",
        "a": "str",
        1.5: "float",
        None: "none",
        b"\xff": "bytes",
        (1, "x"): "tuple",
        (0, (None, b"")): "nested",
        float("inf"): "inf",
    },
    "keys_bool": lambda: {True: 1, False: torch.ones(2)},
    "keys_negative_zero": lambda: {-0.0: 1},
    "keys_dots": lambda: {"a.b": 1, "a": {"c": 2}, "..": 3, ".": torch.ones(1)},
    "keys_slashes": lambda: {"a/b": torch.ones(1), "a": torch.zeros(1), "../x": 1, "/y": 2},
    "keys_like_zarr": lambda: {"w": torch.ones(3), "w/c": torch.ones(()), "w/c/0": torch.zeros(2)},
    "keys_unicode": lambda: {"é": 1, "日本": torch.ones(1), "\U0001f600": 2, " ": 3, "\n": 4},
    "keys_odd": lambda: {"": 1, "%2e": 2, "?": torch.ones(2), "#": 3, "a b": 4, "\\": 5},
    "key_empty": lambda: {"": torch.ones(2)},
    "key_empty_nested": lambda: {"": {"": torch.ones(2), "x": 1}},
    "key_nul": lambda: {"a\0b": torch.ones(2)},
    "key_long": lambda: {"k" * 3000: torch.ones(2)},
    "deep": lambda: _nested(500),
    "wide": lambda: {f"layer{i}": torch.full((3,), i) for i in range(5_000)},
}

_NUMPY: dict[str, Case] = {
    **{f"{name}_2d": lambda name=name: _array(name, 3, 4) for name in NUMPY_DTYPES},
    **{f"{name}_0d": lambda name=name: _array(name) for name in NUMPY_DTYPES},
    **{f"{name}_empty": lambda name=name: _array(name, 0, 2) for name in NUMPY_DTYPES},
    **{f"{name}_scalar": lambda name=name: _array(name, 2)[1] for name in NUMPY_DTYPES},
    **{
        f"{name}_fortran": lambda name=name: np.asfortranarray(_array(name, 3, 4))
        for name in NUMPY_DTYPES
    },
    **{
        f"{name}_ml": lambda name=name: _array(getattr(ml_dtypes, name), 3, 4)
        for name in (*ML_DTYPES, *ML_DTYPES_MORE)
    },
    **{
        f"{name}_ml_scalar": lambda name=name: _array(getattr(ml_dtypes, name), 2)[1]
        for name in (*ML_DTYPES, *ML_DTYPES_MORE)
    },
    **{
        f"{name}_ml": lambda name=name: np.arange(-2, 2).astype(getattr(ml_dtypes, name))
        for name in SMALL_DTYPES
    },
    "read_only": _read_only,
    "negative_strides": lambda: np.arange(6).reshape(2, 3)[::-1, ::-1],
    "strided": lambda: np.arange(20).reshape(4, 5)[::2, 1::2],
    "broadcast": lambda: np.broadcast_to(np.arange(3), (2, 3)),
    "nat": lambda: np.array(["NaT", "2020-01-01"], "M8[D]"),
    "str_scalar_empty": lambda: np.str_(""),
    "bytes_scalar_empty": lambda: np.bytes_(b""),
    "str_trailing_nul": lambda: np.array([b"a\0b", b"c"], "S4"),
    "ml_fortran": lambda: np.asfortranarray(_array(ml_dtypes.bfloat16, 3, 4)),
    "str_strided": lambda: _array("U2", 4, 4)[::2, ::-1],
}

_TENSORS: dict[str, Case] = {
    **{f"{name}_2d": lambda name=name: _tensor(name, 4, 6) for name in TENSOR_DTYPES},
    **{f"{name}_0d": lambda name=name: _tensor(name) for name in TENSOR_DTYPES},
    **{f"{name}_empty": lambda name=name: _tensor(name, 0, 3) for name in TENSOR_DTYPES},
    "strided": lambda: torch.arange(24.0).reshape(4, 6)[::2, 1::3],
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.arange(3.0).expand(4, 3),
    "expanded_scalar": lambda: torch.tensor(2.5).expand(3, 2),
    "offset_view": lambda: torch.arange(100)[40:50],
    "conj": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "neg": lambda: torch.randn(3, dtype=torch.complex128).conj().imag,
    "conj_transposed": lambda: torch.randn(2, 3, dtype=torch.complex64).mH,
    "conj_half": lambda: _tensor("complex32", 4).conj(),
    "many_dims": lambda: torch.arange(2**12).reshape((2,) * 12),
    "large": lambda: torch.arange(3_000_000),
    "requires_grad": lambda: torch.ones(2, requires_grad=True),
    "non_leaf": lambda: torch.ones(2, requires_grad=True) * 2,
    "parameter": lambda: torch.nn.Parameter(torch.randn(2, 3)),
    "parameter_frozen": lambda: torch.nn.Parameter(torch.ones(2), requires_grad=False),
    "parameter_int": lambda: torch.nn.Parameter(torch.arange(2), requires_grad=False),
    "buffer": lambda: torch.nn.Buffer(torch.ones(2)),
    "buffer_transient": lambda: torch.nn.Buffer(torch.ones(2), persistent=False),
    "coo_coalesced": lambda: _coo().coalesce(),
    "coo_uncoalesced": _coo,
    "coo_hybrid": _hybrid,
    "coo_empty": lambda: torch.sparse_coo_tensor(size=(2, 3)),
    "coo_bfloat16": lambda: _coo().to(torch.bfloat16),
    "coo_requires_grad": lambda: _coo(requires_grad=True),
    "coo_parameter": lambda: torch.nn.Parameter(_coo().coalesce()),
    "csr": lambda: _blocks(torch.sparse_csr),
    "csc": lambda: _blocks(torch.sparse_csc),
    "bsr": lambda: _blocks(torch.sparse_bsr),
    "bsc": lambda: _blocks(torch.sparse_bsc),
    "csr_int32": lambda: torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([1.0, 2.0]),
    ),
    "quantized_qint8": lambda: torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 2, torch.qint8),
    "quantized_quint8": lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 2, torch.quint8),
    "quantized_qint32": lambda: torch.quantize_per_tensor(torch.randn(3), 1 / 3, 0, torch.qint32),
    "quantized_channels": lambda: _per_channel(0),
    "quantized_channels_axis": lambda: _per_channel(1),
}

CASES: dict[str, Case] = {
    **{name: lambda value=value: value for name, value in _VALUES.items()},
    **_CONTAINERS,
    **{f"numpy_{name}": case for name, case in _NUMPY.items()},
    **{f"tensor_{name}": case for name, case in _TENSORS.items()},
}
"""Name -> factory of a value; each is restored equal, with and without a target."""

TARGET_ONLY: dict[str, Case] = {
    "subclass": lambda: TwoParts(torch.ones(2, 3), torch.zeros(2, 3), 7),
    "subclass_parameter": lambda: torch.nn.Parameter(
        TwoParts(torch.ones(2), torch.zeros(2), 7), requires_grad=False
    ),
    "jagged": _jagged,
    "registered_opaque": lambda: Opaque(torch.ones(2), object),
}
"""Values restored as parts without a target: their class or context is not on disk."""
