"""Ranks that know different meshes of one array: still one writer for every chunk."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt.core.arrays import write_plan
from functional_ckpt.core.arrays.sharding import DimShard, Sharding
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.records import merge_ranks

ROWS = (DimShard(0),)


def writers(shape: tuple[int, ...], sharding: Sharding, num_ranks: int) -> Counter[tuple[int, ...]]:
    """How often every chunk is written, by all ranks together."""
    array = write_plan.ShardedArray("item", "leaf", ArraySpec(shape, "float32"), sharding)
    written: Counter[tuple[int, ...]] = Counter()
    for rank in range(num_ranks):
        (planned,) = write_plan.plan_writes([array], rank)
        for piece in planned.of(rank):
            written.update(planned.grid.indices(piece.box))
    return written


@given(
    num_tensor=st.integers(1, 5),
    num_data=st.integers(1, 5),
    shape=st.lists(st.integers(0, 11), min_size=1, max_size=2).map(tuple),
)
def test_columns_of_a_mesh_are_replicas(
    num_tensor: int, num_data: int, shape: tuple[int, ...]
) -> None:
    """FSDP2 over `dp` of a `dp x tp` mesh: a rank knows the column that it is in, and no other."""
    num_ranks = num_tensor * num_data
    columns = [
        Sharding((num_data,), tuple(range(tensor, num_ranks, num_tensor)), ROWS)
        for tensor in range(num_tensor)
    ]
    united = merge_ranks.merge_shardings(
        [(rank, columns[rank % num_tensor]) for rank in range(num_ranks)]
    )
    for rank in range(num_ranks):
        assert united.pieces(shape, rank) == columns[rank % num_tensor].pieces(shape, rank)
        first = rank - rank % num_tensor
        assert united.replicas(rank) == tuple(range(first, first + num_tensor))
    written = writers(shape, united, num_ranks)
    assert set(written.values()) <= {1}
    assert bool(written) == bool(math.prod(shape))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([Sharding((2,), (0, 1), ROWS)], Sharding((2,), (0, 1), ROWS)),
        ([None], Sharding((2,), (0, 1), ROWS)),
        ([Sharding((3,), (2, 3, 4), ROWS)], Sharding((2,), (0, 1), ROWS)),
        ([Sharding((2,), (1, 2), ROWS)], Sharding((2,), (0, 1), ROWS)),
        ([Sharding((2,), (2, 3), (None,))], Sharding((2,), (0, 1), ROWS)),
        (
            [None, Sharding((2,), (2, 3), ROWS)],
            Sharding((2, 2), (0, 1, 2, 3), (None, DimShard(0))),
        ),
    ],
    ids=["same", "plain", "another-shape", "overlapping", "other-placements", "replica"],
)
def test_shardings_that_differ_from_the_first_write_nothing(
    others: list[Sharding | None], expected: Sharding
) -> None:
    parts = list(enumerate([Sharding((2,), (0, 1), ROWS), *others]))
    united = merge_ranks.merge_shardings(parts)
    assert united == expected
    assert set(writers((5, 3), united, 6).values()) == {1}


def test_plain_arrays_are_held_by_those_who_have_them() -> None:
    parts = [(1, None), (2, Sharding((2,), (2, 3), ROWS)), (4, None)]
    assert merge_ranks.merge_shardings(parts) == Sharding.replicated((1, 4))
