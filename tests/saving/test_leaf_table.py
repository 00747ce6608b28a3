"""Leaves of several ranks, compared on the primary."""

from __future__ import annotations

import pytest

from functional_ckpt import errors
from functional_ckpt.saving import leaf_table
from functional_ckpt.saving.leaf_table import EQUAL, FIRST_RANK, Leaf


def table(spec: str, mark: str = EQUAL) -> bytes:
    leaf = Leaf(sharding=None, spec=spec, mark=mark, digest=0)
    return leaf_table.to_bytes({"state/a/b": leaf}, ())


@pytest.mark.parametrize("place", [1, 2])
def test_a_rank_that_differs_is_named(place: int) -> None:
    values = [table("tensor float32[3]")] * 3
    leaf_table.merge(values)
    values[place] = table("tensor float32[4]")
    message = f"rank 0 holds tensor float32.3., rank {place} holds tensor float32.4."
    with pytest.raises(errors.CoordinationError, match=message) as info:
        leaf_table.merge(values)
    assert (info.value.ranks, info.value.key_path) == ((0, place), "state.a/b")
    values[place] = table("tensor float32[3]", FIRST_RANK)
    with pytest.raises(errors.CoordinationError, match=f"ranks 0 and {place} give its item"):
        leaf_table.merge(values)
