"""Wrong arguments of a newcomer: a `UsageError` that names the argument, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors

MODEL = torch.nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)
ITEMS = {"model": MODEL, "tree": {"x": torch.ones(2)}}
NO: Any = "no"
ONE: Any = 3

OF_MANAGERS: dict[str, dict[str, Any]] = {
    "timeout_seconds": {"timeout_seconds": "3"},
    "registry": {"registry": {}},
    "overwrite": {"overwrite": NO},
    "read_only": {"read_only": NO},
    "tiers": {"tiers": None},
    "tiers must be a list": {"tiers": {"a": 1}},
    "storage must have": {"storage": "s3"},
    "storage must": {"storage": fc.CheckpointManager},
    "keep_policy: expected": {"keep_policy": fc.handlers.Fill(3)},
    "save_policy: expected": {"save_policy": fc.handlers.Fill(3)},
    "A path": {"tiers": [3]},
    "latest_link": {"latest_link": 3},
    "coordinator": {"coordinator": 3},
}

OF_CALLS: dict[str, Callable[[fc.CheckpointManager], object]] = {
    "force": lambda manager: manager.save(2, ITEMS, force=NO),
    "step": lambda manager: manager.restore(cast("Any", torch.ones(2))),
    "discard_later": lambda manager: manager.restore(1, discard_later=NO),
    "only": lambda manager: manager.restore(1, only=ONE),
    "ignore": lambda manager: manager.restore(1, ignore=ONE),
    "A path": lambda _: fc.save(ONE, ITEMS),
    "timeout": lambda manager: manager.wait_for_new_step(timeout=NO),
    "poll": lambda manager: manager.wait_for_new_step(1, timeout=0.1, poll=NO),
    "custom_metadata": lambda manager: manager.save(4, ITEMS, custom_metadata={"a": {1: 2}}),
    r"metrics\['a'\]": lambda manager: manager.record_metrics(1, {"a": "\ud83d\ude00"}),
}

OF_FUNCTIONS: dict[str, Callable[[], object]] = {
    "max_delay_seconds": lambda: fc.Tier(path="x", max_delay_seconds=NO),
    "storage": lambda: fc.Tier(path="x", storage=ONE),
    "exact_interval": lambda: fc.policies.EveryNSteps(5, exact_interval=NO),
    "keep_without_metrics": lambda: fc.policies.BestN(1, "a", keep_without_metrics=ONE),
    "steps to keep": lambda: fc.policies.CustomSteps(cast("Any", b"12")),
    "steps to save": lambda: fc.policies.SpecificSteps(cast("Any", {1: 2})),
    "are the two exchanged": lambda: fc.Optimizer(cast("Any", MODEL), cast("Any", OPTIMIZER)),
    "model must be a module": lambda: fc.Optimizer(OPTIMIZER, ONE),
    "model must be a torch": lambda: fc.training_items(cast("Any", fc.Module(MODEL)), OPTIMIZER),
    "A path must be": lambda: fc.metadata(cast("Any", None)),
}


@pytest.mark.parametrize("name", OF_MANAGERS)
def test_manager_refuses_a_wrong_argument_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match=name):
        fc.CheckpointManager(tmp_path / "run", **OF_MANAGERS[name])
    assert not (tmp_path / "run").exists()


def test_calls_of_a_manager_refuse_wrong_arguments_by_name(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2, 3):
            manager.save(step, ITEMS)
        manager.wait_until_finished()
        for name, act in OF_CALLS.items():
            with pytest.raises(errors.UsageError, match=name):
                act(manager)
        assert manager.all_steps() == [1, 2, 3]


@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_functions_refuse_a_wrong_argument_by_name(name: str) -> None:
    with pytest.raises(errors.UsageError, match=name):
        OF_FUNCTIONS[name]()


def test_save_and_restore_refuse_wrong_arguments_by_name(tmp_path: Path) -> None:
    path, wrong = tmp_path / "one", fc.Module(MODEL)
    object.__setattr__(wrong, "value", 3)  # as `tree_map` may
    fc.save(path, ITEMS)
    with pytest.raises(errors.UsageError, match="overwrite"):
        fc.save(path, ITEMS, overwrite=NO)
    with pytest.raises(errors.UsageError, match=r"model: Expected a torch\.nn\.Module"):
        fc.restore(path, {"model": wrong})
    with fc.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, ITEMS)
        manager.wait_until_finished()
        with pytest.raises(errors.StepNotFoundError, match="directory of steps"):
            fc.restore(tmp_path / "run")
