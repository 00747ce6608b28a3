"""Shape and dtype of an array, `ArraySpec`, and a region of it, `Box`. Free of torch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from functional_ckpt import errors

if TYPE_CHECKING:
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"

# TensorStore's limit on the rank of an array.
MAX_NUM_DIMS = 32

# Spelled out so that a record can be read without NumPy, which the command line need not load.
_INTEGERS = {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}
_FLOATS = {"float16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}
_NATIVE = {"bool": 1, **_INTEGERS, **_FLOATS}
_ML_FLOATS = {
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
# Written by Orbax only: read as ml_dtypes arrays, one element a byte in memory, never written here.
_FOREIGN = dict.fromkeys(("int2", "int4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz"), 1)


@functools.cache
def numpy_dtype(name: str) -> np.dtype:
    """Returns the numpy dtype of a storage dtype's name; raises `UsageError` for an unknown name.

    >>> numpy_dtype("bfloat16").itemsize
    2
    """
    import numpy as np

    if name in _ML_FLOATS or name in _FOREIGN:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    if name in _NATIVE:
        return np.dtype(name)
    known = ", ".join(STORAGE_DTYPES)
    raise errors.UsageError(f"Unknown array dtype {name!r}; expected one of {known}.")


STORAGE_DTYPES: Mapping[str, int] = MappingProxyType({**_NATIVE, **_ML_FLOATS, **_FOREIGN})
"""Every dtype an array on disk may have (zarr's names), with its bytes per element in memory."""


CARRIED_BY: Mapping[str, str] = MappingProxyType(
    {"complex32": "int32", "float4_e2m1fn_x2": "uint8"}
)
"""Torch dtypes without a zarr counterpart -> the dtype of that width that carries their bits."""


@dataclasses.dataclass(frozen=True, slots=True)
class ArraySpec:
    """Shape and dtype of an array, without data.

    Attributes:
        shape: Number of elements in each dim.
        dtype: Name of the dtype on disk, a key of `STORAGE_DTYPES`.
    """

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in STORAGE_DTYPES:
            raise errors.UsageError(f"Unknown array dtype {self.dtype!r}.")
        if len(self.shape) > MAX_NUM_DIMS:
            raise errors.UsageError(
                f"An array has {len(self.shape)} dims; at most {MAX_NUM_DIMS} can be stored."
            )
        for size in self.shape:
            if type(size) is not int or not 0 <= size < 2**62:
                raise errors.UsageError(f"Not an array shape: {self.shape!r}.")

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    @property
    def itemsize_bytes(self) -> int:
        """Bytes of one element."""
        return STORAGE_DTYPES[self.dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        return self.num_elements * self.itemsize_bytes

    def slabs(self, max_bytes: int) -> list[Box]:
        """Returns regions along the first dim that cover the array; an empty array has none.

        Args:
            max_bytes: Bytes of a region at most; one row may be larger.
        """
        if not self.num_elements:
            return []
        if not self.shape or self.size_bytes <= max_bytes:
            return [Box.whole(self.shape)]
        rows, *rest = self.shape
        step = max(1, max_bytes * rows // self.size_bytes)
        return [
            Box((row, *(0 for _ in rest)), (min(step, rows - row), *rest))
            for row in range(0, rows, step)
        ]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """A region of a global array: `offset[d] <= index < offset[d] + shape[d]` in every dim.

    >>> Box((0, 4), (2, 4)).intersect(Box((1, 6), (5, 5)))
    Box(offset=(1, 6), shape=(1, 2))
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.shape) or any(n < 0 for n in (*self.offset, *self.shape)):
            raise errors.UsageError(f"Not a box: offset {self.offset}, shape {self.shape}.")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """Returns the box of the entire array."""
        return cls((0,) * len(shape), shape)

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """One past the last index, per dim."""
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """Returns the common region, or None where there is none (0-dim boxes always meet)."""
        offset = tuple(map(max, self.offset, other.offset))
        shape = tuple(
            min(a, b) - low for a, b, low in zip(self.end, other.end, offset, strict=True)
        )
        return Box(offset, shape) if all(n > 0 for n in shape) else None

    def contains(self, other: Box) -> bool:
        """Returns whether this box contains every index of `other`."""
        return all(
            a <= b and d <= c
            for a, b, c, d in zip(self.offset, other.offset, self.end, other.end, strict=True)
        )

    def relative_to(self, origin: tuple[int, ...]) -> Box:
        """Returns the same region with `origin` as index zero."""
        return Box(tuple(o - b for o, b in zip(self.offset, origin, strict=True)), self.shape)

    def cut(self, max_elements: int) -> Iterator[Box]:
        """Yields parts of at most `max_elements`, each a run of this box's elements in C order.

        >>> [part.shape for part in Box((0, 0), (3, 4)).cut(8)]
        [(2, 4), (1, 4)]
        """
        if self.num_elements <= max_elements:
            yield self
            return
        dim = next(dim for dim, size in enumerate(self.shape) if size > 1)
        before, size, after = self.shape[:dim], self.shape[dim], self.shape[dim + 1 :]
        step = max(1, max_elements * size // self.num_elements)
        for start in range(0, size, step):
            offset = (*self.offset[:dim], self.offset[dim] + start, *self.offset[dim + 1 :])
            yield from Box(offset, (*before, min(step, size - start), *after)).cut(max_elements)

    def slices(self) -> tuple[Any, ...]:
        """Returns the box as an index expression; the ellipsis keeps a 0-dim array a view."""
        return (*(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True)), ...)
