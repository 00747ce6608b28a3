"""Edited checkpoints have the chosen leaves, under their new names, and are verified."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.verify import verify


class Versioned(torch.nn.Module):
    """A module that loads by the version that its state dict has."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(2))
        self.seen: object = None

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.seen = arguments[2].get("version")
        super()._load_from_state_dict(*arguments, **options)


def saved(path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.BatchNorm1d(200))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    shared = torch.randn(3)
    items = {
        "model": model,
        "optimizer": fc.Optimizer(optimizer, model),
        "tree": {"first": shared, "second": {"same": shared}, "third": shared, "list": [1, 2.5]},
        "config": fc.Json({"lr": 0.1}),
    }
    fc.save(path, items, metrics={"loss": 1.5}, custom_metadata={"by": "me"})
    return items


def edited(tmp_path: Path, **options: Any) -> fc.Restored:
    fc.transform.edit(tmp_path / "in", tmp_path / "out", **options)
    assert verify(tmp_path / "out") == []
    return fc.restore(tmp_path / "out")


def test_nothing_changes_without_options(tmp_path: Path) -> None:
    items = saved(tmp_path / "in")
    found = edited(tmp_path)
    assert list(found) == list(items)
    fc.restore(tmp_path / "out", into=items)
    metadata = fc.metadata(tmp_path / "out")
    assert metadata.metrics == {"loss": 1.5} and metadata.custom_metadata == {"by": "me"}
    tree = found["tree"]
    assert tree["first"] is tree["second"]["same"] is tree["third"]


def test_leaves_are_kept_dropped_cast_and_renamed(tmp_path: Path) -> None:
    items = saved(tmp_path / "in")
    found = edited(
        tmp_path,
        only=["model", "tree.*"],
        ignore=["model.1.*", "tree.first"],
        key_map={"model": "net", "model.0": "model.body"},
        cast={"*": "float16", "model.*.weight": "bfloat16"},
    )
    assert list(found) == ["net", "tree"] and list(found["net"]) == ["body.weight", "body.bias"]
    assert found["net"]["body.weight"].dtype == torch.bfloat16
    assert torch.equal(found["net"]["body.weight"], items["model"][0].weight.bfloat16())
    assert torch.equal(found["net"]["body.bias"], items["model"][0].bias.half())
    tree = found["tree"]  # the owner of the shared bytes is gone
    assert list(tree) == ["second", "third", "list"] and tree["second"]["same"] is tree["third"]
    assert torch.equal(tree["third"], items["tree"]["first"].half()) and tree["list"] == [1, 2.5]


def test_a_renamed_optimizer_resumes_the_renamed_module(tmp_path: Path) -> None:
    items = saved(tmp_path / "in")
    rules = {"model.0": "model.body", "model.1": "model.norm"}
    rules |= {
        "optimizer.state.0": "optimizer.state.body",
        "optimizer.state.1": "optimizer.state.norm",
    }
    edited(tmp_path, key_map=rules)
    model: Any = torch.nn.Sequential()
    model.add_module("body", torch.nn.Linear(300, 200))
    model.add_module("norm", torch.nn.BatchNorm1d(200))
    optimizer = torch.optim.AdamW(model.parameters())
    fc.restore(tmp_path / "out", into={"model": model, "optimizer": fc.Optimizer(optimizer, model)})
    assert torch.equal(model.body.weight, items["model"][0].weight)
    moments = optimizer.state[model.body.weight]["exp_avg"]
    old = items["optimizer"].value.state[items["model"][0].weight]["exp_avg"]
    assert torch.equal(moments, old)


def test_a_renamed_module_keeps_its_version(tmp_path: Path) -> None:
    fc.save(tmp_path / "in", {"model": torch.nn.ModuleDict({"old": Versioned()})})
    edited(tmp_path, key_map={"model.old": "model.new"})
    target = torch.nn.ModuleDict({"new": Versioned()})
    fc.restore(tmp_path / "out", into={"model": target})
    assert target["new"].seen == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["mdel"]}, "'mdel' matches no item and no leaf"),
        ({"ignore": ["x"]}, "'x' matches no item and no leaf"),
        ({"key_map": {"model.x": "model.y"}}, "'model.x' renames no leaf"),
        ({"key_map": {"mdel": "net"}}, "no item 'mdel' to rename"),
        ({"key_map": {"model": "tree"}}, "Two items would be 'tree'"),
        ({"key_map": {"model.0.weight": "model.0.bias"}}, "one name"),
        ({"cast": {"*": "bfloat15"}}, "did you mean bfloat16"),
        ({"cast": {"config": "float16"}}, "'config' matches no floating-point array"),
        ({"ignore": ["tree.list.0"]}, "tree.list.0 is in a list or tuple"),
        ({"ignore": ["*"]}, "Nothing is left"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path / "in")
    with pytest.raises(errors.UsageError, match=message):
        edited(tmp_path, **options)
    assert os.listdir(tmp_path) == ["in"]


def test_a_number_beyond_the_new_dtype_is_refused(tmp_path: Path) -> None:
    values = torch.tensor([1.0, float("inf"), 1e30])
    fc.save(tmp_path / "in", {"x": {"a": values}})
    with pytest.raises(errors.UsageError, match=r"x\.a: 1e\+30 is out of the range of float16"):
        edited(tmp_path, cast={"x": "float16"})
    found = edited(tmp_path, cast={"x": "bfloat16"})["x"]["a"]
    assert torch.equal(found, values.bfloat16())


def test_many_pieces_and_dtypes_without_safetensors(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    large = torch.from_numpy(generator.standard_normal((3, 700_001)))
    fc.save(tmp_path / "in", {"x": {"a": large, "b": large.to(torch.complex128)[:, :9]}})
    found = edited(tmp_path, cast={"x.a": "float32"})["x"]
    assert torch.equal(found["a"], large.float()) and torch.equal(found["b"].real, large[:, :9])
