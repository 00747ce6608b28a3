"""Optimizers without `fc.Optimizer`: modules in the same save or restore name their parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors


class Gan:
    """Two networks, each with an optimizer."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.g, self.d = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
        self.for_g = torch.optim.AdamW(self.g.parameters(), 0.1 / (1 + seed))
        self.for_d = torch.optim.SGD(self.d.parameters(), 0.1, 0.9)

    def step(self) -> None:
        for optimizer in (self.for_g, self.for_d):
            optimizer.zero_grad()
            self.d(self.g(torch.ones(1, 3))).square().sum().backward()
            optimizer.step()

    def tree(self, *, bare: bool = True) -> dict[str, Any]:
        pair: list[Any] = [self.for_g, self.for_d]
        if not bare:
            pair = [fc.Optimizer(self.for_g, self.g), fc.Optimizer(self.for_d, self.d)]
        nets = {"g": self.g, "d": self.d}
        return {"nets": nets, "optimizers": pair, "state": {"epoch": 3}}

    def state(self) -> str:
        return repr([each.state_dict() for each in (self.g, self.d, self.for_g, self.for_d)])


def record(path: Path) -> Any:
    """The structure, arrays and metadata of an item, without the digests of its files."""
    found = json.loads((path / "_FUNCTIONAL_CKPT").read_text())
    return found["structure"], found["arrays"], (path / "_METADATA").read_text()


@pytest.mark.parametrize("bare_save", [True, False])
@pytest.mark.parametrize("bare_restore", [True, False])
def test_a_gan_resumes_bit_for_bit(tmp_path: Path, *, bare_save: bool, bare_restore: bool) -> None:
    one, other = Gan(1), Gan(2)
    one.step()
    fc.save(tmp_path / "c", {"gan": one.tree(bare=bare_save)})
    restored = fc.restore(tmp_path / "c", {"gan": other.tree(bare=bare_restore)})["gan"]
    assert restored["optimizers"][0] is other.for_g and restored["optimizers"][1] is other.for_d
    assert other.state() == one.state()
    for each in (one, other):
        each.step()
    assert other.state() == one.state()


def test_both_forms_write_the_same(tmp_path: Path) -> None:
    gan = Gan(1)
    gan.step()
    for bare in (True, False):
        fc.save(tmp_path / str(bare), {"gan": gan.tree(bare=bare)})
    assert record(tmp_path / "True" / "gan") == record(tmp_path / "False" / "gan")
    plain = fc.restore(tmp_path / "True")["gan"]["optimizers"][0]
    assert plain["param_groups"][0]["params"] == ["weight", "bias"]


def test_an_item_of_its_own_beside_its_module(tmp_path: Path) -> None:
    one, other = Gan(1), Gan(2)
    one.step()
    with fc.CheckpointManager(tmp_path / "run") as manager:
        manager.save(0, {"model": fc.Module(one.g), "optimizer": one.for_g})
    restored = fc.restore(tmp_path / "run/0", {"optimizer": other.for_g, "model": other.g})
    assert restored["optimizer"] is other.for_g
    assert repr(other.for_g.state_dict()) == repr(one.for_g.state_dict())
    again = Gan(3)
    fc.restore(tmp_path / "run/0", {"optimizer": fc.Optimizer(again.for_g, again.g)})
    assert repr(again.for_g.state_dict()) == repr(one.for_g.state_dict())


def _over_both(gan: Gan) -> torch.optim.Optimizer:
    return torch.optim.Adam([*gan.g.parameters(), *gan.d.parameters()])


@pytest.mark.parametrize(
    ("items", "names"),
    [
        (lambda gan, o: {"all": {"nets": [gan.g, gan.d], "o": o}}, ("nets.0", "nets.1")),
        (lambda gan, o: {"g": gan.g, "d": gan.d, "o": [o]}, ("g", "d")),
        (lambda gan, o: {"g": {"net": gan.g, "o": o}, "d": gan.d}, ("g.net", "d")),
    ],
    ids=["one item", "items", "own item and another"],
)
def test_several_modules_prefix_the_names(
    items: Any, names: tuple[str, str], tmp_path: Path
) -> None:
    gan = Gan(1)
    optimizer = _over_both(gan)
    gan.step()
    optimizer.step()
    fc.save(tmp_path / "c", items(gan, optimizer))
    other = Gan(2)
    into = items(other, bound := _over_both(other))
    fc.restore(tmp_path / "c", into)
    assert repr(bound.state_dict()) == repr(optimizer.state_dict())
    again = Gan(3)
    models = dict(zip(names, (again.g, again.d), strict=True))
    explicit = fc.Optimizer(_over_both(again), models)
    saved = dict(zip(names, (gan.g, gan.d), strict=True))
    expected = [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]
    assert explicit.handler.own(explicit.value)["param_groups"][0]["params"] == expected
    fc.save(
        tmp_path / "e",
        {"o": fc.Optimizer(optimizer, saved)},
    )
    fc.restore(tmp_path / "e", {"o": explicit})
    assert repr(explicit.value.state_dict()) == repr(optimizer.state_dict())


def test_the_modules_of_its_own_item_come_first(tmp_path: Path) -> None:
    gan = Gan(1)
    whole = torch.nn.Sequential(gan.g, gan.d)
    fc.save(tmp_path / "c", {"whole": whole, "part": {"o": gan.for_g, "net": gan.g}})
    found = fc.restore(tmp_path / "c")["part"]["o"]
    assert found["param_groups"][0]["params"] == ["weight", "bias"]


def test_an_optimizer_without_its_modules_is_refused(tmp_path: Path) -> None:
    gan = Gan(1)
    where = re.escape("param_groups[0]['params'][0] (2, 3), param_groups[0]['params'][1] (2,)")
    match = f"no module in the items has {where}.*fc.Optimizer"
    for items in ({"o": gan.for_g}, {"d": gan.d, "o": gan.for_g}, {"all": [gan.for_g, gan.d]}):
        with pytest.raises(errors.UsageError, match=match):
            fc.save(tmp_path / "c", items)
    assert list(tmp_path.iterdir()) == []
    fc.save(tmp_path / "c", {"g": gan.g, "o": gan.for_g})
    with pytest.raises(errors.UsageError, match=match):
        fc.restore(tmp_path / "c", {"o": gan.for_g})
    partly = _over_both(gan)
    with pytest.raises(
        errors.UsageError, match=re.escape("has param_groups[0]['params'][2] (1, 2)")
    ):
        fc.save(tmp_path / "d", {"g": gan.g, "o": partly})


def test_modules_on_the_meta_device(tmp_path: Path) -> None:
    one = Gan(1)
    one.step()
    fc.save(tmp_path / "c", {"gan": one.tree()})
    with torch.device("meta"):
        other = Gan(2)
    fc.restore(tmp_path / "c", {"gan": other.tree()})
    assert other.state() == one.state()


def test_leaves_left_alone_and_wrapped_modules(tmp_path: Path) -> None:
    one, other = Gan(1), Gan(2)
    one.step()
    fc.save(tmp_path / "c", {"model": torch.nn.DataParallel(one.g), "o": one.for_g})
    fc.restore(tmp_path / "c", {"model": other.g, "o": other.for_g}, ignore="o.param_groups.*.lr")
    assert repr(other.for_g.state_dict()["state"]) == repr(one.for_g.state_dict()["state"])
    assert other.for_g.param_groups[0]["lr"] != one.for_g.param_groups[0]["lr"]


def test_a_cyclic_tree_is_refused(tmp_path: Path) -> None:
    gan = Gan(1)
    tree: dict[str, Any] = {"g": gan.g, "o": gan.for_g}
    tree["self"] = tree
    with pytest.raises(errors.UnsupportedLeafError):
        fc.save(tmp_path / "c", {"tree": tree})
