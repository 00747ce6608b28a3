"""Rounds float64 to the nearest value of a narrower dtype, once. Free of torch."""

from __future__ import annotations

import numpy as np

from functional_ckpt.core.arrays.spec import Array, numpy_dtype

_BY_NUMPY = ("float16", "float32", "float64", "complex64", "complex128")


def is_floating(dtype: str) -> bool:
    """Returns whether a storage dtype is one of real floating-point numbers.

    >>> is_floating("bfloat16"), is_floating("int8"), is_floating("complex64")
    (True, False, False)
    """
    return "float" in dtype


def rounded(values: Array, dtype: str) -> Array:
    """Returns values of float64, or complex128, in a storage dtype, each rounded to the nearest.

    NumPy's own conversions round once. Those of ml_dtypes go by float32, and would round twice:
    here float32 keeps in its last bit whether anything was lost, which decides every tie.

    >>> import numpy as np
    >>> float(rounded(np.array([1 + 2**-8 + 2**-40]), "bfloat16")[0])
    1.0078125
    """
    if dtype in _BY_NUMPY:
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(numpy_dtype(dtype))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        is_inexact = near != values
        is_beyond = np.abs(near) > np.abs(values)
        is_inexact &= ~np.isnan(values)
        bits = near.view(np.uint32)
        bits -= is_beyond  # towards zero
        bits |= is_inexact
        return near.astype(numpy_dtype(dtype))
