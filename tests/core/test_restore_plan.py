from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
import rebuild
import torch
from hypothesis import given, settings

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.restore_plan import plan, select
from functional_ckpt.core.restore_plan.match import match
from functional_ckpt.core.tree import flatten, structure
from functional_ckpt.core.tree.placeholders import AS_SAVED, Fill
from functional_ckpt.testing import strategies


def _reads(binding: plan.Binding) -> list[plan.ReadArray]:
    if isinstance(binding, plan.Build):
        return [read for child in binding.children for read in _reads(child)]
    return [binding] if isinstance(binding, plan.ReadArray) else []


@settings(max_examples=100)
@given(value=strategies.pytrees())
def test_a_tree_fits_itself(value: Any) -> None:
    root = flatten.flatten(value).root
    bound = match(root, value, item="v")
    assert not bound.report, str(bound.report)


@settings(max_examples=50)
@given(value=strategies.pytrees())
def test_every_array_is_read_once_for_every_leaf(value: Any) -> None:
    root = flatten.flatten(value).root
    arrays = [leaf for _, leaf in structure.iter_leaves(root)]
    expected = [leaf.name for leaf in arrays if isinstance(leaf, structure.ArrayNode)]
    for target in (value, AS_SAVED):
        binding = match(root, target, item="v").binding
        assert [read.node.name for read in _reads(binding)] == expected


@settings(max_examples=50)
@given(first=strategies.pytrees(max_leaves=5), second=strategies.pytrees(max_leaves=5))
def test_any_two_trees_match_or_raise(first: Any, second: Any) -> None:
    """Nothing but a report: no error of Python's own, whatever the target is."""
    bound = match(flatten.flatten(first).root, second, item="v")
    assert bound.report or _reads(bound.binding) is not None


def test_a_target_of_specs_and_meta_tensors_wants_shapes_and_dtypes() -> None:
    root = flatten.flatten({"a": torch.ones(2, 3), "b": np.ones(2)}).root
    target = {"a": torch.empty(2, 3, device="meta"), "b": ArraySpec((2,), "float64")}
    assert not match(root, target, item="v").report
    other = {"a": torch.empty(3, 2, device="meta"), "b": ArraySpec((2,), "float32")}
    report = match(root, other, item="v").report
    assert [text.split(":")[0] for text in report.mismatched] == ["v['a']", "v['b']"]


def test_a_cast_is_asked_for_by_name() -> None:
    root = flatten.flatten({"a": torch.ones(2)}).root
    target = {"a": torch.ones(2, dtype=torch.float16)}
    assert match(root, target, item="v").report.mismatched
    assert not match(root, target, item="v", cast_to_target=True).report


def test_fill_and_as_saved_stand_anywhere() -> None:
    tensor = torch.zeros(2)
    root = flatten.flatten({"a": torch.ones(2), "b": [1, {"c": torch.ones(3)}]}).root
    bound = match(root, {"a": Fill(tensor), "b": AS_SAVED}, item="v")
    assert not bound.report
    fill, read = _reads(bound.binding)
    assert fill.form == "fill" and fill.like is tensor
    assert read.form == "as_saved" and read.node.name == "b.1.c"


def test_keys_of_other_programs_are_strings() -> None:
    saved = structure.BranchNode(
        kind="dict",
        keys=(structure.Key("0"), structure.Key("1")),
        children=tuple(structure.ValueNode(kind="int", value=n) for n in (5, 6)),
    )
    for target in ({0: 1, 1: 2}, [1, 2], (1, 2), collections.deque([1, 2])):
        bound = match(saved, target, item="v")
        assert not bound.report
        built = rebuild.build(bound.binding, {})
        assert type(built) is type(target)
        assert list(built.values() if isinstance(built, dict) else built) == [5, 6]


def test_numbers_are_one_family_and_text_is_another() -> None:
    root = flatten.flatten({"a": 1.5}).root
    for target in (None, True, 2, 0.0, 1j):
        bound = match(root, {"a": target}, item="v")
        assert not bound.report and rebuild.build(bound.binding, {}) == {"a": 1.5}
    for target in ("x", b"x", torch.float32, len, object()):
        assert match(root, {"a": target}, item="v").report.mismatched


def test_unselected_leaves_are_neither_read_nor_missing() -> None:
    root = flatten.flatten({"a": torch.ones(2), "gone": {"x": 1}}).root
    target = {"a": torch.zeros(2), "new": {"y": 5}}
    bound = match(root, target, item="v", selects=lambda name: name == "a")
    assert not bound.report
    bound = match(root, target, item="v", selects=lambda name: name in ("new.y", "gone.x"))
    assert bound.report.missing == ("v['new']['y']",)
    assert bound.report.unexpected == ("v['gone']['x']",)
    assert _reads(bound.binding) == []


def test_not_strict_keeps_the_targets_own_values() -> None:
    root = flatten.flatten({"a": torch.ones(2), "b": 1}).root
    own = torch.zeros(3)
    bound = match(root, {"a": Fill(own), "b": 2, "c": [AS_SAVED, 7]}, item="v")
    built = rebuild.build(bound.binding, {})
    assert built["a"] is own and built["b"] == 1 and built["c"] == [None, 7]
    assert bound.report.missing == ("v['c'][1]",)


@settings(max_examples=50)
@given(value=strategies.pytrees())
def test_pruning_keeps_all_or_nothing_when_asked_to(value: Any) -> None:
    root = flatten.flatten(value).root
    assert select.prune(root, lambda name: False) is None
    kept = select.prune(root, lambda name: True)
    assert kept is not None
    assert list(structure.iter_leaves(kept)) == list(structure.iter_leaves(root))


def test_pruning_leaves_keys_out_and_holes_in_sequences() -> None:
    root = flatten.flatten({"a": 1, "b": [2, 3], "c": {"d": 4}}).root
    kept = select.prune(root, lambda name: name in ("b.1", "a"))
    assert kept is not None
    assert select.specs(kept) == {"a": 1, "b": [None, 3]}
    sparse = flatten.flatten({"s": torch.eye(2).to_sparse()}).root
    assert select.prune(sparse, lambda name: name == "s") == sparse
    assert select.prune(sparse, lambda name: name == "s.values") is None


def test_specs_are_the_tree_without_its_bytes() -> None:
    value = {"w": torch.ones(2, 3), "n": (1, "x"), "s": torch.eye(2).to_sparse()}
    specs = select.specs(flatten.flatten(value).root)
    assert specs["w"] == ArraySpec((2, 3), "float32") and specs["n"] == (1, "x")
    assert specs["s"] == {
        "indices": ArraySpec((2, 2), "int64"),
        "values": ArraySpec((2,), "float32"),
    }


def test_one_error_for_all_items_says_what_to_do() -> None:
    reports = {
        "a": plan.RestoreReport(missing=("a['x']",)),
        "b": plan.RestoreReport(mismatched=("b['y']: the target expects 1, the checkpoint has 2",)),
        "c": plan.RestoreReport(),
    }
    with pytest.raises(errors.MismatchError, match="step 7 of /d") as caught:
        plan.raise_report(reports, step=7, path="/d")
    assert caught.value.missing == ("a['x']",) and caught.value.step == 7
    for text in ("a['x']", "b['y']", "strict=False", "only="):
        assert text in str(caught.value)
    plan.raise_report({"c": plan.RestoreReport()}, step=7, path="/d")


def test_a_long_report_is_shortened_in_words_and_whole_in_fields() -> None:
    missing = tuple(f"v[{n}]" for n in range(1_000))
    with pytest.raises(errors.MismatchError, match="800 more") as caught:
        plan.raise_report({"v": plan.RestoreReport(missing=missing)}, step=None, path="/d")
    assert caught.value.missing == missing
