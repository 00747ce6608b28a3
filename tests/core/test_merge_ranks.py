"""Merging the ranks' structures, and selecting one rank's again."""

from __future__ import annotations

import collections
import decimal
import math
from pathlib import Path

import pytest
import torch

from functional_ckpt import errors
from functional_ckpt.core.records import merge_ranks
from functional_ckpt.core.restore_plan import select
from functional_ckpt.core.restore_plan.match import match
from functional_ckpt.core.tree import context, flatten, structure
from functional_ckpt.core.tree.placeholders import AS_SAVED


def root(value: object) -> structure.Node:
    return flatten.flatten(value, item="item").root


def unite(*values: object) -> structure.Node:
    return merge_ranks.merge_ranks(
        [(rank, root(value)) for rank, value in enumerate(values)], item="item"
    )


def told(node: structure.Node, rank: int, num_ranks: int) -> tuple[object, list[str]]:
    """The plain values that a rank restores, and the dropped key paths."""
    dropped: list[str] = []
    own = merge_ranks.select_rank(node, rank, num_ranks, dropped)
    return select.specs(own), dropped


def test_equal_trees_are_one() -> None:
    value = {"a": [1, torch.zeros(2)], "b": {}}
    assert unite(value, value, value) == root(value)


def test_disjoint_dicts_are_united_in_order_of_rank() -> None:
    united = unite({"a": 1}, {"b": {"c": 2}}, {"b": {"d": 3}, "a": 1})
    assert united == root({"a": 1, "b": {"c": 2, "d": 3}})


def state_dict(**versions: int) -> collections.OrderedDict[str, int]:
    """The state dict of a pipeline stage with modules of its own."""
    state = collections.OrderedDict(dict.fromkeys(versions, 1))
    metadata = collections.OrderedDict({name: {"version": v} for name, v in versions.items()})
    vars(state)["_metadata"] = metadata
    return state


def test_attributes_of_state_dicts_are_united_like_their_keys() -> None:
    assert unite(state_dict(a=1, b=2), state_dict(b=2, c=3)) == root(state_dict(a=1, b=2, c=3))
    with pytest.raises(errors.CoordinationError):
        unite(state_dict(a=1), state_dict(a=2))
    with pytest.raises(errors.CoordinationError):
        unite(state_dict(a=1), collections.OrderedDict(a=1))


def test_plain_values_that_differ_are_kept_for_every_rank() -> None:
    united = unite({"x": 1, "y": "s"}, {"x": 2, "y": "s"}, {"x": None, "y": "s"})
    for rank, expected in enumerate((1, 2, None)):
        assert told(united, rank, 3) == ({"x": expected, "y": "s"}, [])


def test_a_value_that_only_some_ranks_differ_in_is_kept_for_all() -> None:
    united = unite({"x": 1}, {"x": 1}, {"x": 2}, {"x": 1})
    assert [told(united, rank, 4)[0] for rank in range(4)] == [{"x": x} for x in (1, 1, 2, 1)]


def test_another_number_of_ranks_takes_the_first_and_says_so() -> None:
    united = unite({"x": [1]}, {"x": [2]})
    assert told(united, 2, 3) == ({"x": [1]}, ["['x'][0]"])


def test_values_of_stages_are_kept_per_rank() -> None:
    """Only ranks 1 and 2 have the value, and they differ."""
    united = unite({}, {"x": 1}, {"x": 2})
    assert told(united, 1, 3)[0] == {"x": 1}
    assert told(united, 2, 3)[0] == {"x": 2}


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (
            torch.zeros(2),
            torch.zeros(3),
            r"rank 0 holds tensor float32\[2\], rank 1 .*float32\[3\]",
        ),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32), "rank 1 holds tensor int32"),
        (torch.zeros(2), {"y": 1}, "rank 1 holds a dict of 1"),
        (torch.zeros(2), 1, "rank 1 holds int 1"),
        ([1], [1, 2], "rank 0 holds a list of 1, rank 1 holds a list of 2"),
        ((1,), [1], "rank 0 holds a tuple of 1, rank 1 holds a list of 1"),
    ],
)
def test_disagreement_of_ranks_names_both(one: object, other: object, text: str) -> None:
    with pytest.raises(errors.CoordinationError, match=text) as caught:
        unite({"x": {"z": one}}, {"x": {"z": other}})
    assert caught.value.ranks == (0, 1)
    assert caught.value.key_path == "item['x']['z']"


def test_the_ranks_named_are_those_that_differ() -> None:
    with pytest.raises(errors.CoordinationError, match=r"rank 0 holds .* rank 2 holds") as caught:
        unite({"x": torch.zeros(2)}, {"x": torch.zeros(2)}, {"x": torch.zeros(1)})
    assert caught.value.ranks == (0, 2)


def test_a_united_structure_binds_as_saved() -> None:
    united = unite({"a": torch.zeros(2)}, {"b": 1})
    bound = match(united, AS_SAVED, item="item")
    assert not bound.report


def test_names_are_united_in_order_and_come_back_as_a_list() -> None:
    names = structure.MergedNames
    united = unite({"n": names(["b", "a"])}, {"n": names(["c", "a"])}, {"n": names(["b", "a"])})
    value, dropped = told(united, 1, 3)
    assert (value, dropped) == ({"n": ["b", "a", "c"]}, [])
    assert type(value["n"]) is list  # type: ignore[index]


def test_ordinary_lists_of_texts_are_values_of_their_ranks() -> None:
    united = unite({"n": ["b", "a"]}, {"n": ["c", "a"]})
    assert told(united, 1, 2)[0] == {"n": ["c", "a"]}


def test_long_lists_that_differ_are_kept_for_every_rank() -> None:
    united = unite({"a": [1] * 200}, {"a": [2] * 300})
    assert told(united, 0, 2) == ({"a": [1] * 200}, [])
    assert told(united, 1, 2) == ({"a": [2] * 300}, [])


def test_a_long_list_of_other_types_on_another_rank() -> None:
    united = unite({"a": [1] * 200}, {"a": [1] * 199 + [2.5]})
    assert told(united, 0, 2) == ({"a": [1] * 200}, [])
    assert told(united, 1, 2) == ({"a": [1] * 199 + [2.5]}, [])
    united = unite({"a": [True] * 200}, {"a": [1] * 200})
    assert [type(told(united, rank, 2)[0]["a"][0]) for rank in (0, 1)] == [bool, int]
    with pytest.raises(errors.CoordinationError, match=r"a list of 200, rank 1 .* a list of 3"):
        unite({"a": [1] * 200}, {"a": [1, 2, 3]})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0.0, -0.0),
        ([0.0] * 200, [-0.0] * 200),
        ([1, 2.0] * 100, [1.0, 2] * 100),
        (["a"] * 200, ["b"] * 150),
        ([{"a": 1}] * 200, [{"a": True}] * 200),
        (complex(0.0, 1), complex(-0.0, 1)),
        (decimal.Decimal("1.0"), decimal.Decimal("1.00")),
    ],
)
def test_values_that_only_look_equal_are_kept_for_every_rank(one: object, other: object) -> None:
    united = unite({"a": one, "b": math.nan}, {"a": other, "b": math.nan})
    assert [repr(told(united, rank, 2)) for rank in (0, 1)] == [
        repr(({"a": value, "b": math.nan}, [])) for value in (one, other)
    ]
    assert isinstance(united, structure.BranchNode)
    assert isinstance(united.children[1], structure.ValueNode)  # one value of both ranks


def test_a_long_list_of_a_rank_and_one_with_tensors_on_another() -> None:
    log = [{"a": 1}] * 200
    united = unite({"a": [*log, 1]}, {"a": [*log, 2]})
    assert [told(united, rank, 2)[0]["a"][200] for rank in (0, 1)] == [1, 2]
    united = unite({"a": [*log, Path("x")]}, {"a": [*log, "x"]})
    assert told(united, 1, 2)[0] == {"a": [*log, "x"]}


def test_metadata_of_modules_is_united_by_name() -> None:
    def stage(**versions: int) -> structure.Described:
        found = {
            name: {"version": version, "size": torch.Size([1])}
            for name, version in versions.items()
        }
        detail = {structure.METADATA: context.tag(found)} if found else {}
        return structure.Described(dict.fromkeys(versions or ["x"], 1), detail)

    united = unite(stage(a=2), stage(), stage(a=2, b=3))
    assert isinstance(united, structure.BranchNode)
    assert united.detail == stage(a=2, b=3).detail
    with pytest.raises(errors.CoordinationError):
        unite(stage(a=2), stage(a=3))
