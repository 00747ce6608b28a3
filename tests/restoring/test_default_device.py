"""A program's default device is not the library's: every tensor it makes names its own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import testing

PACKAGE = Path(fc.__file__).parent
# Factories of torch that put their result on the default device unless they are given another.
FACTORIES = re.compile(
    "arange|as_tensor|empty|empty_strided|eye|full|linspace|ones|rand|randint|randn|randperm|"
    "scalar_tensor|sparse_compressed_tensor|sparse_coo_tensor|tensor|zeros"
)


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    with torch.device("meta"):
        yield


ITEMS: dict[str, Any] = {
    "small": {"w": torch.arange(3.0), "b": torch.arange(3).to(torch.bfloat16)},
    "transposed": {"w": torch.arange(6.0).reshape(2, 3).t()},
    "large": {"w": torch.arange(2**19).float()},
    "numpy": {"a": np.arange(3), "b": np.arange(2**18, dtype=np.float64)},
    "text": {"a": np.array(["one", "two"]), "b": b"three"},
    "plain": {"i": 1, "f": 0.5, "s": "x", "n": None},
    "coo": {"s": torch.eye(3).to_sparse()},
    "csr": {"s": torch.eye(3).to_sparse_csr()},
}


@pytest.mark.parametrize("name", ITEMS)
@pytest.mark.parametrize("has_target", [False, True])
def test_a_pytree_comes_back_on_the_cpu(
    name: str, has_target: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fc.save(tmp_path / "c", {name: ITEMS[name]})
    request.getfixturevalue("meta_by_default")
    restored = fc.restore(tmp_path / "c", {name: ITEMS[name]} if has_target else None)
    assert testing.differences(restored[name], ITEMS[name]) == []


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2, device="cpu")
    return model, torch.optim.AdamW(model.parameters())


def test_an_optimizer_without_state_and_the_generators_are_restored(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, optimizer = make()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    expected = optimizer.state_dict()["state"]
    fc.save(tmp_path / "c", {"optimizer": fc.Optimizer(optimizer, model), "rng": fc.Rng()})
    drawn = torch.rand(2)
    request.getfixturevalue("meta_by_default")
    model, optimizer = make()
    items = {"optimizer": fc.Optimizer(optimizer, model), "rng": fc.Rng()}
    fc.restore(tmp_path / "c", items)
    assert testing.differences(optimizer.state_dict()["state"], expected) == []
    assert torch.equal(torch.rand(2, device="cpu"), drawn)


def test_a_tensor_learning_rate_is_set_from_a_number(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.25)
    fc.save(tmp_path / "c", {"optimizer": fc.Optimizer(optimizer, model)})
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1.0), foreach=False)
    request.getfixturevalue("meta_by_default")
    fc.restore(tmp_path / "c", {"optimizer": fc.Optimizer(optimizer, model)})
    assert float(optimizer.param_groups[0]["lr"]) == 0.25


def factories_without_a_device(source: str) -> list[str]:
    return [
        f"{node.lineno}: torch.{node.func.attr}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and (
            FACTORIES.fullmatch(node.func.attr) or (node.func.attr == "Generator" and not node.args)
        )
        and not any(keyword.arg == "device" for keyword in node.keywords)
    ]


def test_every_factory_in_the_package_names_its_device() -> None:
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := factories_without_a_device(path.read_text()))
    }
    assert found == {}
    assert factories_without_a_device("torch.empty(3)\ntorch.ones(1, device='cpu')") == [
        "1: torch.empty"
    ]
