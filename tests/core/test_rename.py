"""Other names for stored leaves: prefixes, expressions, functions; and impossible renames."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt.core.restore_plan import select
from functional_ckpt.core.restore_plan.rename import KeyMap, Renaming
from functional_ckpt.core.tree import flatten, structure
from functional_ckpt.errors import UsageError

A = np.zeros(1, np.float32)


def renamed(value: Any, key_map: KeyMap) -> Any:
    """The tree of item `m` under its new names, each array as the name it is stored under."""
    root = Renaming(key_map).rename(flatten.flatten(value, item="m").root, "m")
    return None if root is None else names_in(root)


def names_in(node: structure.Node) -> Any:
    if isinstance(node, structure.ArrayNode):
        return node.name
    if isinstance(node, structure.ValueNode):
        return node.value
    children = [names_in(child) for child in node.children]
    if node.kind in ("list", "tuple"):
        return children
    return dict(zip([key.value for key in node.keys], children, strict=True))


FLAT = {"encoder.0.weight": A, "encoder.0.bias": A, "head.weight": A}
NESTED = {"params": {"dense": {"kernel": A, "bias": A}, "out": {"kernel": A}}, "layers": [A, A]}


@pytest.mark.parametrize(
    ("value", "key_map", "expected"),
    [
        (
            FLAT,
            {"m.encoder": "m.backbone"},
            {
                "backbone.0.weight": "encoder.0.weight",
                "backbone.0.bias": "encoder.0.bias",
                "head.weight": "head.weight",
            },
        ),
        (
            FLAT,  # the longest name counts, and a name is no part of a longer word
            {"m.encoder": "m.body", "m.encoder.0.bias": "m.b", "m.head.weight": "m.head.w"},
            {
                "body.0.weight": "encoder.0.weight",
                "b": "encoder.0.bias",
                "head.w": "head.weight",
            },
        ),
        (
            {"a.w": A, "b.w": A, "ab.w": A},  # exchanged
            {"m.a": "m.b", "m.b": "m.a"},
            {"b.w": "a.w", "a.w": "b.w", "ab.w": "ab.w"},
        ),
        (
            FLAT,
            [(r"encoder\.(\d+)", r"layers.\1.block"), ("weight$", "w")],
            {
                "layers.0.block.w": "encoder.0.weight",
                "layers.0.block.bias": "encoder.0.bias",
                "head.w": "head.weight",
            },
        ),
        (
            FLAT,
            lambda name: None if ".head." in name else name.replace("encoder.", ""),
            {"0.weight": "encoder.0.weight", "0.bias": "encoder.0.bias"},
        ),
        (
            NESTED,
            {"m.params.dense": "m.params.linear", "m.params.out.kernel": "m.params.out.w"},
            {
                "params": {
                    "linear": {"kernel": "params.dense.kernel", "bias": "params.dense.bias"},
                    "out": {"w": "params.out.kernel"},
                },
                "layers": ["layers.0", "layers.1"],
            },
        ),
        (
            {"state": {"encoder.weight": {"step": 3, "avg": A}}},  # a key with a dot stays one
            [("encoder", "body.encoder")],
            {"state": {"body.encoder.weight": {"step": 3, "avg": "state.encoder.weight.avg"}}},
        ),
        ({"model": {"w": A}}, {"m.model": "m"}, {"w": "model.w"}),
        ({"w": A}, {"m.w": "m.model.w"}, {"model.w": "w"}),
        ({"w": A}, lambda name: None, None),
        (NESTED, lambda name: name, names_in(flatten.flatten(NESTED, item="m").root)),
    ],
)
def test_leaves_get_other_names(value: Any, key_map: KeyMap, expected: Any) -> None:
    assert renamed(value, key_map) == expected


@pytest.mark.parametrize(
    ("value", "key_map", "message"),
    [
        (FLAT, {"m.head": "other.head"}, "a leaf stays in its item; expected a name that starts"),
        (FLAT, {"m.head.weight": "m."}, "a leaf stays in its item"),
        (
            {"a": A, "b": A},
            {"m.a": "m.b"},
            "key_map gives 'm.a' and 'm.b' one name, 'm.b'",
        ),
        ({"x": {"a": A}, "b": A}, {"m.b": "m.x"}, "a leaf and a container of leaves"),
        (NESTED, {"m.layers.0": "m.layers.7"}, "the items of a list or tuple have no names"),
        (NESTED, lambda name: None if name == "m.layers.0" else name, "changes the members of"),
        (FLAT, [("(", "x")], "expected a mapping of names to names, (regular expression"),
        (FLAT, [("head", r"\9")], r"'\\9' cannot replace 'head'"),
        (FLAT, {"m.head": 3}, "expected a mapping of names to names"),
        (FLAT, 7, "expected a mapping of names to names, (regular expression"),
        (FLAT, ["head"], "expected a mapping of names to names, (regular expression"),
    ],
)
def test_key_map_refuses_impossible_renames(value: Any, key_map: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        renamed(value, key_map)


@pytest.mark.parametrize(
    ("key_map", "unused"),
    [
        ({"m.head": "m.top", "m.haed": "m.x"}, "'m.haed' renames no leaf"),
        ([("haed", "x"), ("head", "x")], "'haed' renames no leaf"),
        ({"m.he": "m.x"}, "'m.he' renames no leaf"),  # not a complete key
        (str, "str() renames no leaf"),
        ({}, "no rule renames no leaf"),
    ],
)
def test_a_rule_that_renames_nothing_is_an_error(key_map: Any, unused: str) -> None:
    renaming = Renaming(key_map)
    renaming.rename(flatten.flatten(FLAT, item="m").root, "m")
    with pytest.raises(UsageError, match=re.escape(unused)):
        renaming.check_used()


WORDS = st.text("ab.", min_size=1, max_size=5)
KEYS = st.sampled_from(["a", "b", "ab"])


@given(st.recursive(st.just(A), lambda inner: st.dictionaries(KEYS, inner, min_size=1)), WORDS)
def test_renaming_there_and_back_is_nothing(value: Any, word: str) -> None:
    if not isinstance(value, dict):
        return
    root = flatten.flatten({"top": value}, item="m").root
    there = Renaming({"m.top": "m.other"}).rename(root, "m")
    assert there is not None
    assert Renaming({"m.other": "m.top"}).rename(there, "m") == root
    # A rule that only adds to names does not change the stored structure.
    suffixed = Renaming(lambda name: f"{name}_{word.strip('.')}").rename(root, "m")
    assert suffixed is not None
    assert len(list(structure.iter_leaves(suffixed))) == len(list(structure.iter_leaves(root)))
    assert select.specs(there) == {"other": select.specs(root)["top"]}
