from __future__ import annotations

import collections
import random
import subprocess
import sys
from typing import Any

import pytest
import torch

from functional_ckpt import errors
from functional_ckpt.handlers import (
    CheckpointItem,
    Generator,
    Handler,
    Item,
    Json,
    Module,
    Optimizer,
    PyTree,
    PyTreeHandler,
    Registry,
    Rng,
    Stateful,
    default_registry,
)


class Both:
    def state_dict(self):
        return {"n": 1}

    def load_state_dict(self, state) -> None: ...


MODEL = torch.nn.Linear(1, 1)
SGD = torch.optim.SGD(MODEL.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (MODEL, Module),
        (Both(), Stateful),
        (torch.optim.lr_scheduler.StepLR(SGD, 1), Stateful),
        (torch.amp.GradScaler("cpu"), Stateful),
        (torch.Generator(), Generator),
        (random.Random(), Generator),
        ({"a": torch.ones(1)}, PyTree),
        (torch.nn.Parameter(torch.ones(1)), PyTree),
        (3, PyTree),
        (None, PyTree),
        (Both, PyTree),
        (Json({}), Json),
        (Rng(), Rng),
        (Optimizer(SGD, MODEL), Optimizer),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_item_a_value_becomes(value, kind):
    assert type(default_registry().bind(value)) is kind


def test_a_bare_optimizer_is_an_error_that_names_the_way():
    with pytest.raises(
        errors.UsageError, match=r"SGD is saved by .* fc\.Optimizer\(optimizer, model\)"
    ):
        default_registry().bind(SGD)


def test_pytrees_are_not_touched(save):
    Point = collections.namedtuple("Point", "x y")
    value = {"p": Point(torch.ones(2), 3), 4: [None, torch.nn.Parameter(torch.zeros(2))]}
    target = {"p": Point(torch.zeros(2), 0), 4: [None, torch.nn.Parameter(torch.ones(2))]}
    held = target["p"].x
    restored = save(value).restore(target)
    assert restored is not target
    assert type(restored["p"]) is Point
    assert restored["p"].x.tolist() == [1, 1]
    assert restored["p"].y == 3
    assert held.tolist() == [0, 0]
    assert type(restored[4][1]) is torch.nn.Parameter
    assert PyTreeHandler().lower(value) is value


class Celsius:
    def __init__(self, degrees: float) -> None:
        self.degrees = degrees


class CelsiusHandler(Handler):
    def lower(self, value: Any) -> Any:
        return {"degrees": value.degrees}

    def lift(self, value: Any, tree: Any) -> Any:
        return Celsius(tree["degrees"])


def test_a_users_own_type():
    registry = default_registry()
    with_own = registry.with_handler(Celsius, CelsiusHandler())
    item = with_own.bind(Celsius(21.5))
    assert isinstance(item, Item)
    assert item.handler.lift(item.value, item.handler.lower(item.value)).degrees == 21.5
    assert type(registry.bind(Celsius(1.0))) is PyTree  # the old registry is as it was

    class Own(torch.nn.Linear):
        pass

    assert type(registry.bind(Own(1, 1))) is Module
    assert type(registry.with_handler(Own, CelsiusHandler()).bind(Own(1, 1))) is CheckpointItem


def test_handlers_import_no_library_they_only_recognise():
    code = (
        "import sys, functional_ckpt.handlers as h; h.default_registry().bind({}); "
        "print([n for n in ('torchmetrics', 'torchdata', 'jax', 'orbax') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_registry_without_a_handler_for_a_value_says_so() -> None:
    with pytest.raises(errors.UsageError, match="No handler for x, a set; wrap it in a Checkpoint"):
        Registry().bind({1}, "x")
