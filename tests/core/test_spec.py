from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import (
    MAX_NUM_DIMS,
    STORAGE_DTYPES,
    ArraySpec,
    Box,
    numpy_dtype,
)

SIZES = st.integers(0, 6)


@st.composite
def boxes(draw: st.DrawFn, num_dims: int) -> Box:
    corners = draw(st.lists(st.tuples(SIZES, SIZES), min_size=num_dims, max_size=num_dims))
    return Box(tuple(o for o, _ in corners), tuple(n for _, n in corners))


PAIRS = st.integers(0, 3).flatmap(lambda n: st.tuples(boxes(n), boxes(n)))


def _indices(box: Box) -> set[tuple[int, ...]]:
    ranges = [range(o, o + n) for o, n in zip(box.offset, box.shape, strict=True)]
    return set(itertools.product(*ranges))


@given(pair=PAIRS)
def test_an_intersection_is_that_of_the_sets_of_indices(pair: tuple[Box, Box]) -> None:
    first, second = pair
    common = first.intersect(second)
    assert _indices(first) & _indices(second) == (set() if common is None else _indices(common))
    assert common == second.intersect(first)


@given(pair=PAIRS)
def test_what_contains_another_holds_all_its_indices(pair: tuple[Box, Box]) -> None:
    first, second = pair
    if first.contains(second):
        assert _indices(second) <= _indices(first)
    elif second.num_elements:
        assert not _indices(second) <= _indices(first)


@given(pair=PAIRS)
def test_slices_of_a_box_select_its_region(pair: tuple[Box, Box]) -> None:
    outer, inner = pair
    array = np.zeros(tuple(o + n for o, n in zip(outer.offset, outer.shape, strict=True)), bool)
    array[outer.slices()] = True
    assert array.sum() == outer.num_elements
    common = outer.intersect(inner)
    if common is not None:
        assert array[outer.slices()][common.relative_to(outer.offset).slices()].size == (
            common.num_elements
        )


def test_a_box_without_dims_is_one_element() -> None:
    box = Box.whole(())
    assert box.num_elements == 1 and box.intersect(box) == box
    array = np.array(5)
    array[box.slices()][...] = 6
    assert array == 6


@pytest.mark.parametrize(("offset", "shape"), [((0,), ()), ((-1,), (2,)), ((0,), (-2,))])
def test_box_refuses_invalid_offsets(offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.UsageError, match="Not a box"):
        Box(offset, shape)


@pytest.mark.parametrize("name", STORAGE_DTYPES)
def test_every_storage_dtype_is_one_of_numpy(name: str) -> None:
    dtype = numpy_dtype(name)
    assert dtype.name == name
    spec = ArraySpec((2, 3), name)
    assert spec.itemsize_bytes == dtype.itemsize
    assert spec.size_bytes == np.zeros((2, 3), dtype).nbytes


@pytest.mark.parametrize("name", ["r16", "object", "float128", "", "Float32", "<f4", "str"])
def test_no_other_dtype_is_let_in(name: str) -> None:
    with pytest.raises(errors.UsageError, match="Unknown array dtype"):
        ArraySpec((1,), name)
    with pytest.raises(errors.UsageError, match="Unknown array dtype"):
        numpy_dtype(name)


@pytest.mark.parametrize("shape", [(-1,), (2**62,), (1.0,), (True,), ("3",)])
def test_array_spec_refuses_invalid_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.UsageError, match="Not an array shape"):
        ArraySpec(shape, "float32")


def test_more_dims_than_tensorstore_has() -> None:
    assert math.prod(ArraySpec((1,) * MAX_NUM_DIMS, "bool").shape) == 1
    with pytest.raises(errors.UsageError, match="at most 32"):
        ArraySpec((1,) * (MAX_NUM_DIMS + 1), "bool")


@given(shape=st.lists(SIZES, max_size=3).map(tuple), max_bytes=st.integers(1, 500))
def test_slabs_cover_an_array_and_are_as_large_as_they_may_be(
    shape: tuple[int, ...], max_bytes: int
) -> None:
    spec = ArraySpec(shape, "float32")
    slabs = spec.slabs(max_bytes)
    count = np.zeros(shape, int)
    for slab in slabs:
        count[slab.slices()] += 1
    assert (count == 1).all() and all(slab.num_elements for slab in slabs)
    if slabs and spec.size_bytes <= max_bytes:
        assert slabs == [Box.whole(shape)]
    for slab in slabs:
        assert 4 * slab.num_elements <= max_bytes or not shape or slab.shape[0] == 1
