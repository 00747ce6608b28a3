"""Checkpoints of every released format stay readable."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import golden_values as values
import numpy as np
import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import ArraySpec, Box
from functional_ckpt.format import checkpoint_dir, read_plan
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.testing.equality import differences
from functional_ckpt.verify import checkpoint

HERE = Path(__file__).parent
VERSIONS = sorted(path for path in HERE.glob("v*") if path.is_dir())
ORBAX = ("orbax_v0_zarr3", "orbax_v0_files", "orbax_v1")

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    # A copy: a build system may show each file as a link, and a checkpoint's files are no links.
    return Path(shutil.copytree(request.param, tmp_path / request.param.name))


@pytest.fixture
def run(golden: Path) -> fc.CheckpointManager:
    return fc.CheckpointManager(golden / "run", read_only=True)


def as_numpy(tree: Any) -> Any:
    """A restored tree of plain tensors as `orbax_tree` has it."""
    if isinstance(tree, dict):
        return {key: as_numpy(child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [as_numpy(child) for child in tree]
    return tree.numpy() if isinstance(tree, torch.Tensor) else tree


def test_there_are_golden_checkpoints() -> None:
    assert VERSIONS
    files = [path for path in HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 2**20
    assert not list(HERE.rglob("*.pkl")) and not list(HERE.rglob("lock"))


def test_every_leaf_as_it_was(run: fc.CheckpointManager) -> None:
    assert differences(run.restore(7, only="tree")["tree"], values.tree()) == []


def test_ties_are_tied_again(run: fc.CheckpointManager) -> None:
    first, inner, parameter = run.restore(7, only="tree.tied.*")["tree"]["tied"]
    assert first.data_ptr() == inner["again"].data_ptr() == parameter.data_ptr()


def test_spread_over_several_files(golden: Path) -> None:
    parts = {"v1": "ocdbt.process_*", "v2": "*.safetensors"}[golden.name]
    assert len(list((golden / "spread" / "tree").glob(parts))) > 1
    assert differences(fc.restore(golden / "spread")["tree"], values.tree()) == []


def test_into_a_like_tree(run: fc.CheckpointManager) -> None:
    restored = run.restore(7, {"tree": values.tree()}, verify="first")["tree"]
    assert differences(restored, values.tree()) == []


def test_json_metrics_and_custom_metadata(run: fc.CheckpointManager) -> None:
    expected = {"lr": 0.1, "layers": [1, 2], "name": "ü", "none": None}
    assert run.restore(7, only="config")["config"] == expected
    assert run.metadata(7).metrics == {"accuracy": 0.75, "steps": 3}
    metadata = run.metadata(7)
    assert metadata.custom_metadata == {"note": "é", "list": [1, None, {"a": True}]}
    assert metadata.time.year >= 2025
    assert run.all_steps() == [7] and run.best_step("accuracy") == 7


def test_golden_module_optimizer_scheduler_restore_equal(run: fc.CheckpointManager) -> None:
    model = values.module(filled=False)
    optimizer = values.optimizer(model, filled=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    items = {
        "model": model,
        "optimizer": fc.Optimizer(optimizer, model),
        "scheduler": scheduler,
    }
    run.restore(7, items)
    expected = values.module(filled=True)
    assert differences(dict(model.state_dict()), dict(expected.state_dict())) == []
    assert model[0].weight is model[2].weight
    wanted = values.optimizer(expected, filled=True)
    wanted_scheduler = torch.optim.lr_scheduler.StepLR(wanted, 5)
    got, want = optimizer.state_dict(), wanted.state_dict()
    assert differences(got["state"], want["state"]) == []
    for one, other in zip(got["param_groups"], want["param_groups"], strict=True):
        assert {**one, "params": None} == {**other, "params": None}
    assert scheduler.last_epoch == wanted_scheduler.last_epoch
    assert scheduler.base_lrs == wanted_scheduler.base_lrs


def test_golden_generators_restore_equal(run: fc.CheckpointManager) -> None:
    own = np.random.default_rng(0)
    run.restore(7, {"rng": fc.Rng({"own": own})})
    drawn = (random.random(), np.random.random(), torch.rand(2), own.random())
    values.seed()
    expected = (
        random.random(),
        np.random.random(),
        torch.rand(2),
        np.random.default_rng(14).random(),
    )
    assert differences(drawn, expected) == []


def test_golden_types_restore_into_targets(golden: Path) -> None:
    target = {
        "named": values.Pair(torch.zeros(4, dtype=torch.int64), [0, 0.0]),
        "wrapped": values.Wrapped(torch.zeros(6), torch.tensor(0.0)),
    }
    restored = fc.restore(golden / "save", {"targets": target, "leaf": torch.zeros(3).long()})
    assert torch.equal(restored["leaf"], torch.arange(3))
    named, wrapped = restored["targets"]["named"], restored["targets"]["wrapped"]
    assert type(named) is values.Pair and type(wrapped) is values.Wrapped
    assert torch.equal(named.left, torch.arange(4)) and named.right == [1, 2.5]
    assert torch.equal(wrapped.inner, torch.arange(6.0))
    assert torch.equal(wrapped.scale, torch.tensor(0.5))


@pytest.mark.parametrize("part", ["run/7", "save", "spread"])
def test_every_byte_is_the_one_that_was_written(golden: Path, part: str) -> None:
    assert checkpoint.verify_checkpoint(LocalStorage(), str(golden / part)) == []


@pytest.mark.parametrize("name", ORBAX)
def test_orbax_checkpoints_stay_readable(golden: Path, name: str) -> None:
    restored = fc.restore(golden / name)
    (tree,) = restored.values()
    expected = values.orbax_tree() | {"text": "é"}
    assert set(tree) == set(expected)
    got = as_numpy({key: tree[key] for key in expected})
    got["params"] = {key: got["params"][key] for key in expected["params"]}
    assert differences(got, expected) == []


def test_orbax_manager_of_zarr2(golden: Path) -> None:
    with fc.CheckpointManager(golden / "orbax_v0_zarr2", read_only=True) as manager:
        assert manager.all_steps() == [3] and manager.metadata(3).metrics == {"accuracy": 0.5}
        got = as_numpy(manager.restore(3)["default"])
    expected = values.orbax_tree()
    got = {key: got[key] for key in expected}
    assert differences(got, expected) == []


def test_a_foreign_array_of_another_shape_than_expected_is_damage(golden: Path) -> None:
    item = checkpoint_dir.open_checkpoint(LocalStorage(), str(golden / "orbax_v0_files")).tree(
        "default"
    )
    memory = np.zeros((3, 5), np.float32)
    request = read_plan.ReadRequest(
        "params.kernel",
        ArraySpec((3, 5), "float32"),
        Box.whole((3, 5)),
        destination=read_plan.Destination(lambda: memory, lambda: None),
    )
    [task] = item.open_reader().tasks([request])
    with pytest.raises(errors.CorruptCheckpointError, match=r"shape \(3, 4\), expected \(3, 5\)"):
        task()
    assert not memory.any()
