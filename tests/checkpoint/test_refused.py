"""Unsupported leaves raise one error that names each of them, before anything is written."""

from __future__ import annotations

import collections
import enum
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import WithContext
from torch.utils import _pytree

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.core.records import structure_json
from functional_ckpt.core.tree import flatten, structure


class Colour(enum.IntEnum):
    RED = 1


class Matrix(np.ndarray):
    pass


class Keyed:
    """A registered node whose one child has any key."""

    def __init__(self, key: Any) -> None:
        self.key = key


_pytree.register_pytree_node(
    Keyed,
    lambda value: ([1], value.key),
    lambda _, key: Keyed(key),
    flatten_with_keys_fn=lambda value: ([(_pytree.MappingKey(value.key), 1)], value.key),
)


def _cycle() -> Any:
    value: dict[str, Any] = {"a": [1]}
    value["a"].append(value)
    return value


def _nested_list(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _lambda_factory() -> Any:
    return collections.defaultdict(lambda: 0, {"a": 1})


REFUSED = {
    "meta": (lambda: torch.empty(2, device="meta"), "materialise it first"),
    "lambda": (lambda: lambda: 0, "code is never stored"),
    "class": (lambda: dict[str, int], "code is never stored"),
    "object": (object, "register a handler"),
    "bytearray": (lambda: bytearray(b"x"), "convert it"),
    "enum": (lambda: Colour.RED, "pass value.name"),
    "int4": (lambda: torch.empty(2, dtype=torch.int4), "torch.int4 cannot be stored"),
    "uint4": (lambda: torch.empty(2, dtype=torch.uint4), "torch.uint4 cannot be stored"),
    "int1": (lambda: torch.empty(2, dtype=torch.int1), "torch.int1 cannot be stored"),
    "uint1": (lambda: torch.empty(2, dtype=torch.uint1), "torch.uint1 cannot be stored"),
    "bits8": (lambda: torch.empty(2, dtype=torch.bits8), "torch.bits8 cannot be stored"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "unbind"),
    "numpy_object": (lambda: np.array([object()]), "numpy dtype object cannot be stored"),
    "numpy_struct": (lambda: np.zeros(2, "i4,f8"), "cannot be stored"),
    "numpy_longdouble": (lambda: np.longdouble(1), "cannot be stored"),
    "numpy_subclass": (lambda: np.ones(2).view(Matrix), r"pass numpy.asarray\(value\)"),
    "numpy_many_dims": (lambda: np.ones((1,) * 33), "at most 32"),
    "key_object": (lambda: {object(): 1}, "keys may be str, int"),
    "key_enum": (lambda: {Colour.RED: 1}, "keys may be str, int"),
    "key_frozenset": (lambda: {frozenset(): 1}, "keys may be str, int"),
    "key_surrogate": (lambda: {"\ud800": 1}, "not valid Unicode"),
    "key_huge": (lambda: {1 << 20_000: 1}, "too long"),
    "key_tuple_huge": (lambda: {(1, (2, 1 << 20_000)): 1}, "too long"),
    "key_tuple_list": (lambda: {(1, (2, frozenset())): 1}, "keys may be str, int"),
    "key_registered": (lambda: Keyed(object()), "keys may be str, int"),
    "key_registered_huge": (lambda: Keyed(1 << 20_000), "too long"),
    "factory": (_lambda_factory, r"pass dict\(value\)"),
    "cycle": (_cycle, "contains itself"),
    "registered_child": (lambda: WithContext(object(), None), "register a handler"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    make, why = REFUSED[name]
    value = {"good": torch.ones(2), "nested": [1, make()], "other": (lambda: 0,)}
    with pytest.raises(errors.UnsupportedLeafError, match=why) as caught:
        fc.save(tmp_path / "c", {"model": value})
    message = str(caught.value)
    assert "model['nested'][1]" in message
    assert "model['other'][0]" in message, "every leaf is named, not the first alone"
    assert caught.value.key_path is not None and caught.value.key_path.startswith("model['nested']")
    assert isinstance(caught.value, TypeError)
    assert list(tmp_path.iterdir()) == []


COLLISIONS = {
    "dots": ({"a.b": 1, "a": {"b": 2}}, ["['a.b']", "['a']['b']"]),
    "dots_other_order": ({"a": {"b": torch.ones(1)}, "a.b": 2}, ["['a.b']", "['a']['b']"]),
    "int_and_str": ({1: torch.ones(1), "1": 2}, ["[1]", "['1']"]),
    "none_and_str": ({None: 1, "None": 2}, ["[None]", "['None']"]),
    "branches": ({1: {"a": 1}, "1": {"b": 2}}, ["[1]", "['1']"]),
    "slash": ({"a/": torch.ones(1), "a": torch.ones(1)}, ["['a/']", "['a']"]),
    "empty_container": ({"a.b": {}, "a": {"b": 2}}, ["['a.b']", "['a']['b']"]),
    "two": ({1: 0, "1": 0, "x.y": 0, "x": {"y": 0}}, ["['1']", "['x']['y']"]),
}


@pytest.mark.parametrize("name", COLLISIONS)
def test_two_leaves_of_one_name_are_refused(name: str, tmp_path: Path) -> None:
    value, named = COLLISIONS[name]
    with pytest.raises(errors.NameCollisionError, match="rename one of the keys") as caught:
        fc.save(tmp_path / "c", {"model": value})
    for key_path in named:
        assert f"model{key_path}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_one_container_twice_is_no_cycle(tmp_path: Path) -> None:
    shared = [1, torch.ones(2)]
    fc.save(tmp_path / "c", {"v": {"a": shared, "b": [shared]}})
    restored = fc.restore(tmp_path / "c")["v"]
    assert restored["a"][0] == restored["b"][0][0] == 1
    assert restored["a"][1].data_ptr() == restored["b"][0][1].data_ptr()


@pytest.mark.parametrize(
    ("saved", "target", "kind", "said"),
    [
        ({"a": 1}, {"a": 1, "b": {"c": 2, "d": []}}, "missing", ["v['b']['c']", "v['b']['d']"]),
        ({"a": 1, "b": {"c": 2}}, {"a": 1}, "unexpected", ["v['b']['c']"]),
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, "mismatched", ["float32[3]", "float32[2]"]),
        ({"a": torch.ones(2)}, {"a": torch.ones(2).half()}, "mismatched", ["cast=True"]),
        ({"a": torch.ones(2)}, {"a": [1]}, "mismatched", ["expects a list"]),
        ({"a": [1]}, {"a": torch.ones(2)}, "mismatched", ["has a list of 1"]),
        ({"a": np.ones(2)}, {"a": np.ones(2, "f4")}, "mismatched", ["float64"]),
        ({"a": np.ones(2, "M8[s]")}, {"a": np.ones(2, "M8[ns]")}, "mismatched", ["M8[s]"]),
        ({"a": "x"}, {"a": b"x"}, "mismatched", ["expects bytes"]),
        ({"a": 1 << 40_000}, {"a": "x"}, "mismatched", ["0x1000"]),
        (
            {"a": torch.eye(2).to_sparse()},
            {"a": torch.eye(2).double().to_sparse()},
            "mismatched",
            ["v['a']['values']", "float64"],
        ),
        ({"a": torch.eye(2).to_sparse()}, {"a": torch.eye(2)}, "mismatched", ["sparse_coo"]),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_touched(
    saved: Any, target: Any, kind: str, said: list[str], tmp_path: Path
) -> None:
    fc.save(tmp_path / "c", {"v": saved})
    with pytest.raises(errors.MismatchError) as caught:
        fc.restore(tmp_path / "c", {"v": target})
    assert getattr(caught.value, kind), str(caught.value)
    for text in said:
        assert text in str(caught.value)
    report = fc.restore(tmp_path / "c", {"v": target}, strict=False).report
    assert getattr(report, kind) == getattr(caught.value, kind)


def test_a_pattern_finds_a_leaf_in_a_branch_that_is_missing(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"v": {"a": 1}})
    with pytest.raises(errors.MismatchError, match=r"v\['b'\]\['c'\]"):
        fc.restore(tmp_path / "c", {"v": {"a": 1, "b": {"c": 2}}}, only="v.b.c")


class Node(torch.nn.Module):
    weight: torch.nn.Parameter


def _cyclic_module() -> Node:
    parent, child = Node(), Node()
    parent.child, child.parent = child, parent
    parent.weight = torch.nn.Parameter(torch.ones(1))
    return parent


class Endless:
    """A stateful object whose state cannot be gathered."""

    def state_dict(self) -> Any:
        return self.state_dict()

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_cyclic_module, "Node contains itself"),
        (lambda: fc.Json(_nested_list(5000)), "nested more than 200 deep"),
        (Endless, "item: a Endless that contains itself"),
    ],
)
def test_endless_structures_are_refused_by_name(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match=message):
        fc.save(tmp_path / "c", {"item": make()})
    assert list(tmp_path.iterdir()) == []


def test_a_cyclic_module_is_refused_as_a_target_too(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"item": {"weight": torch.ones(1)}})
    module = _cyclic_module()
    with pytest.raises(errors.UsageError, match="Node contains itself"):
        fc.restore(tmp_path / "c", {"item": module})
    optimizer = torch.optim.SGD([module.weight], 0.1)
    with pytest.raises(errors.UsageError, match="Node contains itself"):
        fc.save(tmp_path / "d", {"item": fc.Optimizer(optimizer, module)})


def test_the_deepest_json_comes_back(tmp_path: Path) -> None:
    value = _nested_list(200)
    fc.save(tmp_path / "c", {"item": fc.Json(value)})
    assert fc.restore(tmp_path / "c")["item"] == value


def test_a_deep_tree_costs_what_its_leaves_cost(tmp_path: Path) -> None:
    depth = 20_000
    value: Any = {"leaf": torch.ones(2)}
    for _ in range(depth):
        value = {"k": value}
    start = time.process_time()
    flat = flatten.flatten(value)
    records = structure_json.to_json(flat.root)
    root = structure_json.from_json(records)
    leaves = list(structure.iter_leaves(root))
    # A copy of the path for every level takes 10 s and 3 GB here.
    assert time.process_time() - start < 5
    assert [len(path) for path, _ in leaves] == [depth + 1]
    assert structure.leaf_name(leaves[0][0]) == flat.arrays[0][0].name
