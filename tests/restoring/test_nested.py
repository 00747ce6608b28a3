"""Handlers apply to values wherever they stand in an item: modules, records, users' own types."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors


class Counter:
    def __init__(self, n: int) -> None:
        self.n = n

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n, "history": torch.full((3,), float(self.n))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


@dataclasses.dataclass
class Agent:
    net: torch.nn.Module
    score: float


torch.utils._pytree.register_dataclass(Agent)


def make(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tree of everything, and its live objects by name."""
    torch.manual_seed(seed)
    g, d = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    tied = torch.nn.Linear(2, 1)
    tied.weight = d.weight
    adam, sgd = torch.optim.AdamW(g.parameters()), torch.optim.SGD(d.parameters(), 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.StepLR(adam, 2)
    for _ in range(seed):
        d(g(torch.ones(1, 3))).sum().backward()
        adam.step()
        sgd.step()
        schedule.step()
    live = {"g": g, "d": d, "adam": adam, "sgd": sgd, "schedule": schedule}
    live |= {"counter": Counter(seed), "generator": np.random.default_rng(seed)}
    tree = {
        "optimizers": [fc.Optimizer(adam, g), fc.Optimizer(sgd, d)],
        "nets": {"g": g, "d": d, "tied": tied},
        "agent": Agent(torch.nn.Linear(1, 1), float(seed)),
        "state": {
            "schedules": (schedule,),
            "n": seed,
            "t": torch.full((2,), float(seed)),
            "counter": live["counter"],
            "rng": [live["generator"], random.Random(seed)],
            "config": fc.Json({"lr": [1, 2]}),
            "inner": fc.PyTree({"again": torch.nn.Linear(1, 1)}),
        },
    }
    return tree, live


def picture(tree: dict[str, Any], live: dict[str, Any]) -> Any:
    def numbers(value: Any) -> Any:
        return value.tolist() if isinstance(value, torch.Tensor) else value

    states = [live[name].state_dict() for name in ("g", "d")]
    optimizers = [live[name].state_dict()["state"] for name in ("adam", "sgd")]
    own = [tree["agent"].net.state_dict(), live["schedule"].state_dict(), live["counter"].n]
    return torch.utils._pytree.tree_map(numbers, [states, optimizers, own])


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Any]:
    tree, live = make(3)
    fc.save(tmp_path / "c", {"all": tree})
    return tmp_path / "c", picture(tree, live)


def test_everything_in_one_item_is_restored_in_place(saved: tuple[Path, Any]) -> None:
    path, expected = saved
    tree, live = make(0)
    restored = fc.restore(path, {"all": tree})["all"]
    restored_tree = {**restored, "agent": restored["agent"]}
    assert picture(restored_tree, live) == expected
    assert restored["nets"]["g"] is live["g"] and restored["optimizers"][0] is live["adam"]
    assert restored["state"]["schedules"][0] is live["schedule"]
    assert type(restored["agent"]) is Agent and restored["agent"].net is tree["agent"].net
    assert restored["agent"].score == 3.0 and restored["state"]["n"] == 3
    assert restored["state"]["t"].tolist() == [3.0, 3.0]
    assert tree["state"]["t"].tolist() == [0.0, 0.0]  # plain leaves are new ones
    assert live["generator"] is restored["state"]["rng"][0]
    assert live["generator"].random() == make(3)[1]["generator"].random()
    assert restored["nets"]["tied"].weight is live["d"].weight
    assert restored["state"]["config"] == {"lr": [1, 2]}


def test_without_targets_it_is_plain_data(saved: tuple[Path, Any]) -> None:
    plain = fc.restore(saved[0])["all"]
    assert plain["nets"]["g"].keys() == {"weight", "bias"}
    assert plain["state"]["counter"]["n"] == 3
    assert plain["optimizers"][1]["param_groups"][0]["momentum"] == 0.9
    assert plain["nets"]["tied"]["weight"] is plain["nets"]["d"]["weight"]


def test_the_record_says_what_stood_where(saved: tuple[Path, Any]) -> None:
    record = json.loads((saved[0] / "all" / "_FUNCTIONAL_CKPT").read_text())
    found = {
        each["detail"]["handler"]
        for each in record["structure"]
        if "handler" in each.get("detail", {})
    }
    assert found == {
        *("ModuleHandler", "OptimizerHandler", "StatefulHandler", "GeneratorHandler"),
        *("JsonHandler", "PyTreeHandler"),
    }


@pytest.mark.parametrize(
    ("options", "restored"),
    [
        ({"only": "all.nets.*"}, {"g", "d"}),
        ({"only": ["all.nets.g.*", "all.state.counter.*"]}, {"g", "counter"}),
        ({"ignore": ["all.optimizers.*", "all.state.*"]}, {"g", "d"}),
        ({"ignore": lambda name: "nets.g" in name}, {"d", "counter", "adam"}),
    ],
    ids=["one pattern", "two patterns", "ignored patterns", "a function"],
)
def test_selected_values_of_a_tree_are_restored_in_part(
    saved: tuple[Path, Any], options: Any, restored: set[str]
) -> None:
    tree, live = make(0)
    before = {name: repr(getattr(each, "state_dict", dict)()) for name, each in live.items()}
    result = fc.restore(saved[0], {"all": tree}, **options)["all"]
    changed = {
        name
        for name, each in live.items()
        if repr(getattr(each, "state_dict", dict)()) != before[name]
    }
    assert restored <= changed and not ({"g", "d", "counter", "adam"} - restored) & changed
    assert result["nets"]["g"] is live["g"] and result["state"]["counter"] is live["counter"]


def test_differences_are_reported_by_leaf(saved: tuple[Path, Any]) -> None:
    tree, live = make(0)
    tree["nets"] = {"g": torch.nn.Linear(3, 5), "other": torch.nn.Linear(1, 1)}
    tree["optimizers"][1] = fc.Optimizer(torch.optim.AdamW(live["d"].parameters()), live["d"])
    with pytest.raises(errors.MismatchError) as caught:
        fc.restore(saved[0], {"all": tree})
    text = str(caught.value)
    assert "all['nets']['g']['weight']: the target expects tensor float32[5, 3]" in text
    assert "all['nets']['other']['bias']" in text and "all['nets']['d']['weight']" in text
    assert "all['optimizers'][1]: optimizer: the target is AdamW" in text
    assert live["counter"].n == 0
    restored = fc.restore(saved[0], {"all": tree}, strict=False)
    assert restored["all"]["nets"]["other"] is tree["nets"]["other"]
    assert live["counter"].n == 3 and restored.report.mismatched and restored.report.missing


def test_key_map_renames_nested_modules_and_optimizers(saved: tuple[Path, Any]) -> None:
    tree, live = make(0)
    tree["nets"]["h"] = tree["nets"].pop("g")

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = live["g"]

    tree["nets"]["h"] = Wrapped()
    tree["optimizers"][0] = fc.Optimizer(live["adam"], tree["nets"]["h"])
    new = "all.optimizers.0.state.body"
    names = {"all.nets.g": "all.nets.h.body"}
    names |= {f"all.optimizers.0.state.{name}": f"{new}.{name}" for name in ("weight", "bias")}
    fc.restore(saved[0], {"all": tree}, key_map=names)
    assert picture(tree, live)[:2] == saved[1][:2]


class PathHandler(fc.handlers.Handler):
    """A user's handler: makes new values, and needs no live one."""

    def lower(self, value: Any) -> Any:
        return {"as": str(value)} if isinstance(value, Token) else f"?{value}"

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        return fc.handlers.AS_SAVED

    def lift(self, value: Any, tree: Any) -> Any:
        return Token(tree["as"] if isinstance(tree, dict) else tree)


class Token:
    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


class Bare(Token):
    pass


class BareHandler(PathHandler):
    def lower(self, value: Any) -> Any:
        return str(value)


class Holder:
    def __init__(self, *tokens: Token) -> None:
        self.tokens = tokens

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": list(self.tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens = tuple(state["tokens"])


REGISTRY = (
    fc.handlers.default_registry()
    .with_handler(Token, PathHandler())
    .with_handler(Bare, BareHandler())
)


def test_a_registered_handler_applies_to_leaves(tmp_path: Path) -> None:
    tree = {"a": Token("x"), "b": [Bare("y")], "c": 1}
    with pytest.raises(errors.UnsupportedLeafError, match=r"with_handler\(Token, handler\)"):
        fc.save(tmp_path / "c", {"tree": tree})
    items = {"tree": tree, "holder": Holder(Token("s"), Bare("t"))}
    fc.save(tmp_path / "c", items, registry=REGISTRY)
    assert fc.restore(tmp_path / "c")["tree"] == {"a": {"as": "x"}, "b": ["y"], "c": 1}
    holder = Holder()
    target = {"tree": {"a": Token(""), "b": [Bare("")], "c": 0}, "holder": holder}
    restored = fc.restore(tmp_path / "c", target, registry=REGISTRY)["tree"]
    assert (str(restored["a"]), str(restored["b"][0])) == ("x", "y")
    assert [str(token) for token in holder.tokens] == ["s", "t"]
    with pytest.raises(errors.MismatchError, match=r"BareHandler\[Bare\] saved it"):
        fc.restore(tmp_path / "c", {"holder": Holder()})


def test_what_stands_in_a_state_is_not_searched_for_modules(tmp_path: Path) -> None:
    class Odd(Counter):
        def state_dict(self) -> dict[str, Any]:
            return {"module": torch.nn.Linear(1, 1)}

    with pytest.raises(errors.UnsupportedLeafError, match=r"odd\['module'\]: .*in the state of"):
        fc.save(tmp_path / "c", {"odd": Odd(1)})


def test_values_that_repeat_and_trees_that_contain_themselves(tmp_path: Path) -> None:
    counter, loop = Counter(4), {}
    fc.save(tmp_path / "c", {"all": {"a": counter, "b": [counter]}})
    counter.n = 0
    restored = fc.restore(tmp_path / "c", {"all": {"a": counter, "b": [counter]}})["all"]
    assert counter.n == 4 and restored["a"] is restored["b"][0] is counter
    loop["x"] = fc.PyTree(loop)
    with pytest.raises(errors.UnsupportedLeafError, match="contains itself"):
        fc.save(tmp_path / "d", {"all": loop})


def test_restore_or_returns_the_initial_nested_values(tmp_path: Path) -> None:
    tree, live = make(1)
    with fc.CheckpointManager(tmp_path) as manager:
        restored = manager.restore_or({"all": tree})["all"]
    assert restored["optimizers"] == [live["adam"], live["sgd"]]
    assert restored["nets"] is tree["nets"] or restored["nets"] == tree["nets"]


@pytest.mark.parametrize("staging", ["overlapped", "eager"])
def test_overlapped_saves_hold_what_was_there(staging: str, tmp_path: Path) -> None:
    options: Any = {"staging": fc.Overlapped()} if staging == "overlapped" else {}
    tree, live = make(2)
    embedding = torch.nn.Embedding(8, 4, max_norm=0.5)
    tree["nets"]["e"] = embedding
    top = torch.optim.SGD(embedding.parameters(), 0.1)
    expected = embedding.weight.tolist()
    with fc.CheckpointManager(tmp_path, **options) as manager:
        manager.save(1, {"all": tree, "o": fc.Optimizer(top, embedding)})
        embedding(torch.arange(8)).sum().backward()  # shrinks the weights
        before = live["g"].weight.tolist()
        live["adam"].step()
        top.step()
    plain = fc.restore(tmp_path / "1")["all"]
    assert plain["nets"]["e"]["weight"].tolist() == expected
    assert plain["nets"]["g"]["weight"].tolist() == before


def test_paths_and_such_are_plain_values(tmp_path: Path) -> None:
    tree = {"path": pathlib.PurePosixPath("/x"), "tags": {"a", "b"}}
    fc.save(tmp_path / "c", {"tree": tree})
    assert fc.restore(tmp_path / "c")["tree"] == tree
    assert fc.restore(tmp_path / "c", {"tree": {"path": Path(), "tags": set()}})["tree"] == tree
