"""`only`, `ignore` and `key_map` mean the same for every kind of item."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import functional_ckpt as fc
from functional_ckpt import errors, testing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchmetrics import classification


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
    "lbfgs": lambda p, lr: torch.optim.LBFGS(p, lr, max_iter=2),
    "adam_tensor_lr": lambda p, lr: torch.optim.Adam(p, torch.tensor(lr), foreach=False),
}


def make(kind: str, lr: float, *, used: bool = True) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = OPTIMIZERS[kind](model.parameters(), lr)
    if used:
        step(model, optimizer)
    return model, optimizer


def state_of(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict()["state"])


@pytest.fixture(params=OPTIMIZERS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Any]:
    model, optimizer = make(request.param, 0.5)
    step(model, optimizer)
    fc.save(tmp_path / "c", {"optimizer": fc.Optimizer(optimizer, model)})
    return request.param, tmp_path / "c", state_of(optimizer)


@pytest.mark.matrix(4)
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    "choice",
    [
        {"ignore": "optimizer.param_groups.*.lr"},
        {"ignore": "*.lr"},
        {"ignore": lambda name: name == "optimizer.param_groups.0.lr"},
        {"only": "optimizer.state.*"},
        {"ignore": "optimizer.param_groups.*", "strict": False},
    ],
)
def test_an_optimizer_keeps_its_learning_rate(
    saved: tuple[str, Path, Any], used: bool, choice: dict[str, Any]
) -> None:
    kind, path, expected = saved
    model, optimizer = make(kind, 0.125, used=used)
    lr = optimizer.param_groups[0]["lr"]
    restored = fc.restore(path, {"optimizer": fc.Optimizer(optimizer, model)}, **choice)
    assert restored["optimizer"] is optimizer
    assert not restored.report
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == 0.125
    assert testing.differences(state_of(optimizer), expected) == []
    step(model, optimizer)


@pytest.mark.parametrize("used", [False, True])
def test_an_optimizer_keeps_its_state(saved: tuple[str, Path, Any], used: bool) -> None:
    kind, path, _ = saved
    model, optimizer = make(kind, 0.125, used=used)
    before = state_of(optimizer)
    fc.restore(path, {"optimizer": fc.Optimizer(optimizer, model)}, ignore="optimizer.state.*")
    assert float(optimizer.param_groups[0]["lr"]) == 0.5
    assert testing.differences(state_of(optimizer), before) == []
    step(model, optimizer)


def test_state_of_one_parameter_is_left_out(tmp_path: Path) -> None:
    model, optimizer = make("adamw", 0.5)
    fc.save(tmp_path / "c", {"optimizer": fc.Optimizer(optimizer, model)})
    expected = state_of(optimizer)
    fresh, other = make("adamw", 0.125, used=False)
    items = {"optimizer": fc.Optimizer(other, fresh)}
    fc.restore(tmp_path / "c", items, ignore="optimizer.state.weight.*")
    assert list(state_of(other)) == [1]
    assert testing.differences(state_of(other)[1], expected[1]) == []


def test_state_that_the_checkpoint_lacks_stays_when_it_is_ignored(tmp_path: Path) -> None:
    model, optimizer = make("adamw", 0.5, used=False)
    fc.save(tmp_path / "c", {"optimizer": fc.Optimizer(optimizer, model)})
    model, optimizer = make("adamw", 0.125)
    before = state_of(optimizer)
    items = {"optimizer": fc.Optimizer(optimizer, model)}
    fc.restore(tmp_path / "c", items, ignore="optimizer.state.*")
    assert testing.differences(state_of(optimizer), before) == []
    fc.restore(tmp_path / "c", items)
    assert state_of(optimizer) == {}


def test_scheduler_keeps_ignored_values(tmp_path: Path) -> None:
    scheduler = lr_scheduler.StepLR(make("sgd", 0.1)[1], 7)
    scheduler.last_epoch = 5
    fc.save(tmp_path / "c", {"scheduler": scheduler})
    for choice in ({"ignore": "scheduler.step_size"}, {"only": "scheduler.last_epoch"}):
        other = lr_scheduler.StepLR(make("sgd", 0.1)[1], 99)
        fc.restore(tmp_path / "c", {"scheduler": other}, **choice)
        assert (other.step_size, other.last_epoch) == (99, 5)


class Log:
    """A stateful object that keeps a list."""

    def __init__(self, *values: int) -> None:
        self.values = list(values)
        self.name = "new"

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values, self.name = state["values"], state["name"]


def test_items_of_a_list_are_kept_where_the_target_has_them(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"log": Log(1, 2, 3)})
    log = Log(7, 8, 9)
    fc.restore(tmp_path / "c", {"log": log}, ignore="log.values.1")
    assert log.values == [1, 8, 3]
    log = Log(7)
    fc.restore(tmp_path / "c", {"log": log}, ignore="log.values.2")
    assert log.values == [1, 2]
    log = Log()
    with pytest.raises(errors.UsageError, match=r"log\['values'\], a list, cannot be restored in"):
        fc.restore(tmp_path / "c", {"log": log}, ignore="log.values.1")
    assert log.values == []
    fc.restore(tmp_path / "c", {"log": log}, ignore="log.values.*")
    assert (log.values, log.name) == ([], "new")


def test_an_item_of_which_nothing_is_selected_is_not_loaded(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"log": Log(1)})

    class Untouchable(Log):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    log = Untouchable()
    assert fc.restore(tmp_path / "c", {"log": log}, ignore="log.*")["log"] is log


def test_generators_are_chosen_by_name(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, int]:
        return random.random(), np.random.rand(), float(torch.rand(())), int(own.integers(2**60))

    own = np.random.default_rng(1)
    items = {"rng": fc.Rng({"own": own})}
    fc.save(tmp_path / "c", items)
    first = draw()
    second = draw()
    for choice, restored in (
        ({"ignore": "rng.python*"}, (False, True, True, True)),
        ({"only": "rng.torch*"}, (False, False, True, False)),
        ({"ignore": ["rng.numpy*", "rng.generators.own.*"]}, (True, False, True, False)),
    ):
        fc.restore(tmp_path / "c", items, **choice)
        drawn = draw()
        assert tuple(a == b for a, b in zip(drawn, first, strict=True)) == restored
    assert second != first


def test_a_generator_of_another_name_is_no_mismatch_when_it_is_ignored(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"rng": fc.Rng({"old": random.Random(1)})})
    new = random.Random(2)
    items = {"rng": fc.Rng({"new": new})}
    with pytest.raises(errors.MismatchError):
        fc.restore(tmp_path / "c", items)
    before = new.getstate()
    fc.restore(tmp_path / "c", items, ignore="rng.generators.*")
    assert new.getstate() == before


def test_metric_keeps_ignored_values(tmp_path: Path) -> None:
    def metric(count: int) -> Any:
        made = classification.MulticlassAccuracy(3, average="micro")
        for _ in range(count):
            made.update(torch.tensor([0, 1]), torch.tensor([0, 2]))
        return made

    fc.save(tmp_path / "c", {"metric": metric(3)})
    other = metric(1)
    fc.restore(tmp_path / "c", {"metric": other}, ignore="metric.states.*.tp")
    assert (int(other.tp), int(other.fp)) == (1, 3)


def test_parts_of_json_are_chosen_and_renamed(tmp_path: Path) -> None:
    config = {"lr": 0.5, "layers": [1, 2, 3], "data": {"path": "a", "seed": 1}, "none": {}}
    fc.save(tmp_path / "c", {"config": fc.Json(config)})
    own = {"lr": 0.1, "data": {"seed": 9}, "more": True}

    def restore(**choice: Any) -> Any:
        return fc.restore(tmp_path / "c", {"config": fc.Json(own)}, **choice)["config"]

    assert restore() == config
    assert restore(ignore="config.lr") == {**config, "lr": 0.1}
    assert restore(ignore="config.data.*") == {**config, "data": {"seed": 9}}
    assert restore(only="config.layers.*") == {**own, "layers": [1, 2, 3]}
    assert restore(key_map={"config.lr": "config.rate"})["rate"] == 0.5
    assert fc.restore(tmp_path / "c", only="config.data.seed")["config"] == {"data": {"seed": 1}}
    with pytest.raises(errors.UsageError, match="matches no item and no leaf"):
        restore(ignore="config.rate")
    with pytest.raises(errors.UsageError, match="cannot be restored in part"):
        restore(ignore="config.layers.1")


def test_a_meta_module_is_filled_in_part(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    fc.save(tmp_path / "c", {"model": model})
    with torch.device("meta"):
        target = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    fc.restore(tmp_path / "c", {"model": target}, ignore="model.1.*")
    assert torch.equal(target[0].weight, model[0].weight)
    assert target[1].weight.is_meta


def test_an_extra_state_is_kept_when_it_is_ignored(tmp_path: Path) -> None:
    class Counted(torch.nn.Linear):
        count = 0

        def get_extra_state(self) -> Any:
            return {"count": self.count}

        def set_extra_state(self, state: Any) -> None:
            self.count = state["count"]

    model = Counted(1, 1)
    model.count = 5
    fc.save(tmp_path / "c", {"model": model})
    other = Counted(1, 1)
    fc.restore(tmp_path / "c", {"model": other}, ignore="model._extra_state*")
    assert other.count == 0
    assert torch.equal(other.weight, model.weight)
    fc.restore(tmp_path / "c", {"model": other})
    assert other.count == 5


# ------------------------------------------------------------------------------ renamed parameters


class Named(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, torch.nn.Linear(3, 2))
        self.name = name

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(batch)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "key_map",
    [
        {"model.enc": "model.body", "optimizer.state.enc": "optimizer.state.body"},
        [(r"\benc\b", "body")],
        lambda name: name.replace("enc.", "body."),
    ],
)
def test_an_optimizer_follows_its_renamed_parameters(
    kind: str, key_map: Any, tmp_path: Path
) -> None:
    old = Named("enc")
    optimizer = OPTIMIZERS[kind](old.parameters(), 0.5)
    step(old, optimizer)
    fc.save(tmp_path / "c", {"model": old, "optimizer": fc.Optimizer(optimizer, old)})
    new = Named("body")
    other = OPTIMIZERS[kind](new.parameters(), 0.5)
    items = {"model": new, "optimizer": fc.Optimizer(other, new)}
    with pytest.raises(errors.MismatchError):
        fc.restore(tmp_path / "c", items)
    fc.restore(tmp_path / "c", items, key_map=key_map)
    assert testing.differences(state_of(other), state_of(optimizer)) == []
    step(old, optimizer)
    step(new, other)
    assert torch.equal(new.get_parameter("body.weight"), old.get_parameter("enc.weight"))


def test_a_list_below_a_renamed_key_stays_a_list(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"tree": {"a": [1, (2, 3)], "b": 4}})
    restored = fc.restore(tmp_path / "c", key_map={"tree.a": "tree.c"})
    assert restored["tree"] == {"c": [1, (2, 3)], "b": 4}


def test_two_parameters_cannot_get_one_name(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)  # it has no state to collide
    fc.save(tmp_path / "c", {"optimizer": fc.Optimizer(optimizer, model)})
    with pytest.raises(errors.UsageError, match="two parameters of 'optimizer' one name"):
        fc.restore(
            tmp_path / "c",
            {"optimizer": fc.Optimizer(optimizer, model)},
            key_map={"optimizer.state.bias": "optimizer.state.weight"},
        )
