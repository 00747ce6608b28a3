"""Every item record: immutable, copied, compared, hashed, and a node of torch's pytrees."""

import copy
import dataclasses
import pickle
import random
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchmetrics
from torch.utils import _pytree

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.core.tree import structure
from functional_ckpt.handlers import Handler, Item, nested

MODEL = torch.nn.Linear(2, 2)
ADAM = torch.optim.Adam(MODEL.parameters())
GENERATOR = torch.Generator()
ITEMS = {
    "module": fc.Module(MODEL, only="w*", device="cpu", replicated="unchecked"),
    "optimizer": fc.Optimizer(ADAM, MODEL),
    "optimizer_by_pairs": fc.Optimizer(ADAM, MODEL.named_parameters()),
    "pytree": fc.PyTree({"w": torch.ones(3), "n": np.arange(2)}, per_rank=True),
    "json": fc.Json({"lr": 1e-3}),
    "rng": fc.Rng({"g": GENERATOR}, same_devices=False, other_ranks="derive"),
    "rng_alone": fc.Rng(),
    "generator": fc.Generator(random.Random(3)),
    "stateful": fc.Stateful(ADAM, per_rank=True),
    "metric": fc.TorchMetric(torchmetrics.SumMetric(), per_rank=True),
    "any": fc.CheckpointItem([1, 2], fc.Json().handler),
}
EVERY = pytest.mark.parametrize("item", ITEMS.values(), ids=ITEMS)


@EVERY
def test_item_replaced_keeps_its_options(item: Item):
    again = dataclasses.replace(item, value=item.value)
    assert again == item
    assert again is not item
    assert dataclasses.replace(item, replicated="unchecked").replicated == "unchecked"


@EVERY
def test_item_copies_equal_the_original(item: Item):
    shallow = copy.copy(item)
    assert shallow == item
    assert shallow.value is item.value
    assert hash(shallow) == hash(item)
    assert shallow.handler == item.handler
    deep = copy.deepcopy(item)
    assert type(deep) is type(item)
    assert deep.value is not item.value
    assert deep.replicated == item.replicated
    deep.check()


@EVERY
def test_item_is_a_pytree_node_whose_child_is_the_value(item: Item):
    children, context = _pytree.SUPPORTED_NODES[type(item)].flatten_fn(item)
    assert len(children) == 1
    assert children[0] is item.value
    assert len(context) == len(dataclasses.fields(item)) - 1
    assert _pytree.tree_map(lambda leaf: leaf, item) == item
    assert _pytree.tree_map(lambda leaf: leaf, {"items": [item]}) == {"items": [item]}
    assert [path[:1] for path, _ in _pytree.tree_leaves_with_path(item)] in (
        [(_pytree.GetAttrKey("value"),)] * len(_pytree.tree_leaves(item.value)),
    )


@EVERY
def test_item_is_immutable(item: Item):
    with pytest.raises(dataclasses.FrozenInstanceError):
        item.value = None  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        item.other = 1  # type: ignore[attr-defined]


@EVERY
def test_item_classes_derive_from_the_abstract_base_alone(item: Item):
    assert type(item).__mro__[1:3] == Item.__mro__[:2]
    assert type(item.handler).__mro__[1:3] == fc.handlers.Handler.__mro__[:2]


def test_items_compare_tensors_by_content():
    assert fc.PyTree({"w": torch.ones(3)}) == fc.PyTree({"w": torch.ones(3)})
    assert fc.PyTree({"w": torch.ones(3)}) != fc.PyTree({"w": torch.zeros(3)})
    assert fc.PyTree({"w": torch.ones(3)}) != fc.PyTree({"w": torch.ones(3).half()})
    assert copy.deepcopy(ITEMS["pytree"]) == ITEMS["pytree"]
    assert copy.deepcopy(ITEMS["optimizer_by_pairs"]) != ITEMS["optimizer_by_pairs"]


def test_items_of_other_classes_or_options_differ():
    assert fc.PyTree(1) != fc.Json(1)
    assert fc.PyTree(1) != fc.PyTree(1, per_rank=True)
    assert fc.Module(MODEL) != fc.Module(MODEL, device="cpu")
    assert fc.Module(MODEL, only=["w*"]) == fc.Module(MODEL, only="w*")
    assert fc.Json(1) != 1
    assert len({fc.Json(1), fc.Json(1), fc.Json(2)}) == 2


def test_items_are_pickled():
    assert pickle.loads(pickle.dumps(ITEMS["json"])) == ITEMS["json"]
    assert pickle.loads(pickle.dumps(ITEMS["pytree"])) == ITEMS["pytree"]


def test_tree_map_over_items_is_checked_when_they_are_saved(tmp_path):
    doubled = _pytree.tree_map_only(torch.Tensor, lambda t: t * 2, {"w": ITEMS["pytree"]})
    fc.save(tmp_path / "a", doubled)
    assert torch.equal(fc.restore(tmp_path / "a")["w"]["w"], torch.full((3,), 2.0))
    broken = _pytree.tree_map(lambda leaf: 3, {"model": ITEMS["module"]})
    with pytest.raises(errors.UsageError, match=r"Expected a torch\.nn\.Module, got int"):
        fc.save(tmp_path / "b", broken)


@pytest.mark.parametrize("wrong", [{"handler": "json"}, {"handler": fc.Json}])
def test_an_item_without_a_handler_is_refused(wrong):
    with pytest.raises(errors.UsageError, match="Expected a Handler instance"):
        fc.CheckpointItem(1, **wrong)


def test_rng_of_a_generator_alone_names_the_item_that_takes_one():
    with pytest.raises(errors.UsageError, match=r"fc\.Generator takes one generator"):
        fc.Rng(GENERATOR)  # type: ignore[arg-type]


@EVERY
def test_item_takes_its_options_by_name(item: Item):
    options = {field.name: field for field in dataclasses.fields(item) if field.init}
    positional = {name for name, field in options.items() if not field.kw_only}
    expected = {fc.Optimizer: {"value", "model"}, fc.CheckpointItem: {"value", "handler"}}
    assert positional == expected.get(type(item), {"value"})


def test_nested_state_of_another_number_of_ranks_is_resized_before_it_is_lifted():
    handler = mock.Mock(spec=Handler)
    handler.resize.return_value = "resized"
    item = mock.Mock(value="live", handler=handler)
    detail = {structure.HANDLER: "queue", structure.RESIZE: [1, 3]}
    handled = structure.Handled("target", detail, item)
    found = nested._lift_one(mock.Mock(), handled, {"rank_0": "a", "rank_1": "b"})
    handler.resize.assert_called_once_with(["a", "b"], 1, 3)
    handler.lift.assert_called_once_with("live", "resized")
    assert found is handler.lift.return_value


def test_nested_item_is_checked_again_when_it_is_saved(tmp_path):
    item = fc.Stateful(ADAM)
    object.__setattr__(item, "value", 3)
    for items in ({"a": item}, {"a": {"nested": item}}):
        with pytest.raises(errors.UsageError, match="Expected an object with state_dict"):
            fc.save(tmp_path / "step", items)


@pytest.mark.parametrize("kind", [fc.Module, fc.Optimizer, fc.Stateful, fc.PyTree, fc.Json, fc.Rng])
def test_every_item_refuses_an_unknown_way_of_replication(kind: Any) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    values = {fc.Module: model, fc.Optimizer: optimizer, fc.Stateful: optimizer, fc.Rng: {}}
    options: dict[str, Any] = {"model": model} if kind is fc.Optimizer else {}
    value = values.get(kind, {"x": 1})
    assert kind(value, **options).replicated == "checked"
    with pytest.raises(fc.errors.UsageError, match="replicated must be 'checked' or 'unchecked'"):
        kind(value, replicated="sometimes", **options)
