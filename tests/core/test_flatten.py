from __future__ import annotations

import collections
from typing import Any, NamedTuple

import pytest
import rebuild
import torch
from hypothesis import given, settings

from functional_ckpt import errors
from functional_ckpt.core.restore_plan.match import match
from functional_ckpt.core.tree import flatten, structure
from functional_ckpt.core.tree.placeholders import AS_SAVED
from functional_ckpt.core.tree.structure import Key
from functional_ckpt.testing import differences, strategies


class Point(NamedTuple):
    x: Any
    y: Any


@settings(max_examples=150)
@given(value=strategies.pytrees())
def test_flattened_trees_unflatten_equal(value: Any) -> None:
    flat = flatten.flatten(value)
    binding = match(flat.root, AS_SAVED, item="v").binding
    assert differences(rebuild.build(binding, rebuild.stored(flat)), value) == []


@settings(max_examples=50)
@given(value=strategies.pytrees())
def test_flatten_names_every_leaf_once(value: Any) -> None:
    flat = flatten.flatten(value)
    leaves = list(structure.iter_leaves(flat.root))
    names = [structure.leaf_name(path) for path, _ in leaves]
    assert len(set(names)) == len(names)
    arrays = {leaf.name: leaf for _, leaf in leaves if isinstance(leaf, structure.ArrayNode)}
    owners = {name for name, leaf in arrays.items() if leaf.tied_to is None}
    assert [node.name for node, _ in flat.arrays] == [name for name in arrays if name in owners]
    assert all(leaf.stored_name in owners for leaf in arrays.values())


def test_names_are_joined_by_dots_and_shown_as_python_writes_them() -> None:
    path = (Key("a.b"), Key(0, "index"), Key((1, "x")))
    assert structure.leaf_name(path) == "a.b.0.(1, 'x')"
    assert structure.pretty(path, "item") == "item['a.b'][0][(1, 'x')]"
    assert structure.leaf_name(()) == flatten.ROOT_NAME


def test_nothing_is_copied_or_changed() -> None:
    tensor = torch.arange(3.0)
    value = {"a": [tensor], "b": (1,)}
    flat = flatten.flatten(value)
    assert flat.arrays[0][1] is tensor
    assert value == {"a": [tensor], "b": (1,)}


def test_children_in_the_order_of_the_container() -> None:
    opened = flatten.flatten_one_level({"z": 1, "a": 2})
    assert opened is not None
    assert opened.keys == (Key("z"), Key("a")) and opened.children == (1, 2)


def test_a_named_tuple_without_its_class_is_one_of_the_same_name() -> None:
    opened = flatten.flatten_one_level(Point(1, 2))
    assert opened is not None
    built = flatten.unflatten_one_level(opened.node(), [3, 4])
    assert type(built).__name__ == "Point" and built._fields == ("x", "y") and built == (3, 4)
    assert type(flatten.unflatten_one_level(opened.node(), [3, 4], Point(0, 0))) is Point


def test_the_type_of_the_target_wins() -> None:
    opened = flatten.flatten_one_level({"a": 1})
    assert opened is not None
    built = flatten.unflatten_one_level(opened.node(), [5], collections.defaultdict(lambda: 7))
    assert built["a"] == 5 and built["new"] == 7


@pytest.mark.parametrize(
    ("kind", "keys", "children", "detail"),
    [
        ("named_tuple", (Key("x"),), (1,), {"type": "not a name"}),
        ("named_tuple", (Key("x"),), (1,), {}),
        ("torch_size", (Key(0, "index"),), ("x",), {}),
        ("deque", (), (), {"maxlen": "many"}),
        ("quantized", (Key("int_repr"),), (1,), {"shape": [1]}),
        ("sparse_coo", (Key("indices"),), (1,), {"shape": [1], "coalesced": True}),
        ("sparse_csr", (Key("a"), Key("b"), Key("c")), (1, 2, 3), {"shape": "x"}),
        ("mystery", (), (), {}),
    ],
)
def test_invalid_parts_raise_corrupt(
    kind: str, keys: tuple[Key, ...], children: tuple[Any, ...], detail: dict[str, object]
) -> None:
    node = structure.BranchNode(
        kind=kind,
        keys=keys,
        children=tuple(structure.ValueNode(kind="int", value=0) for _ in keys),
        detail=detail,
    )
    with pytest.raises(errors.CorruptCheckpointError, match=f"stored '{kind}'"):
        flatten.unflatten_one_level(node, children)


def test_indices_of_a_sparse_tensor_are_checked() -> None:
    """Unchecked, torch would read memory that is not its own."""
    opened = flatten.flatten_one_level(torch.eye(2).to_sparse())
    assert opened is not None
    _, values = opened.children
    with pytest.raises(errors.CorruptCheckpointError, match="sparse_coo"):
        flatten.unflatten_one_level(opened.node(), [torch.tensor([[0, 9], [0, 1]]), values])


def test_map_leaves_leaves_the_value_alone() -> None:
    value = {"a": [1, None], "b": Point((), torch.ones(2))}
    mapped = flatten.map_leaves(lambda leaf: leaf + 1 if leaf is not None else "none", value)
    assert mapped["a"] == [2, "none"] and type(mapped["b"]) is Point
    assert torch.equal(mapped["b"].y, torch.full((2,), 2.0))
    assert value["a"] == [1, None]
