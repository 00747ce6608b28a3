"""The growth table is a command; its exponents are those of the costs."""

from __future__ import annotations

import pytest

from benchmarks import growth


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_an_exponent_is_that_of_the_costs(power: float) -> None:
    sizes = (10, 100, 1000)
    assert growth.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_the_table_of_leaves_measures_each_call() -> None:
    assert set(growth.leaves(20)) == {"save", "restore", "verify", "show"}
